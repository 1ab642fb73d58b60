// gather_windows on CUDA: each thread makes V neighbouring elements of a few cells (channels side by side),
// or of one row (columns side by side), and stores them at once.
#include "cuda_device.cuh"
#include "gather_windows.h"

namespace conelens::cuda {
namespace {

using Params = conelens_gather_windows_params;
using gather::Axis;

// --- one thread: V elements of one source ---

template <class T, int V, bool add>
struct Source {
  const T *base, *patch;  // null: not read

  CONELENS_DEVICE Source() : base(nullptr), patch(nullptr) {}
  // cell (y, x) of the window, and the element from which its plane or its channels are read
  CONELENS_DEVICE Source(const Params& p, const Axis& rows, const Axis& columns, int64_t sample, int64_t unit,
                         int64_t channel, int64_t y, int64_t x)
      : Source() {
    if (sample < 0 || y < rows.begin || y >= rows.end || x < columns.begin || x >= columns.end) return;
    const bool covered =
        y >= rows.patch_begin && y < rows.patch_end && x >= columns.patch_begin && x < columns.patch_end;
    if (covered)
      patch = static_cast<const T*>(p.patch) + unit * p.patch_stride[0] + channel * p.patch_stride[1] +
              (y - rows.shift) * p.patch_stride[2] + (x - columns.shift) * p.patch_stride[3];
    if (add || !covered)
      base = static_cast<const T*>(p.base) + sample * p.base_stride[0] + channel * p.base_stride[1] +
             (y + rows.first) * p.base_stride[2] + (x + columns.first) * p.base_stride[3];
  }
  CONELENS_DEVICE void load(T (&to)[V], T fill) const {
    if constexpr (add) {
      if (base && patch) {
        T own[V];
        load_vector(to, base);
        load_vector(own, patch);
#pragma unroll
        for (int i = 0; i < V; ++i) to[i] = narrow<T>(widen(to[i]) + widen(own[i]));
        return;
      }
    }
    if (base || patch) {
      load_vector(to, patch ? patch : base);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = fill;
    }
  }
};

template <class T>
CONELENS_DEVICE T fill_value(const Params& p) {
  T value;
  memcpy(&value, &p.fill, sizeof value);
  return value;
}

// --- channels side by side: kCells neighbours in a row, all loads before all stores
// ---------------------------------------------------------------------------------

constexpr int kCells = 4;

template <class T, int V, bool add, class Index>
__global__ void __launch_bounds__(kThreads)
    gather_channels(const __grid_constant__ Params p, Index groups, Index threads) {
  Index index = thread_index<Index>();
  if (index >= threads) return;
  const int64_t channel = static_cast<int64_t>(take_axis<Index>(index, p.channels / V)) * V;
  const int64_t first = static_cast<int64_t>(take_axis<Index>(index, groups)) * kCells;
  const int64_t y = take_axis<Index>(index, p.out_height);
  const int64_t unit = index;
  const Axis rows = gather::axis(p, unit, 0), columns = gather::axis(p, unit, 1);
  const int64_t sample = gather::sample(p, unit);
  const T fill = fill_value<T>(p);
  T values[kCells][V];
#pragma unroll
  for (int i = 0; i < kCells; ++i)
    Source<T, V, add>(p, rows, columns, sample, unit, channel, y, first + i).load(values[i], fill);
  T* out = static_cast<T*>(p.out) + unit * p.out_stride[0] + channel + y * p.out_stride[2];
#pragma unroll
  for (int i = 0; i < kCells; ++i)
    if (first + i < p.out_width) store_vector(out + (first + i) * p.out_stride[3], values[i]);
}

// --- columns side by side: V neighbours in a row, which may have several sources
// ---------------------------------------------------------------------------------

template <class T, int V, bool add, class Index>
__global__ void __launch_bounds__(kThreads)
    gather_columns(const __grid_constant__ Params p, Index groups, Index threads) {
  Index index = thread_index<Index>();
  if (index >= threads) return;
  const int64_t first = static_cast<int64_t>(take_axis<Index>(index, groups)) * V;
  const int64_t y = take_axis<Index>(index, p.out_height);
  const int64_t channel = take_axis<Index>(index, p.channels);
  const int64_t unit = index;
  const Axis rows = gather::axis(p, unit, 0), columns = gather::axis(p, unit, 1);
  const int64_t sample = gather::sample(p, unit);
  const T fill = fill_value<T>(p);
  T values[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    T value[1];
    Source<T, 1, add>(p, rows, columns, sample, unit, channel, y, first + i).load(value, fill);
    values[i] = value[0];
  }
  T* out = static_cast<T*>(p.out) + unit * p.out_stride[0] + channel * p.out_stride[1] + y * p.out_stride[2];
  store_vector(out + first, values);
}

// --- choice
// ---------------------------------------------------------------------------------

template <class T, int V, bool add, bool channels_last>
int launch_windows(const Params& p, void* stream) {
  const int64_t groups = channels_last ? ceil_div(p.out_width, kCells) : p.out_width / V;
  const int64_t threads = p.units * p.out_height * groups * (channels_last ? p.channels / V : p.channels);
  return dispatch_index(threads, [&](auto index) {
    using Index = decltype(index);
    const auto start = [&](auto kernel) {
      return launch(kernel, ceil_div(threads, kThreads), kThreads, stream, p, static_cast<Index>(groups),
                    static_cast<Index>(threads));
    };
    if constexpr (channels_last)
      return start(gather_channels<T, V, add, Index>);
    else
      return start(gather_columns<T, V, add, Index>);
  });
}

template <class T, bool add>
int make_windows(const Params& p, void* stream) {
  constexpr int full = 16 / sizeof(T);
  const Layout base{p.base, p.base_stride, sizeof(T)}, patch{p.patch, p.patch_stride, sizeof(T)};
  const Layout out{p.out, p.out_stride, sizeof(T)};
  const auto along = [&](int axis) {
    return p.base_stride[axis] == 1 && p.out_stride[axis] == 1 && (!p.patch || p.patch_stride[axis] == 1);
  };
  if (along(3)) {
    if (p.out_width % full == 0 && vectorises(out, 3, full))
      return launch_windows<T, full, add, false>(p, stream);
    if constexpr (full >= 4)
      if (p.out_width % (full / 2) == 0 && vectorises(out, 3, full / 2))
        return launch_windows<T, full / 2, add, false>(p, stream);
    return launch_windows<T, 1, add, false>(p, stream);
  }
  if (!along(1)) return CONELENS_UNSUPPORTED_LAYOUT;
  if (p.channels % full == 0 && vectorises(out, 1, full) && vectorises(base, 1, full) &&
      (!p.patch || vectorises(patch, 1, full)))
    return launch_windows<T, full, add, true>(p, stream);
  return launch_windows<T, 1, add, true>(p, stream);
}

int dispatch(const Params& p, void* stream) {
  if (p.units * p.channels * p.out_height * p.out_width == 0) return CONELENS_OK;
  if (p.add && p.patch)
    return dispatch_dtype(p.dtype,
                          [&](auto t) { return make_windows<typename decltype(t)::type, true>(p, stream); });
  switch (p.element_bytes) {
    case 1:
      return make_windows<uint8_t, false>(p, stream);
    case 2:
      return make_windows<uint16_t, false>(p, stream);
    case 4:
      return make_windows<uint32_t, false>(p, stream);
    case 8:
      return make_windows<uint64_t, false>(p, stream);
    default:
      return CONELENS_UNSUPPORTED_DTYPE;
  }
}

}  // namespace
}  // namespace conelens::cuda

extern "C" CONELENS_API int conelens_gather_windows_cuda(const conelens_gather_windows_params* p,
                                                         void* stream) {
  return conelens::cuda::dispatch(*p, stream);
}
