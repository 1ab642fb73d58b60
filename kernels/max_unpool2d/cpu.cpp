// max_unpool2d on the CPU, compiled once per instruction set. Rules: README.md.
//
// Gather form: every output cell collects the pooled cells that reach it, in row-major order, so the sum has
// one order and nothing is written twice. Rows are made from whole vectors of pooled cells: with stride 2
// their even and odd output cells are computed apart and interleaved; with channels_last a vector holds
// channels of one cell.
#include "dtype.h"
#include "max_unpool2d.h"
#include "parallel.h"
#include "simd.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using Params = conelens_max_unpool2d_params;
using unpool::Axis;

constexpr int64_t kGrain = 16384;  // output cells from which a thread is worth waking

// --- sums: of values in their own type, of halves in float, or of halves as bits where windows cannot
// overlap --------

template <class T, int n, bool overlap>
struct Sum {  // float, double
  using Cell = T;
  using Lane = T;
  using V = Vec<T, n>;
  static CONELENS_INLINE V load(const T* from) { return load_vec<V>(from); }
  static CONELENS_INLINE V add(V sum, V value) { return sum + value; }
  static CONELENS_INLINE V rectify(V sum) { return sum < V{} ? V{} : sum; }
  static CONELENS_INLINE V result(V sum) { return sum; }
};

template <int n, int16_t infinity>
struct SumBits {
  using Cell = int16_t;
  using Lane = int16_t;
  using V = Vec<int16_t, n>;
  static CONELENS_INLINE V load(const int16_t* from) { return load_vec<V>(from); }
  static CONELENS_INLINE V add(V sum, V value) { return sum | value; }  // at most one is not zero
  static CONELENS_INLINE V rectify(V bits) {
    const V magnitude = bits & int16_t{0x7fff};
    return (bits < V{}) & (magnitude <= int16_t(infinity)) ? V{} : bits;
  }
  static CONELENS_INLINE V result(V sum) { return sum; }
};
template <int n>
struct Sum<Half, n, false> : SumBits<n, 0x7c00> {};
template <int n>
struct Sum<BFloat16, n, false> : SumBits<n, 0x7f80> {};

template <class T, int n>
struct SumFloat {
  using Cell = int16_t;
  using Lane = float;
  using V = Vec<float, n>;
  static CONELENS_INLINE V load(const int16_t* from) { return widen<T, n>(from); }
  static CONELENS_INLINE V add(V sum, V value) { return sum + value; }
  static CONELENS_INLINE V rectify(V sum) { return sum < V{} ? V{} : sum; }
  static CONELENS_INLINE Vec<int16_t, n> result(V sum) { return narrow<T, n>(sum); }
};
template <int n>
struct Sum<Half, n, true> : SumFloat<Half, n> {};
template <int n>
struct Sum<BFloat16, n, true> : SumFloat<BFloat16, n> {};

template <class T, bool overlap>
constexpr int full_lanes = kVectorBytes / static_cast<int>(sizeof(typename Sum<T, 1, overlap>::Lane));

// sum + (switch == tap ? value : 0)
template <class S, int n>
CONELENS_INLINE typename S::V collect(typename S::V sum, const typename S::Cell* pooled,
                                      const uint8_t* switches, int64_t tap) {
  using Index = Vec<IntLike<typename S::Lane>, n>;
  using V = typename S::V;
  using Bits = typename UintOfBytes<sizeof(typename S::Lane)>::type;
  const Index here = (Index)convert<n, Bits, uint8_t>(load_vec<Vec<uint8_t, n>>(switches));
  const V value = S::load(pooled);
  return S::add(sum, here == static_cast<IntLike<typename S::Lane>>(tap) ? value : V{});
}

// --- switches that point nowhere
// --------------------------------------------------------------------------------------

// Windows [begin, end) along an axis have all their taps inside the map.
struct Interior {
  int64_t begin, end;
};
Interior interior(const Axis& a) {
  const int64_t reach = a.dilation * (a.kernel - 1);
  const int64_t begin = (a.begin + a.shift + a.stride - 1) / a.stride;
  const int64_t end = a.end + a.shift > reach ? (a.end + a.shift - reach - 1) / a.stride + 1 : 0;
  return {begin, end < a.pooled ? end : a.pooled};
}

// `count` neighbouring switches of one row all name a tap. One reduction, which compilers vectorise.
template <class Switch>
bool all_in_window(const Switch* switches, int64_t count, int64_t taps) {
  Switch smallest = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    smallest = switches[i] < smallest ? switches[i] : smallest;
    largest = switches[i] > largest ? switches[i] : largest;
  }
  return smallest >= 0 && largest < taps;
}

