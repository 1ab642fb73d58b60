// relu_change on CUDA: each thread makes V neighbouring channels of a few cells, or V columns of one row, and
// stores them at once.
#include "cuda_device.cuh"
#include "relu_change.h"

namespace conelens::cuda {
namespace {

using Params = conelens_relu_change_params;
using relu::Axis;

// V neighbours at `from`, which is aligned like a vector and may be what the kernel writes: out can be change
template <class T, int V>
CONELENS_DEVICE void load_written(T (&to)[V], const T* from) {
  using Bits = typename BitsOf<V * sizeof(T)>::type;
  const Bits bits = __ldcs(reinterpret_cast<const Bits*>(from));
  memcpy(to, &bits, sizeof bits);
}

// A NaN of either makes the sum NaN, which no comparison replaces.
template <class T>
CONELENS_DEVICE T rectified(T change, T base) {
  using C = Compute<T>;
  const C z = widen(base), sum = widen(change) + (z > C(0) ? C(0) : z), least = z > C(0) ? -z : C(0);
  return narrow<T>(sum < least ? least : sum);
}

// The first element of cell (y, x) of a map.
template <class T>
CONELENS_DEVICE T* cell(T* map, const int64_t (&stride)[4], int64_t n, int64_t c, int64_t y, int64_t x) {
  return map + n * stride[0] + c * stride[1] + y * stride[2] + x * stride[3];
}

// --- channels side by side: kCells neighbours in a row, all loads before all stores
// ---------------------------------------------------------------------------------

constexpr int kCells = 2;  // of two maps: more spill

template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads)
    change_channels(const __grid_constant__ Params p, Index groups, Index threads) {
  Index index = thread_index<Index>();
  if (index >= threads) return;
  const int64_t channel = static_cast<int64_t>(take_axis<Index>(index, p.channels / V)) * V;
  const int64_t first = static_cast<int64_t>(take_axis<Index>(index, groups)) * kCells;
  const int64_t y = take_axis<Index>(index, p.out_height);
  const int64_t unit = index;
  const Axis rows = relu::axis(p, unit, 0), columns = relu::axis(p, unit, 1);
  const int64_t sample = gather::sample(p, unit);
  const T* change = cell(static_cast<const T*>(p.change), p.change_stride, unit, channel, y, first);
  const bool inside = sample >= 0 && y >= rows.begin && y < rows.end;
  T values[kCells][V]{}, below[kCells][V]{};  // zeros outside the map
#pragma unroll
  for (int i = 0; i < kCells; ++i)
    if (inside && first + i >= columns.begin && first + i < columns.end) {
      load_written(values[i], change + i * p.change_stride[3]);
      load_vector(below[i], cell(static_cast<const T*>(p.base), p.base_stride, sample, channel,
                                 y + rows.first, first + i + columns.first));
    }
  T* out = cell(static_cast<T*>(p.out), p.out_stride, unit, channel, y, first);
#pragma unroll
  for (int i = 0; i < kCells; ++i)
    if (first + i < p.out_width) {
#pragma unroll
      for (int k = 0; k < V; ++k) values[i][k] = rectified(values[i][k], below[i][k]);
      store_vector(out + i * p.out_stride[3], values[i]);
    }
}

// --- columns side by side: V neighbours in a row, over base wherever that lies
// ---------------------------------------------------------------------------------

template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads)
    change_columns(const __grid_constant__ Params p, Index groups, Index threads) {
  Index index = thread_index<Index>();
  if (index >= threads) return;
  const int64_t first = static_cast<int64_t>(take_axis<Index>(index, groups)) * V;
  const int64_t y = take_axis<Index>(index, p.out_height);
  const int64_t channel = take_axis<Index>(index, p.channels);
  const int64_t unit = index;
  const Axis rows = relu::axis(p, unit, 0), columns = relu::axis(p, unit, 1);
  const int64_t sample = gather::sample(p, unit);
  const bool inside = sample >= 0 && y >= rows.begin && y < rows.end;
  T values[V];
  load_written(values, cell(static_cast<const T*>(p.change), p.change_stride, unit, channel, y, first));
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (inside && first + i >= columns.begin && first + i < columns.end)
      values[i] = rectified(values[i], load_one(cell(static_cast<const T*>(p.base), p.base_stride, sample,
                                                     channel, y + rows.first, first + i + columns.first)));
    else
      values[i] = T{};
  store_vector(cell(static_cast<T*>(p.out), p.out_stride, unit, channel, y, first), values);
}

// --- choice
// ---------------------------------------------------------------------------------

template <class T, int V, bool channels_last>
int launch_changes(const Params& p, void* stream) {
  const int64_t groups = channels_last ? ceil_div(p.out_width, kCells) : p.out_width / V;
  const int64_t threads = p.units * p.out_height * groups * (channels_last ? p.channels / V : p.channels);
  return dispatch_index(threads, [&](auto index) {
    using Index = decltype(index);
    const auto start = [&](auto kernel) {
      return launch(kernel, ceil_div(threads, kThreads), kThreads, stream, p, static_cast<Index>(groups),
                    static_cast<Index>(threads));
    };
    if constexpr (channels_last)
      return start(change_channels<T, V, Index>);
    else
      return start(change_columns<T, V, Index>);
  });
}

template <class T>
int make_changes(const Params& p, void* stream) {
  constexpr int full = 16 / sizeof(T);
  const Layout change{p.change, p.change_stride, sizeof(T)}, base{p.base, p.base_stride, sizeof(T)};
  const Layout out{p.out, p.out_stride, sizeof(T)};
  const auto along = [&](int axis) {
    return p.change_stride[axis] == 1 && p.base_stride[axis] == 1 && p.out_stride[axis] == 1;
  };
  if (along(3)) {
    const auto fits = [&](int v) {
      return p.out_width % v == 0 && vectorises(change, 3, v) && vectorises(out, 3, v);
    };
    if (fits(full)) return launch_changes<T, full, false>(p, stream);
    if constexpr (full >= 4)
      if (fits(full / 2)) return launch_changes<T, full / 2, false>(p, stream);
    return launch_changes<T, 1, false>(p, stream);
  }
  if (!along(1)) return CONELENS_UNSUPPORTED_LAYOUT;
  if (p.channels % full == 0 && vectorises(change, 1, full) && vectorises(base, 1, full) &&
      vectorises(out, 1, full))
    return launch_changes<T, full, true>(p, stream);
  return launch_changes<T, 1, true>(p, stream);
}

int dispatch(const Params& p, void* stream) {
  if (p.units * p.channels * p.out_height * p.out_width == 0) return CONELENS_OK;
  return dispatch_dtype(p.dtype, [&](auto t) { return make_changes<typename decltype(t)::type>(p, stream); });
}

}  // namespace
}  // namespace conelens::cuda

extern "C" CONELENS_API int conelens_relu_change_cuda(const conelens_relu_change_params* p, void* stream) {
  return conelens::cuda::dispatch(*p, stream);
}
