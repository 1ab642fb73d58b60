// The adjoint of max_unpool2d on the CPU: every pooled cell reads the cell that its switch points at. Any
// strides.
#include "dtype.h"
#include "max_unpool2d.h"
#include "parallel.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using Params = conelens_max_unpool2d_params;
using unpool::Axis;

template <class T>
void gather(const Params& p, int threads) {
  const int64_t lines = p.batch * p.channels * p.height;
  parallel_for(lines, 1 + 16384 / p.width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % p.height, plane = i / p.height, n = plane / p.channels, c = plane % p.channels;
      const Axis rows = unpool::axis(p, n, 0), columns = unpool::axis(p, n, 1);
      const T* grad = static_cast<const T*>(p.out) + n * p.out_stride[0] + c * p.out_stride[1];
      T* out = static_cast<T*>(const_cast<void*>(p.pooled)) + n * p.pooled_stride[0] +
               c * p.pooled_stride[1] + y * p.pooled_stride[2];
      const int64_t first = n * p.switches_stride[0] + c * p.switches_stride[1] + y * p.switches_stride[2];
      for (int64_t x = 0; x < p.width; ++x) {
        const int64_t at = first + x * p.switches_stride[3];
        const int64_t tap = p.switch_bytes == 1 ? static_cast<const uint8_t*>(p.switches)[at]
                                                : static_cast<const int32_t*>(p.switches)[at];
        const int64_t row = y * rows.stride - rows.shift + tap / columns.kernel * rows.dilation;
        const int64_t column = x * columns.stride - columns.shift + tap % columns.kernel * columns.dilation;
        const bool inside = tap >= 0 && tap < rows.kernel * columns.kernel && row >= rows.begin &&
                            row < rows.end && column >= columns.begin && column < columns.end;
        out[x * p.pooled_stride[3]] =
            inside ? grad[row * p.out_stride[2] + column * p.out_stride[3]] : Element<T>::store(0);
      }
    }
  });
}

}  // namespace

int max_unpool2d_backward(const Params& p, int threads) {
  return dispatch_dtype(p.dtype, [&](auto type) {
    gather<typename decltype(type)::type>(p, threads);
    return static_cast<int>(CONELENS_OK);
  });
}

}  // namespace conelens::cpu::CONELENS_ISA
