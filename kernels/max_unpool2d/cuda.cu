// max_unpool2d and its adjoint on CUDA, in gather form: every output cell collects from the windows that
// cover it, in row-major order. 2/2 and 3/2 windows walk down strips of rows and keep the pooled row that two
// pairs of output rows share; other shapes take one thread per output cell.
#include "cuda_device.cuh"
#include "max_unpool2d.h"

namespace conelens::cuda {
namespace {

using Params = conelens_max_unpool2d_params;

CONELENS_DEVICE int64_t offset(const int64_t (&stride)[4], int64_t sample, int64_t channel) {
  return sample * stride[0] + channel * stride[1];
}

// --- any window, any strides
// ---------------------------------------------------------------------------------------

template <class T, class Switch, class Index>
__global__ void __launch_bounds__(kThreads, 4)
    unpool_cells(const __grid_constant__ Params p, bool channels_last, Index threads) {
  Index index = thread_index<Index>();
  if (index >= threads) return;
  int64_t channel = 0;
  if (channels_last) channel = take_axis(index, static_cast<Index>(p.channels));
  const int64_t x = take_axis(index, static_cast<Index>(p.out_width));
  const int64_t y = take_axis(index, static_cast<Index>(p.out_height));
  if (!channels_last) channel = take_axis(index, static_cast<Index>(p.channels));
  const int64_t sample = index;
  const unpool::Axis rows = unpool::axis(p, sample, 0), columns = unpool::axis(p, sample, 1);
  const T* pooled = static_cast<const T*>(p.pooled) + offset(p.pooled_stride, sample, channel);
  const Switch* switches =
      static_cast<const Switch*>(p.switches) + offset(p.switches_stride, sample, channel);
  Compute<T> sum = 0;
  if (y >= rows.begin && y < rows.end && x >= columns.begin && x < columns.end) {
    for (int64_t ky = rows.kernel - 1; ky >= 0; --ky) {  // taps down: pooled cells up
      const int64_t from_y = unpool::source(rows, y, ky);
      if (from_y < 0) continue;
      for (int64_t kx = columns.kernel - 1; kx >= 0; --kx) {
        const int64_t from_x = unpool::source(columns, x, kx);
        if (from_x < 0) continue;
        if (switches[from_y * p.switches_stride[2] + from_x * p.switches_stride[3]] ==
            ky * columns.kernel + kx)
          sum += widen(load_one(pooled + from_y * p.pooled_stride[2] + from_x * p.pooled_stride[3]));
      }
    }
  }
  T* out = static_cast<T*>(p.out) + offset(p.out_stride, sample, channel);
  out[y * p.out_stride[2] + x * p.out_stride[3]] = narrow<T>(p.relu ? rectify(sum) : sum);
}

template <class T, class Switch, class Index>
__global__ void __launch_bounds__(kThreads)
    gather_cells(const __grid_constant__ Params p, bool channels_last, Index threads) {
  Index index = thread_index<Index>();
  if (index >= threads) return;
  int64_t channel = 0;
  if (channels_last) channel = take_axis(index, static_cast<Index>(p.channels));
  const int64_t x = take_axis(index, static_cast<Index>(p.width));
  const int64_t y = take_axis(index, static_cast<Index>(p.height));
  if (!channels_last) channel = take_axis(index, static_cast<Index>(p.channels));
  const int64_t sample = index;
  const unpool::Axis rows = unpool::axis(p, sample, 0), columns = unpool::axis(p, sample, 1);
  const Switch* switches =
      static_cast<const Switch*>(p.switches) + offset(p.switches_stride, sample, channel);
  const int64_t tap = switches[y * p.switches_stride[2] + x * p.switches_stride[3]];
  const int64_t to_y = y * rows.stride - rows.shift + rows.dilation * (tap / columns.kernel);
  const int64_t to_x = x * columns.stride - columns.shift + columns.dilation * (tap % columns.kernel);
  const bool valid = tap >= 0 && tap < rows.kernel * columns.kernel && to_y >= rows.begin &&
                     to_y < rows.end && to_x >= columns.begin && to_x < columns.end;
  const T* grad = static_cast<const T*>(p.out) + offset(p.out_stride, sample, channel);
  T* pooled = const_cast<T*>(static_cast<const T*>(p.pooled)) + offset(p.pooled_stride, sample, channel);
  pooled[y * p.pooled_stride[2] + x * p.pooled_stride[3]] =
      valid ? grad[to_y * p.out_stride[2] + to_x * p.out_stride[3]] : narrow<T>(Compute<T>(0));
}

// --- strips: K x K windows of stride 2, dilation 1
// -----------------------------------------------------------------

constexpr int kStripRows = 4;  // pairs of output rows per thread

// Output cells come in pairs. Along y, and along x with channels_last, pair i is the cells 2i - shift (even)
// and 2i - shift + 1 (odd) with shift = padding: the even one reads pooled cell i - 1 through tap 2 and i
// through tap 0, the odd one i through tap 1. Along x in rows, pairs are the cells 2i and 2i + 1, so that
// vectors are aligned: with shift 1 the roles of even and odd swap, and the pooled cells are i and i + 1.
CONELENS_HD constexpr int term_count(int K, int swapped, int parity) {
  return K == 3 && parity == swapped ? 2 : 1;
}
CONELENS_HD constexpr bool term_is_current(int K, int swapped, int parity, int term) {
  return K == 2 || (parity == swapped ? term == 1 : swapped == 0);
}
CONELENS_HD constexpr int term_tap(int K, int swapped, int parity, int term) {
  if (K == 2) return parity;
  return parity != swapped ? 1 : (term == 0 ? 2 : 0);
}

CONELENS_HD int64_t pair_count(int64_t cells, int64_t shift) {
  return (cells + shift + 1) / 2;
}

// What one pooled row gives a thread. NCHW: V + 1 neighbouring cells; channels_last: two cells of V channels.
template <class T, int V, bool channels_last>
struct PooledRow {
  static constexpr int count = channels_last ? 2 * V : V + 1;
  T value[count];
  int tap[count];