// Switches that are whole rows of pooled cells: `lines` of them lie at sample, channel and row of their
// number.
template <class Switch>
struct SwitchCheck {
  const Params& p;
  const bool channels_last = p.switches_stride[1] == 1 && p.switches_stride[3] != 1;
  const int64_t channels = channels_last ? 1 : p.channels;  // lines per sample and row
  const int64_t lines = p.batch * channels * p.height;
  const Axis rows = unpool::axis(p, 0, 0), columns = unpool::axis(p, 0, 1);  // used without origin only
  const Interior inner_rows = interior(rows), inner_columns = interior(columns);

  explicit SwitchCheck(const Params& params) : p(params) {}

  bool points_into_map(int64_t y, int64_t x, Switch tap) const {
    const int64_t row = y * rows.stride - rows.shift + tap / columns.kernel * rows.dilation;
    const int64_t column = x * columns.stride - columns.shift + tap % columns.kernel * columns.dilation;
    return row >= rows.begin && row < rows.end && column >= columns.begin && column < columns.end;
  }

  bool line_valid(int64_t line) const {
    const int64_t y = line % p.height, c = line / p.height % channels, n = line / p.height / channels;
    const Switch* at = static_cast<const Switch*>(p.switches) + n * p.switches_stride[0] +
                       c * p.switches_stride[1] + y * p.switches_stride[2];
    const int64_t step = p.switches_stride[3], depth = channels_last ? p.channels : 1;
    const int64_t taps = p.kernel[0] * p.kernel[1];
    bool valid = true;
    if (channels_last)
      for (int64_t x = 0; x < p.width; ++x) valid &= all_in_window(at + x * step, depth, taps);
    else
      valid = all_in_window(at, p.width, taps);
    if (!valid || p.origin) return valid;
    const bool edge_row = y < inner_rows.begin || y >= inner_rows.end;
    const int64_t skip_from = edge_row ? p.width : inner_columns.begin, skip_to = inner_columns.end;
    for (int64_t x = 0; x < p.width; ++x) {
      if (x == skip_from && skip_from < skip_to) x = skip_to;
      if (x >= p.width) break;
      for (int64_t k = 0; k < depth; ++k) valid &= points_into_map(y, x, at[x * step + k]);
    }
    return valid;
  }

  // the check of lines [part * lines / parts, (part + 1) * lines / parts): each once over all parts
  bool part_valid(int64_t part, int64_t parts) const {
    bool valid = true;
    for (int64_t line = part * lines / parts; line < (part + 1) * lines / parts; ++line)
      valid &= line_valid(line);
    return valid;
  }
};

// --- one cell, any geometry: edges, rare strides, int32 switches
// ------------------------------------------------------

template <class T>
T collect_cell(const Params& p, const Axis& rows, const Axis& columns, const T* pooled, const void* switches,
               int64_t row, int64_t column) {
  using E = Element<T>;
  typename E::Compute sum = 0;
  for (int64_t ky = rows.kernel - 1; ky >= 0; --ky) {
    const int64_t y = unpool::source(rows, row, ky);
    if (y < 0) continue;
    for (int64_t kx = columns.kernel - 1; kx >= 0; --kx) {
      const int64_t x = unpool::source(columns, column, kx);
      if (x < 0) continue;
      const int64_t at = y * p.switches_stride[2] + x * p.switches_stride[3], tap = ky * columns.kernel + kx;
      const int64_t here = p.switch_bytes == 1 ? static_cast<const uint8_t*>(switches)[at]
                                               : static_cast<const int32_t*>(switches)[at];
      if (here == tap) sum += E::load(pooled[y * p.pooled_stride[2] + x * p.pooled_stride[3]]);
    }
  }
  if (p.relu && sum < 0) sum = 0;
  return E::store(sum);
}

// --- columns side by side
// ---------------------------------------------------------------------------------------------

// The pooled rows that reach an output row, upper first, with the first tap of that row of the window.
struct Source {
  int64_t pooled, switches, tap;  // offsets of the pooled row and its switches
};
constexpr int kMaxSources = 16;

// Upper bound of the windows that reach one output cell along an axis: its taps, or fewer where windows move
// on faster.
int64_t most_sources(const Params& p, int axis) {
  const int64_t reach = p.dilation[axis] * (p.kernel[axis] - 1) / p.stride[axis] + 1;
  return reach < p.kernel[axis] ? reach : p.kernel[axis];
}

