// max_pool2d_with_switches on CUDA: the common 2/2 and 3/2 windows walk down strips of rows, so that a row
// that two windows share is read once; every other shape takes one thread per output cell.
#include "cuda_lanes.cuh"
#include "max_pool2d_with_switches.h"

namespace conelens::cuda {
namespace {

using Params = conelens_max_pool2d_params;

// --- one window, any shape and strides
// -----------------------------------------------------------------------------

template <class T>
struct Peak {
  Compute<T> value;
  int tap;
};

// The first maximum of a window, of NaNs the last; `map` points at the channel's first cell.
template <int unroll, class T>
CONELENS_DEVICE Peak<T> reduce_window(const Params& p, const T* map, int64_t out_y, int64_t out_x) {
  const int64_t start_y = out_y * p.stride[0] - p.padding[0], start_x = out_x * p.stride[1] - p.padding[1];
  const int64_t first_y = pool::first_tap(start_y, p.dilation[0]),
                first_x = pool::first_tap(start_x, p.dilation[1]);
  const int64_t end_y = pool::end_tap(start_y, p.dilation[0], p.kernel[0], p.height);
  const int64_t end_x = pool::end_tap(start_x, p.dilation[1], p.kernel[1], p.width);
  Peak<T> best{-static_cast<Compute<T>>(INFINITY), static_cast<int>(first_y * p.kernel[1] + first_x)};
  for (int64_t ky = first_y; ky < end_y; ++ky) {
    const T* row = map + (start_y + ky * p.dilation[0]) * p.x_stride[2];
#pragma unroll unroll
    for (int64_t kx = first_x; kx < end_x; ++kx) {
      Compute<T> value = widen(load_one(row + (start_x + kx * p.dilation[1]) * p.x_stride[3]));
      if (p.relu) value = rectify(value);
      if (value > best.value || value != value) best = {value, static_cast<int>(ky * p.kernel[1] + kx)};
    }
  }
  return best;
}

template <class T, class Switch, class Index>
__global__ void __launch_bounds__(kThreads)
    pool_cells(const __grid_constant__ Params p, bool channels_last, Index threads) {
  Index index = thread_index<Index>();
  if (index >= threads) return;
  int64_t channel = 0;
  if (channels_last) channel = take_axis(index, static_cast<Index>(p.channels));
  const int64_t out_x = take_axis(index, static_cast<Index>(p.out_width));
  const int64_t out_y = take_axis(index, static_cast<Index>(p.out_height));
  if (!channels_last) channel = take_axis(index, static_cast<Index>(p.channels));
  const int64_t sample = index;
  const T* map = static_cast<const T*>(p.x) + sample * p.x_stride[0] + channel * p.x_stride[1];
  const Peak<T> best = reduce_window<4>(p, map, out_y, out_x);
  static_cast<T*>(p.pooled)[sample * p.pooled_stride[0] + channel * p.pooled_stride[1] +
                            out_y * p.pooled_stride[2] + out_x * p.pooled_stride[3]] = narrow<T>(best.value);
  static_cast<Switch*>(p.switches)[sample * p.switches_stride[0] + channel * p.switches_stride[1] +
                                   out_y * p.switches_stride[2] + out_x * p.switches_stride[3]] =
      static_cast<Switch>(best.tap);
}

// --- strips: K x K windows of stride 2, dilation 1
// -----------------------------------------------------------------

constexpr int kStripRows = 4;  // output rows per thread

// Per lane: the maximum of a window along one row, and the first column where it is.
template <int N>
struct RowPeak {
  uint32_t value[N], tap[N];
};

// The row's cells under tap 0 ... K - 1 of V windows, -infinity outside the map.
// NCHW: V output columns, from 2V aligned columns and, for K = 3, one more: left of them with padding 1, else
// right. channels_last: V channels of one output column.
template <class T, int V, int K, bool channels_last>
CONELENS_DEVICE void load_taps(uint32_t (&taps)[K][kWords<T, V>], const T* row, int64_t out_x, int64_t width,
                               int64_t x_stride, int padding) {
  const int64_t start = out_x * 2 - padding;
  const uint32_t outside[1] = {kLowest<T>};
  const T lowest = from_words<T>(outside, 0);
  const auto one = [&](int64_t x) { return x >= 0 && x < width ? load_one(row + x * x_stride) : lowest; };
  if constexpr (channels_last) {
#pragma unroll
    for (int tap = 0; tap < K; ++tap) {
      T cells[V];
#pragma unroll
      for (int i = 0; i < V; ++i) cells[i] = lowest;
      if (start + tap >= 0 && start + tap < width) load_vector(cells, row + (start + tap) * x_stride);
      to_words(taps[tap], cells);
    }
  } else {
    constexpr int span = 2 * V + K - 2;
    T column[span];
    if constexpr (V == 1) {
#pragma unroll
      for (int i = 0; i < span; ++i) column[i] = one(start + i);
    } else {
      T aligned[2 * V];
      load_vector(aligned, row + out_x * 2);
      if constexpr (K == 2) {
#pragma unroll
        for (int i = 0; i < span; ++i) column[i] = aligned[i];
      } else {
        const T odd = one(padding ? start : start + 2 * V);
        column[0] = padding ? odd : aligned[0];
#pragma unroll
        for (int i = 1; i < 2 * V; ++i) column[i] = aligned[padding ? i - 1 : i];
        column[2 * V] = padding ? aligned[2 * V - 1] : odd;
      }
    }
#pragma unroll
    for (int tap = 0; tap < K; ++tap) {
      T cells[V];
#pragma unroll
      for (int i = 0; i < V; ++i) cells[i] = column[2 * i + tap];
      to_words(taps[tap], cells);
    }
  }
}

template <class T, int K, int N>
CONELENS_DEVICE RowPeak<N> row_peak(const uint32_t (&taps)[K][N]) {
  RowPeak<N> peak;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    uint32_t value = taps[0][i];
#pragma unroll
    for (int tap = 1; tap < K; ++tap) value = lane_max<T>(value, taps[tap][i]);
    uint32_t where = in_lanes<T>(K - 1);
#pragma unroll
    for (int tap = K - 2; tap >= 0; --tap)
      where = select(lane_equal<T>(taps[tap][i], value), in_lanes<T>(tap), where);
    peak.value[i] = value;
    peak.tap[i] = where;
  }
  return peak;
}

// Where NaN is about, equality finds no tap: the strip is done again cell by cell.
template <class T, int V>
CONELENS_DEVICE void redo_strip(const Params& p, const T* map, T* pooled, uint8_t* switches, int lane_axis,
                                int64_t out_x, int64_t out_y) {
#pragma unroll 1
  for (int64_t y = out_y; y < out_y + kStripRows && y < p.out_height; ++y)
#pragma unroll 1
    for (int lane = 0; lane < V; ++lane) {
      const T* cells = lane_axis == 1 ? map + lane * p.x_stride[1] : map;
      const Peak<T> peak = reduce_window<1>(p, cells, y, lane_axis == 1 ? out_x : out_x + lane);
      pooled[y * p.pooled_stride[2] + lane * p.pooled_stride[lane_axis]] = narrow<T>(peak.value);
      switches[y * p.switches_stride[2] + lane * p.switches_stride[lane_axis]] =
          static_cast<uint8_t>(peak.tap);
    }
}

template <class T, int V, int K, bool channels_last, int padding_x>
__global__ void __launch_bounds__(kThreads, 4)
    pool_strips(const __grid_constant__ Params p, uint32_t threads) {
  constexpr int N = kWords<T, V>;
  uint32_t index = thread_index<uint32_t>();
  if (index >= threads) return;
  const uint32_t columns = static_cast<uint32_t>(channels_last ? p.out_width : p.out_width / V);
  const uint32_t channels = static_cast<uint32_t>(channels_last ? p.channels / V : p.channels);
  const uint32_t strips = static_cast<uint32_t>((p.out_height + kStripRows - 1) / kStripRows);
  int64_t channel, out_x, out_y;
  if constexpr (channels_last) {
    channel = take_axis(index, channels) * V;
    out_x = take_axis(index, columns);
    out_y = take_axis(index, strips) * kStripRows;
  } else {
    out_x = take_axis(index, columns) * V;
    out_y = take_axis(index, strips) * kStripRows;
    channel = take_axis(index, channels);
  }
  const int64_t sample = index;
  const T* map = static_cast<const T*>(p.x) + sample * p.x_stride[0] + channel * p.x_stride[1];
  T* pooled = static_cast<T*>(p.pooled) + sample * p.pooled_stride[0] + channel * p.pooled_stride[1] +
              out_x * p.pooled_stride[3];
  uint8_t* switches = static_cast<uint8_t*>(p.switches) + sample * p.switches_stride[0] +
                      channel * p.switches_stride[1] + out_x * p.switches_stride[3];
  uint32_t not_a_number = 0;
  // A window without a value above `floor` takes its first tap inside the map: column 1 where it starts left
  // of it.
  const uint32_t floor = p.relu ? 0u : kLowest<T>;
  uint32_t first_column[N];
#pragma unroll
  for (int i = 0; i < N; ++i) first_column[i] = 0;
  if (padding_x && out_x == 0) first_column[0] = 1;
  if (padding_x && out_x == 0 && channels_last)
#pragma unroll
    for (int i = 0; i < N; ++i) first_column[i] = in_lanes<T>(1);

  RowPeak<N> shared_row;  // K == 3: the last row of one window is the first of the next
#pragma unroll
  for (int strip_row = 0; strip_row < kStripRows; ++strip_row, ++out_y) {
    if (out_y >= p.out_height) continue;
    const int64_t start = out_y * 2 - p.padding[0];
    RowPeak<N> rows[K];
#pragma unroll
    for (int tap = 0; tap < K; ++tap) {
      if (K == 3 && tap == 0 && strip_row > 0) {
        rows[0] = shared_row;
        continue;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        rows[tap].value[i] = kLowest<T>;
        rows[tap].tap[i] = 0;
      }
      const int64_t y = start + tap;
      if (y < 0 || y >= p.height) continue;
      uint32_t taps[K][N];
      load_taps<T, V, K, channels_last>(taps, map + y * p.x_stride[2], out_x, p.width, p.x_stride[3],
                                        padding_x);
      rows[tap] = row_peak<T>(taps);
    }
    if constexpr (K == 3) shared_row = rows[2];

    const uint32_t first_row = in_lanes<T>(start < 0 ? K : 0);
    T values[V];
    uint8_t taps[V];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      uint32_t value = rows[0].value[i];
#pragma unroll
      for (int tap = 1; tap < K; ++tap) value = lane_max<T>(value, rows[tap].value[i]);
      uint32_t where = rows[K - 1].tap[i] + in_lanes<T>((K - 1) * K);
#pragma unroll
      for (int tap = K - 2; tap >= 0; --tap)
        where =
            select(lane_equal<T>(rows[tap].value[i], value), rows[tap].tap[i] + in_lanes<T>(tap * K), where);
      where = select(lane_greater<T>(value, floor), where, first_row + first_column[i]);
      if (p.relu) value = lane_max<T>(value, 0u);
      const uint32_t word[1] = {value};
#pragma unroll
      for (int lane = 0; lane < kLanes<T> && i * kLanes<T> + lane < V; ++lane) {
        values[i * kLanes<T> + lane] = from_words<T>(word, lane);
        taps[i * kLanes<T> + lane] = static_cast<uint8_t>(lane_of<T>(where, lane));
      }
      not_a_number |= ~lane_equal<T>(value, value);
    }
    store_vector(pooled + out_y * p.pooled_stride[2], values);
    store_vector(switches + out_y * p.switches_stride[2], taps);
  }
  if (not_a_number)
    redo_strip<T, V>(p, map, pooled, switches, channels_last ? 1 : 3, out_x, out_y - kStripRows);
}