  // element i of the previous (0) or current (1) column
  static CONELENS_DEVICE int at(int i, int current) { return channels_last ? current * V + i : i + current; }
};

struct Source {
  const void* pooled;  // first cell of the sample and channel
  const uint8_t* switches;
  bool relu, vectors;  // vectors: V neighbouring pooled cells and switches are aligned
};

template <class T, int V, int K, bool channels_last>
CONELENS_DEVICE PooledRow<T, V, channels_last> load_row(const Params& p, const Source& from, int64_t y,
                                                        int64_t first, int swapped) {
  using Row = PooledRow<T, V, channels_last>;
  Row row;
#pragma unroll
  for (int i = 0; i < Row::count; ++i) {
    row.value[i] = narrow<T>(Compute<T>(0));
    row.tap[i] = -1;
  }
  if (y < 0 || y >= p.height) return row;
  const T* pooled = static_cast<const T*>(from.pooled) + y * p.pooled_stride[2];
  const uint8_t* switches = from.switches + y * p.switches_stride[2];
  const auto take = [&](int to, int64_t x) {
    if (x < 0 || x >= p.width) return;
    row.value[to] = load_one(pooled + x * p.pooled_stride[3]);
    row.tap[to] = load_one(switches + x * p.switches_stride[3]);
  };
  if constexpr (channels_last) {
#pragma unroll
    for (int current = K == 2 ? 1 : 0; current < 2; ++current) {
      const int64_t x = first - 1 + current;
      if (x < 0 || x >= p.width) continue;
      T values[V];
      uint8_t taps[V];
      load_vector(values, pooled + x * p.pooled_stride[3]);
      load_vector(taps, switches + x * p.switches_stride[3]);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        row.value[Row::at(i, current)] = values[i];
        row.tap[Row::at(i, current)] = taps[i];
      }
    }
  } else {
    // cells first - 1 + swapped ... first + V - 1 + swapped, of which first ... first + V - 1 may be aligned
    if (from.vectors && first + V <= p.width) {
      T values[V];
      uint8_t taps[V];
      load_vector(values, pooled + first);
      load_vector(taps, switches + first);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        row.value[i + 1 - swapped] = values[i];
        row.tap[i + 1 - swapped] = taps[i];
      }
      if (K == 3) take(swapped ? V : 0, swapped ? first + V : first - 1);
    } else {
#pragma unroll
      for (int i = K == 2 ? 1 : 0; i <= V; ++i) take(i, first - 1 + swapped + i);
    }
  }
  if (K == 2 && from.relu)
#pragma unroll
    for (int i = 0; i < Row::count; ++i)
      if (widen(row.value[i]) < 0) row.value[i] = narrow<T>(Compute<T>(0));
  return row;
}