int find_sources(const Params& p, const Axis& rows, const Axis& columns, int64_t row, Source* sources) {
  int count = 0;
  for (int64_t ky = rows.kernel - 1; ky >= 0; --ky) {
    const int64_t y = unpool::source(rows, row, ky);
    if (y >= 0) sources[count++] = {y * p.pooled_stride[2], y * p.switches_stride[2], ky * columns.kernel};
  }
  return count;
}

// Output cells that pooled columns [first, first + n) make with stride 2: columns 2 * first - shift onwards.
template <class T, int n, int width, bool overlap>
CONELENS_INLINE void stride2_cells(const Source* sources, int count, bool relu, const void* pooled,
                                   const uint8_t* switches, int64_t first,
                                   typename Sum<T, n, overlap>::Cell* out) {
  using S = Sum<T, n, overlap>;
  typename S::V even{}, odd{};
  for (int i = 0; i < count; ++i) {
    const auto* values = static_cast<const typename S::Cell*>(pooled) + sources[i].pooled + first;
    const uint8_t* here = switches + sources[i].switches + first;
    if constexpr (width == 3) even = collect<S, n>(even, values - 1, here - 1, sources[i].tap + 2);
    even = collect<S, n>(even, values, here, sources[i].tap);
    odd = collect<S, n>(odd, values, here, sources[i].tap + 1);
  }
  if (relu) even = S::rectify(even), odd = S::rectify(odd);
  store_alternate<typename S::Cell, n>(out, S::result(even), S::result(odd));
}

// Output cells from column `first + shift`..., stride 1: pooled column = output column + shift - dilation *
// kx.
template <class T, int n>
CONELENS_INLINE void stride1_cells(const Source* sources, int count, bool relu, const void* pooled,
                                   const uint8_t* switches, const Axis& columns, int64_t column,
                                   typename Sum<T, n, true>::Cell* out) {
  using S = Sum<T, n, true>;
  typename S::V sum{};
  for (int i = 0; i < count; ++i)
    for (int64_t kx = columns.kernel - 1; kx >= 0; --kx) {
      const int64_t x = column + columns.shift - columns.dilation * kx;
      sum = collect<S, n>(sum, static_cast<const typename S::Cell*>(pooled) + sources[i].pooled + x,
                          switches + sources[i].switches + x, sources[i].tap + kx);
    }
  if (relu) sum = S::rectify(sum);
  store_vec(out, S::result(sum));
}

// Output column `column`, one lane wide, where a whole vector does not fit.
template <class T, int step>
T edge_cell(const Params& p, const Source* sources, int count, const Axis& columns, const T* pooled,
            const uint8_t* switches, int64_t column) {
  using E = Element<T>;
  typename E::Compute sum = 0;
  for (int i = 0; i < count; ++i)
    for (int64_t kx = columns.kernel - 1; kx >= 0; --kx) {
      const int64_t offset = column + columns.shift - columns.dilation * kx;
      if (offset < 0 || offset % step != 0 || offset / step >= columns.pooled) continue;
      const int64_t x = offset / step;
      if (switches[sources[i].switches + x] == sources[i].tap + kx)
        sum += E::load(pooled[sources[i].pooled + x]);
    }
  if (p.relu && sum < 0) sum = 0;
  return E::store(sum);
}

// Output row in vectors of stride-2 pairs; cells that no whole vector reaches are done one by one.
template <class T, int width, bool overlap>
void stride2_row(const Params& p, const Axis& rows, const Axis& columns, const T* pooled,
                 const void* switches, int64_t row, T* out) {
  using Cell = typename Sum<T, 1, overlap>::Cell;
  const uint8_t* here = static_cast<const uint8_t*>(switches);
  Source sources[kMaxSources];
  const int count = find_sources(p, rows, columns, row, sources);
  // pooled columns [first, last) whose two cells lie in the map and whose left neighbour exists where it is
  // read
  int64_t first = (columns.begin + columns.shift + 1) / 2, last = (columns.end + columns.shift) / 2;
  first = first < width - 2 ? width - 2 : first;
  last = last < columns.pooled ? last : columns.pooled;
  last = last < first ? first : last;
  const int64_t head = first < last ? 2 * first - columns.shift : columns.end;
  const int64_t tail = first < last ? 2 * last - columns.shift : columns.end;
  for (int64_t x = columns.begin; x < head; ++x)
    out[x] = edge_cell<T, 2>(p, sources, count, columns, pooled, here, x);
  in_vectors<full_lanes<T, overlap>>(last - first, [&](auto lanes, int64_t i) {
    stride2_cells<T, decltype(lanes)::value, width, overlap>(
        sources, count, p.relu, pooled, here, first + i,
        reinterpret_cast<Cell*>(out) + 2 * (first + i) - columns.shift);
  });
  for (int64_t x = tail; x < columns.end; ++x)
    out[x] = edge_cell<T, 2>(p, sources, count, columns, pooled, here, x);
}