// --- choice
// --------------------------------------------------------------------------------------------------------

template <class T, int V, int K, bool channels_last>
int launch_strips(const Params& p, void* stream) {
  const int64_t threads = p.batch * p.channels * p.out_width / V * ceil_div(p.out_height, kStripRows);
  const auto start = [&](auto kernel) {
    return launch(kernel, ceil_div(threads, kThreads), kThreads, stream, p, static_cast<uint32_t>(threads));
  };
  if constexpr (K == 3)
    if (p.padding[1] == 1) return start(pool_strips<T, V, K, channels_last, 1>);
  return start(pool_strips<T, V, K, channels_last, 0>);
}

template <class T, class Switch>
int launch_cells(const Params& p, void* stream) {
  const int64_t threads = p.batch * p.channels * p.out_height * p.out_width;
  const bool channels_last = p.x_stride[1] == 1 && p.x_stride[3] != 1;
  return dispatch_index(threads, [&](auto index) {
    using Index = decltype(index);
    return launch(pool_cells<T, Switch, Index>, ceil_div(threads, kThreads), kThreads, stream, p,
                  channels_last, static_cast<Index>(threads));
  });
}

// Widest vector V that x, pooled and switches allow along columns (axis 3) or channels (axis 1).
template <class T>
bool fits(const Params& p, int axis, int v) {
  if (axis == 3 && (p.out_width % v != 0 || 2 * p.out_width > p.width)) return false;
  if (axis == 1 && p.channels % v != 0) return false;
  const int x_vector = axis == 3 ? 2 * v : v;
  return vectorises({p.x, p.x_stride, sizeof(T)}, axis, x_vector) &&
         vectorises({p.pooled, p.pooled_stride, sizeof(T)}, axis, v) &&
         vectorises({p.switches, p.switches_stride, 1}, axis, v);
}