// Output cell (parity_y, parity_x) of pair i. One covering window is copied as it is; more are added in
// float.
template <class T, int V, int K, bool channels_last, int swapped_x>
CONELENS_DEVICE T collect(const PooledRow<T, V, channels_last> (&rows)[2], int i, int parity_y, int parity_x,
                          bool relu) {
  using Row = PooledRow<T, V, channels_last>;
  const T zero = narrow<T>(Compute<T>(0));
  if constexpr (K == 2) {
    const int at = Row::at(i, 1);
    return rows[1].tap[at] == parity_y * K + parity_x ? rows[1].value[at] : zero;
  } else {
    Compute<T> sum = 0;
#pragma unroll
    for (int ty = 0; ty < term_count(K, 0, parity_y); ++ty)
#pragma unroll
      for (int tx = 0; tx < term_count(K, swapped_x, parity_x); ++tx) {
        const Row& row = rows[term_is_current(K, 0, parity_y, ty)];
        const int at = Row::at(i, term_is_current(K, swapped_x, parity_x, tx));
        if (row.tap[at] == term_tap(K, 0, parity_y, ty) * K + term_tap(K, swapped_x, parity_x, tx))
          sum += widen(row.value[at]);
      }
    return narrow<T>(relu ? rectify(sum) : sum);
  }
}