template <class T>
void stride1_row(const Params& p, const Axis& rows, const Axis& columns, const T* pooled,
                 const void* switches, int64_t row, T* out) {
  using Cell = typename Sum<T, 1, true>::Cell;
  const uint8_t* here = static_cast<const uint8_t*>(switches);
  Source sources[kMaxSources];
  const int count = find_sources(p, rows, columns, row, sources);
  // output columns [first, last) that the whole window reaches
  int64_t first = columns.dilation * (columns.kernel - 1) - columns.shift,
          last = columns.pooled - columns.shift;
  first = first < columns.begin ? columns.begin : first;
  last = last < columns.end ? last : columns.end;
  if (first >= last) first = last = columns.end;
  for (int64_t x = columns.begin; x < first; ++x)
    out[x] = edge_cell<T, 1>(p, sources, count, columns, pooled, here, x);
  in_vectors<full_lanes<T, true>>(last - first, [&](auto lanes, int64_t i) {
    stride1_cells<T, decltype(lanes)::value>(sources, count, p.relu, pooled, here, columns, first + i,
                                             reinterpret_cast<Cell*>(out) + first + i);
  });
  for (int64_t x = last; x < columns.end; ++x)
    out[x] = edge_cell<T, 1>(p, sources, count, columns, pooled, here, x);
}

template <class T>
void any_row(const Params& p, const Axis& rows, const Axis& columns, const T* pooled, const void* switches,
             int64_t row, T* out) {
  for (int64_t x = columns.begin; x < columns.end; ++x)
    out[x] = collect_cell(p, rows, columns, pooled, switches, row, x);
}

template <class T>
using RowFunction = void (*)(const Params&, const Axis&, const Axis&, const T*, const void*, int64_t, T*);

template <class T>
RowFunction<T> row_function(const Params& p) {
  // a vector's two cells per pooled column hold exactly taps 0 and 1 (and 2 of the left neighbour)
  const bool few = p.switch_bytes == 1 && most_sources(p, 0) <= kMaxSources;
  if (few && p.stride[1] == 2 && p.dilation[1] == 1 && p.kernel[1] == 2)
    return most_sources(p, 0) > 1 ? stride2_row<T, 2, true> : stride2_row<T, 2, false>;
  if (few && p.stride[1] == 2 && p.dilation[1] == 1 && p.kernel[1] == 3) return stride2_row<T, 3, true>;
  if (few && p.stride[1] == 1) return stride1_row<T>;
  return any_row<T>;
}

template <class T, class Switch>
bool unpool_planes(const Params& p, int threads) {
  const RowFunction<T> make_row = row_function<T>(p);
  const SwitchCheck<Switch> check(p);
  int invalid = 0;
  const int64_t lines = p.batch * p.channels * p.out_height;
  parallel_for(lines, 1 + kGrain / (p.out_width + 1), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!check.part_valid(i, lines)) __atomic_store_n(&invalid, 1, __ATOMIC_RELAXED);
      const int64_t row = i % p.out_height, plane = i / p.out_height;
      const int64_t n = plane / p.channels, c = plane % p.channels;
      const Axis rows = unpool::axis(p, n, 0);
      Axis columns = unpool::axis(p, n, 1);
      T* out = static_cast<T*>(p.out) + n * p.out_stride[0] + c * p.out_stride[1] + row * p.out_stride[2];
      if (row < rows.begin || row >= rows.end) columns.begin = columns.end = 0;
      std::memset(out, 0, columns.begin * sizeof(T));
      std::memset(out + columns.end, 0, (p.out_width - columns.end) * sizeof(T));
      const T* pooled = static_cast<const T*>(p.pooled) + n * p.pooled_stride[0] + c * p.pooled_stride[1];
      const int64_t at = n * p.switches_stride[0] + c * p.switches_stride[1];
      make_row(p, rows, columns, pooled, static_cast<const Switch*>(p.switches) + at, row, out);
    }
  });
  return !invalid;
}

// --- channels side by side
// --------------------------------------------------------------------------------------------