template <class T, int K>
int pick_strips(const Params& p, void* stream) {
  constexpr int full = 16 / sizeof(T);
  if (p.x_stride[1] == 1 && p.x_stride[3] != 1) {
    if (fits<T>(p, 1, full)) return launch_strips<T, full, K, true>(p, stream);
    return launch_strips<T, 1, K, true>(p, stream);
  }
  if (fits<T>(p, 3, full)) return launch_strips<T, full, K, false>(p, stream);
  if (fits<T>(p, 3, full / 2)) return launch_strips<T, full / 2, K, false>(p, stream);
  if (full == 8 && fits<T>(p, 3, 2)) return launch_strips<T, 2, K, false>(p, stream);
  return launch_strips<T, 1, K, false>(p, stream);
}

template <class T>
int run(const Params& p, void* stream) {
  if (p.switch_bytes == 4) return launch_cells<T, int32_t>(p, stream);
  if constexpr (sizeof(T) < 8) {
    bool plain = true;  // square window of stride 2 without dilation
    for (int i = 0; i < 2; ++i)
      plain = plain && p.kernel[i] == p.kernel[0] && p.stride[i] == 2 && p.dilation[i] == 1;
    // strips count their threads in 32 bits
    plain =
        plain && p.batch * p.channels * p.out_width * ceil_div(p.out_height, kStripRows) < (int64_t{1} << 31);
    if (plain && p.kernel[0] == 3 && p.padding[0] <= 1 && p.padding[1] <= 1)
      return pick_strips<T, 3>(p, stream);
    if (plain && p.kernel[0] == 2 && p.padding[0] == 0 && p.padding[1] == 0)
      return pick_strips<T, 2>(p, stream);
  }
  return launch_cells<T, uint8_t>(p, stream);
}

}  // namespace
}  // namespace conelens::cuda

extern "C" CONELENS_API int conelens_max_pool2d_with_switches_cuda(const conelens_max_pool2d_params* p,
                                                                   void* stream) {
  if (p->batch * p->channels * p->out_height * p->out_width == 0) return CONELENS_OK;
  return conelens::dispatch_dtype(
      p->dtype, [&](auto t) { return conelens::cuda::run<typename decltype(t)::type>(*p, stream); });
}