template <class T, int V, int K, bool channels_last, int swapped_x, bool windowed>
__global__ void __launch_bounds__(kThreads, 2) unpool_strips(const __grid_constant__ Params p, bool vectors,
                                                             int shift_y, int shift_x, uint32_t threads) {
  uint32_t index = thread_index<uint32_t>();
  if (index >= threads) return;
  const uint32_t pairs_y = static_cast<uint32_t>(pair_count(p.out_height, shift_y));
  const uint32_t pairs_x = static_cast<uint32_t>(pair_count(p.out_width, channels_last ? shift_x : 0));
  const uint32_t groups_x = channels_last ? pairs_x : pairs_x / V;
  const uint32_t channels = static_cast<uint32_t>(channels_last ? p.channels / V : p.channels);
  const uint32_t strips = (pairs_y + kStripRows - 1) / kStripRows;
  int64_t channel, pair_x, pair_y;
  if constexpr (channels_last) {
    channel = static_cast<int64_t>(take_axis(index, channels)) * V;
    pair_x = take_axis(index, groups_x);
    pair_y = static_cast<int64_t>(take_axis(index, strips)) * kStripRows;
  } else {
    pair_x = static_cast<int64_t>(take_axis(index, groups_x)) * V;
    pair_y = static_cast<int64_t>(take_axis(index, strips)) * kStripRows;
    channel = take_axis(index, channels);
  }
  const int64_t sample = index;
  const Source from{static_cast<const T*>(p.pooled) + offset(p.pooled_stride, sample, channel),
                    static_cast<const uint8_t*>(p.switches) + offset(p.switches_stride, sample, channel),
                    p.relu != 0, vectors};
  T* out = static_cast<T*>(p.out) + offset(p.out_stride, sample, channel);
  const int64_t first_x = 2 * pair_x - (channels_last ? shift_x : 0);
  unpool::Axis rows_axis{}, columns_axis{};
  if constexpr (windowed) {
    rows_axis = unpool::axis(p, sample, 0);
    columns_axis = unpool::axis(p, sample, 1);
  }
  const auto load = [&](int64_t y) {
    return load_row<T, V, K, channels_last>(p, from, y, pair_x, swapped_x);
  };

  PooledRow<T, V, channels_last> rows[2];  // previous, current
  if constexpr (K == 3) rows[1] = load(pair_y - 1);
#pragma unroll
  for (int strip_row = 0; strip_row < kStripRows; ++strip_row, ++pair_y) {
    if (pair_y >= pairs_y) return;
    if constexpr (K == 3) rows[0] = rows[1];
    rows[1] = load(pair_y);
#pragma unroll
    for (int parity_y = 0; parity_y < 2; ++parity_y) {
      const int64_t y = 2 * pair_y - shift_y + parity_y;
      if (y < 0 || y >= p.out_height) continue;
      T cells[2 * V];  // NCHW: in order of x; channels_last: the two columns one after the other
#pragma unroll
      for (int i = 0; i < V; ++i)
#pragma unroll
        for (int parity_x = 0; parity_x < 2; ++parity_x) {
          const int to = channels_last ? parity_x * V + i : 2 * i + parity_x;
          cells[to] = collect<T, V, K, channels_last, swapped_x>(rows, i, parity_y, parity_x, from.relu);
          if constexpr (windowed) {
            const int64_t x = first_x + (channels_last ? parity_x : to);
            if (y < rows_axis.begin || y >= rows_axis.end || x < columns_axis.begin || x >= columns_axis.end)
              cells[to] = narrow<T>(Compute<T>(0));
          }
        }
      T* row = out + y * p.out_stride[2];
      if constexpr (channels_last) {
#pragma unroll
        for (int parity_x = 0; parity_x < 2; ++parity_x) {
          const int64_t x = first_x + parity_x;
          if (x < 0 || x >= p.out_width) continue;
          T column[V];
#pragma unroll
          for (int i = 0; i < V; ++i) column[i] = cells[parity_x * V + i];
          store_vector(row + x * p.out_stride[3], column);
        }
      } else {
        store_vector(row + first_x, cells);
      }
    }
  }
}