template <class T, bool overlap>
bool unpool_channels(const Params& p, int threads) {
  using Cell = typename Sum<T, 1, overlap>::Cell;
  const SwitchCheck<uint8_t> check(p);
  int invalid = 0;
  const int64_t lines = p.batch * p.out_height;
  parallel_for(lines, 1 + kGrain / (p.out_width * p.channels + 1), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!check.part_valid(i, lines)) __atomic_store_n(&invalid, 1, __ATOMIC_RELAXED);
      const int64_t row = i % p.out_height, n = i / p.out_height;
      const Axis rows = unpool::axis(p, n, 0), columns = unpool::axis(p, n, 1);
      const Cell* pooled = static_cast<const Cell*>(p.pooled) + n * p.pooled_stride[0];
      const uint8_t* switches = static_cast<const uint8_t*>(p.switches) + n * p.switches_stride[0];
      for (int64_t column = 0; column < p.out_width; ++column) {
        Cell* out = static_cast<Cell*>(p.out) + n * p.out_stride[0] + row * p.out_stride[2] +
                    column * p.out_stride[3];
        const bool inside =
            row >= rows.begin && row < rows.end && column >= columns.begin && column < columns.end;
        Source sources[kMaxSources];
        int count = 0;
        for (int64_t ky = rows.kernel - 1; inside && ky >= 0; --ky) {
          const int64_t y = unpool::source(rows, row, ky);
          for (int64_t kx = columns.kernel - 1; y >= 0 && kx >= 0; --kx) {
            const int64_t x = unpool::source(columns, column, kx);
            if (x >= 0)
              sources[count++] = {y * p.pooled_stride[2] + x * p.pooled_stride[3],
                                  y * p.switches_stride[2] + x * p.switches_stride[3],
                                  ky * columns.kernel + kx};
          }
        }
        in_vectors<full_lanes<T, overlap>>(p.channels, [&](auto lanes, int64_t c) {
          constexpr int lane_count = decltype(lanes)::value;
          using S = Sum<T, lane_count, overlap>;
          typename S::V sum{};
          for (int s = 0; s < count; ++s)
            sum = collect<S, lane_count>(sum, pooled + sources[s].pooled + c,
                                         switches + sources[s].switches + c, sources[s].tap);
          if (p.relu) sum = S::rectify(sum);
          store_vec(out + c, S::result(sum));
        });
      }
    }
  });
  return !invalid;
}

// Any strides, one cell at a time: wide windows in channels_last.
template <class T, class Switch>
bool unpool_cells(const Params& p, int threads) {
  const SwitchCheck<Switch> check(p);
  int invalid = 0;
  const int64_t planes = p.batch * p.channels;
  parallel_for(
      planes, 1 + kGrain / (p.out_height * p.out_width + 1), threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (!check.part_valid(i, planes)) __atomic_store_n(&invalid, 1, __ATOMIC_RELAXED);
          const int64_t n = i / p.channels, c = i % p.channels;
          const Axis rows = unpool::axis(p, n, 0), columns = unpool::axis(p, n, 1);
          const T* pooled = static_cast<const T*>(p.pooled) + n * p.pooled_stride[0] + c * p.pooled_stride[1];
          const Switch* switches =
              static_cast<const Switch*>(p.switches) + n * p.switches_stride[0] + c * p.switches_stride[1];
          T* out = static_cast<T*>(p.out) + n * p.out_stride[0] + c * p.out_stride[1];
          for (int64_t row = 0; row < p.out_height; ++row)
            for (int64_t column = 0; column < p.out_width; ++column) {
              const bool inside =
                  row >= rows.begin && row < rows.end && column >= columns.begin && column < columns.end;
              out[row * p.out_stride[2] + column * p.out_stride[3]] =
                  inside ? collect_cell(p, rows, columns, pooled, switches, row, column)
                         : Element<T>::store(0);
            }
        }
      });
  return !invalid;
}

template <class T, class Switch>
int unpool_all(const Params& p, int threads) {
  const int64_t overlaps = most_sources(p, 0) * most_sources(p, 1);
  bool valid = true;
  if (p.pooled_stride[3] == 1 && p.switches_stride[3] == 1 && p.out_stride[3] == 1)
    valid = unpool_planes<T, Switch>(p, threads);
  else if (p.pooled_stride[1] != 1 || p.switches_stride[1] != 1 || p.out_stride[1] != 1)
    return CONELENS_UNSUPPORTED_LAYOUT;
  else if (sizeof(Switch) != 1 || overlaps > kMaxSources)
    valid = unpool_cells<T, Switch>(p, threads);
  else if (overlaps > 1)
    valid = unpool_channels<T, true>(p, threads);
  else
    valid = unpool_channels<T, false>(p, threads);
  return valid ? CONELENS_OK : CONELENS_INVALID_SWITCH;
}

}  // namespace

int max_unpool2d(const Params& p, int threads) {
  return dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return p.switch_bytes == 1 ? unpool_all<T, uint8_t>(p, threads) : unpool_all<T, int32_t>(p, threads);
  });
}

}  // namespace conelens::cpu::CONELENS_ISA