// Rows of any width and alignment: one thread per output column, so that stores are side by side.
template <class T, int K>
__global__ void __launch_bounds__(kThreads)
    unpool_columns(const __grid_constant__ Params p, int shift_y, int shift_x, uint32_t threads) {
  uint32_t index = thread_index<uint32_t>();
  if (index >= threads) return;
  const uint32_t pairs_y = static_cast<uint32_t>(pair_count(p.out_height, shift_y));
  const int64_t x = take_axis(index, static_cast<uint32_t>(p.out_width));
  int64_t pair_y =
      static_cast<int64_t>(take_axis(index, (pairs_y + kStripRows - 1) / kStripRows)) * kStripRows;
  const int64_t channel = take_axis(index, static_cast<uint32_t>(p.channels));
  const int64_t sample = index;
  const T* pooled = static_cast<const T*>(p.pooled) + offset(p.pooled_stride, sample, channel);
  const uint8_t* switches =
      static_cast<const uint8_t*>(p.switches) + offset(p.switches_stride, sample, channel);
  T* out = static_cast<T*>(p.out) + offset(p.out_stride, sample, channel) + x * p.out_stride[3];
  const unpool::Axis rows_axis = unpool::axis(p, sample, 0), columns_axis = unpool::axis(p, sample, 1);
  const bool column_inside = x >= columns_axis.begin && x < columns_axis.end;
  const int64_t pair_x = (x + shift_x) / 2;
  const bool odd = (x + shift_x) % 2 != 0;
  // column of the windows through which x reads pooled cells pair_x - 1 and pair_x, or -1
  const int column_tap[2] = {K == 3 && !odd ? 2 : -1, odd ? 1 : 0};
  Compute<T> value[2][2];  // [previous, current row][previous, current column]
  int row_tap[2][2];       // row of the window, or -1 where x gets nothing
  const auto load = [&](int64_t y) {
#pragma unroll
    for (int column = K == 2 ? 1 : 0; column < 2; ++column) {
      row_tap[1][column] = -1;
      const int64_t from = pair_x - 1 + column;
      if (column_tap[column] < 0 || y < 0 || y >= p.height || from < 0 || from >= p.width) continue;
      const int tap = load_one(switches + y * p.switches_stride[2] + from * p.switches_stride[3]);
      if (tap % K != column_tap[column]) continue;
      row_tap[1][column] = tap / K;
      value[1][column] = widen(load_one(pooled + y * p.pooled_stride[2] + from * p.pooled_stride[3]));
    }
  };
  if constexpr (K == 3) load(pair_y - 1);
  for (int strip_row = 0; strip_row < kStripRows && pair_y < pairs_y; ++strip_row, ++pair_y) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      value[0][column] = value[1][column];
      row_tap[0][column] = row_tap[1][column];
    }
    load(pair_y);
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int64_t y = 2 * pair_y - shift_y + parity;
      if (y < 0 || y >= p.out_height) continue;
      Compute<T> sum = 0;
#pragma unroll
      for (int term = 0; term < term_count(K, 0, parity); ++term) {
        const int row = term_is_current(K, 0, parity, term);
#pragma unroll
        for (int column = K == 2 ? 1 : 0; column < 2; ++column)
          if (row_tap[row][column] == term_tap(K, 0, parity, term)) sum += value[row][column];
      }
      if (!column_inside || y < rows_axis.begin || y >= rows_axis.end) sum = 0;
      out[y * p.out_stride[2]] = narrow<T>(p.relu ? rectify(sum) : sum);
    }
  }
}

// --- choice
// --------------------------------------------------------------------------------------------------------

template <class T, int V, int K, bool channels_last>
int launch_strips(const Params& p, bool vectors, void* stream) {
  const int shift_y = p.origin ? 0 : static_cast<int>(p.padding[0]);
  const int shift_x = p.origin ? 0 : static_cast<int>(p.padding[1]);
  const int64_t pairs_x = pair_count(p.out_width, channels_last ? shift_x : 0);
  const int64_t threads = p.batch * ceil_div(pair_count(p.out_height, shift_y), kStripRows) *
                          (channels_last ? p.channels / V * pairs_x : p.channels * (pairs_x / V));
  const auto start = [&](auto kernel) {
    return launch(kernel, ceil_div(threads, kThreads), kThreads, stream, p, vectors, shift_y, shift_x,
                  static_cast<uint32_t>(threads));
  };
  if (p.origin) return start(unpool_strips<T, V, K, channels_last, 0, true>);
  if constexpr (K == 3 && !channels_last)
    if (shift_x == 1) return start(unpool_strips<T, V, K, channels_last, 1, false>);
  return start(unpool_strips<T, V, K, channels_last, 0, false>);
}

template <class T, int K>
int launch_columns(const Params& p, void* stream) {
  const int shift_y = p.origin ? 0 : static_cast<int>(p.padding[0]);
  const int shift_x = p.origin ? 0 : static_cast<int>(p.padding[1]);
  const int64_t threads =
      p.batch * p.channels * p.out_width * ceil_div(pair_count(p.out_height, shift_y), kStripRows);
  return launch(unpool_columns<T, K>, ceil_div(threads, kThreads), kThreads, stream, p, shift_y, shift_x,
                static_cast<uint32_t>(threads));
}

bool is_channels_last(const int64_t (&stride)[4]) {
  return stride[1] == 1 && stride[3] != 1;
}

template <class T>
bool pooled_vectorises(const Params& p, int axis, int v) {
  return vectorises({p.pooled, p.pooled_stride, sizeof(T)}, axis, v) &&
         vectorises({p.switches, p.switches_stride, 1}, axis, v);
}

template <class T, int K>
int pick_strips(const Params& p, void* stream) {
  constexpr int full = 16 / sizeof(T);
  const Layout out{p.out, p.out_stride, sizeof(T)};
  if (is_channels_last(p.out_stride)) {
    if (p.channels % full == 0 && vectorises(out, 1, full) && pooled_vectorises<T>(p, 1, full))
      return launch_strips<T, full, K, true>(p, true, stream);
    return launch_strips<T, 1, K, true>(p, true, stream);
  }
  // a thread's stores fill 16 bytes of a row, so that a warp's are side by side
  constexpr int half = full / 2;
  if (p.out_width % full == 0 && vectorises(out, 3, full))
    return launch_strips<T, half, K, false>(p, pooled_vectorises<T>(p, 3, half), stream);
  if (half == 4 && p.out_width % half == 0 && vectorises(out, 3, half))
    return launch_strips<T, 2, K, false>(p, pooled_vectorises<T>(p, 3, 2), stream);
  return launch_columns<T, K>(p, stream);
}

template <class T, class Switch>
int launch_cells(const Params& p, bool adjoint, void* stream) {
  const int64_t cells = adjoint ? p.height * p.width : p.out_height * p.out_width;
  const int64_t threads = p.batch * p.channels * cells;
  return dispatch_index(threads, [&](auto index) {
    using Index = decltype(index);
    const auto kernel = adjoint ? gather_cells<T, Switch, Index> : unpool_cells<T, Switch, Index>;
    const bool channels_last = is_channels_last(adjoint ? p.pooled_stride : p.out_stride);
    return launch(kernel, ceil_div(threads, kThreads), kThreads, stream, p, channels_last,
                  static_cast<Index>(threads));
  });
}

template <class T>
int run(const Params& p, bool adjoint, void* stream) {
  if (p.switch_bytes == 4) return launch_cells<T, int32_t>(p, adjoint, stream);
  if constexpr (sizeof(T) < 8) {
    const int64_t shift[2] = {p.origin ? 0 : p.padding[0], p.origin ? 0 : p.padding[1]};
    // strips count their threads in 32 bits
    bool plain = !adjoint && p.batch * p.channels * p.out_height * p.out_width < (int64_t{1} << 34);
    for (int i = 0; i < 2; ++i)
      plain = plain && p.kernel[i] == p.kernel[0] && p.stride[i] == 2 && p.dilation[i] == 1;
    if (plain && p.kernel[0] == 3 && shift[0] <= 1 && shift[1] <= 1) return pick_strips<T, 3>(p, stream);
    if (plain && p.kernel[0] == 2 && shift[0] == 0 && shift[1] == 0) return pick_strips<T, 2>(p, stream);
  }
  return launch_cells<T, uint8_t>(p, adjoint, stream);
}

int dispatch(const Params& p, bool adjoint, void* stream) {
  const int64_t cells = adjoint ? p.height * p.width : p.out_height * p.out_width;
  if (p.batch * p.channels * cells == 0) return CONELENS_OK;
  return dispatch_dtype(p.dtype, [&](auto t) { return run<typename decltype(t)::type>(p, adjoint, stream); });
}

}  // namespace
}  // namespace conelens::cuda

extern "C" CONELENS_API int conelens_max_unpool2d_cuda(const conelens_max_unpool2d_params* p, void* stream) {
  return conelens::cuda::dispatch(*p, false, stream);
}

extern "C" CONELENS_API int conelens_max_unpool2d_backward_cuda(const conelens_max_unpool2d_params* p,
                                                                void* stream) {
  return conelens::cuda::dispatch(*p, true, stream);
}
