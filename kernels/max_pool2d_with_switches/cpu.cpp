// max_pool2d_with_switches on the CPU, compiled once per instruction set. Rules: README.md.
//
// One window routine serves all: it compares whole vectors of windows, which lie side by side along a row
// (columns adjacent in memory) or across channels (channels_last). Row ends that fill no vector redo a few
// windows; windows over the padding run one lane wide.
#include "dtype.h"
#include "max_pool2d_with_switches.h"
#include "parallel.h"
#include "simd.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using Params = conelens_max_pool2d_params;

// What is compared: float and double themselves; 16-bit floats as integers of the same order, so that no
// conversion is needed and twice as many fit a vector. Both zeros are 0 there and every NaN is the largest
// integer.
template <class T, int lanes>
struct Order {
  using Cell = T;
  using Key = Vec<T, lanes>;
  static CONELENS_INLINE Key key(Key value) { return value; }
  static CONELENS_INLINE Key value(Key key) { return key; }
  static CONELENS_INLINE auto is_nan(Key key) { return key != key; }
};
template <int lanes, int16_t infinity>
struct Order16 {
  using Cell = int16_t;
  using Key = Vec<int16_t, lanes>;
  static CONELENS_INLINE Key key(Key bits) {
    const Key magnitude = bits & int16_t{0x7fff}, largest = Key{} + int16_t{0x7fff};
    const Key negative = Key{} - magnitude;
    const Key ordered = bits < Key{} ? negative : bits;
    return magnitude > int16_t(infinity) ? largest : ordered;
  }
  static CONELENS_INLINE Key value(Key key) {
    const Key sign = Key{} + int16_t(-0x8000);
    const Key negative = (Key{} - key) | sign;
    return key < Key{} ? negative : key;
  }
  static CONELENS_INLINE auto is_nan(Key key) { return key == int16_t{0x7fff}; }
};
template <int lanes>
struct Order<Half, lanes> : Order16<lanes, 0x7c00> {};
template <int lanes>
struct Order<BFloat16, lanes> : Order16<lanes, 0x7f80> {};

// The cells under one tap of `lanes` neighbouring windows, whose first cells are `from`, `from + step`, ...
// step 1 and 2 use whole vector loads. Step 2 takes odd lanes from one cell earlier wherever `tap_offset`
// allows it, because even lanes read one cell too far.
template <class Cell, int lanes, int step>
CONELENS_INLINE Vec<Cell, lanes> load_tap(const Cell* from, int64_t tap_offset, int64_t any_step,
                                          bool may_overread) {
  if constexpr (lanes == 1) {
    return from[tap_offset];
  } else if constexpr (step == 1) {
    return load_vec<Vec<Cell, lanes>>(from + tap_offset);
  } else if constexpr (step == 2) {
    return may_overread ? load_second<Cell, lanes, false>(from + tap_offset)
                        : load_second<Cell, lanes, true>(from + tap_offset - 1);
  } else {
    Vec<Cell, lanes> v;
    for (int i = 0; i < lanes; ++i) v[i] = from[tap_offset + i * any_step];
    return v;
  }
}

// Taps [y0, y1) x [x0, x1) of a window of `width` taps per row.
struct Taps {
  int64_t y0, y1, x0, x1, width;
};

// The best of `lanes` windows so far. Taps come in row-major order: the first maximum wins, or else the last
// NaN.
template <class T, int lanes>
struct Peak {
  using O = Order<T, lanes>;
  using Cell = typename O::Cell;
  using Key = typename O::Key;
  using Index = std::conditional_t<lanes == 1, int32_t, Vec<IntLike<Cell>, lanes>>;
  Key best;
  Index index;

  // Rectifying the first value is enough: only larger ones replace it.
  CONELENS_INLINE void start(Key cell, int64_t tap, bool relu) {
    best = O::key(cell);
    if (relu) best = best < Key{} ? Key{} : best;
    index = broadcast(tap);
  }
  CONELENS_INLINE void compare(Key cell, int64_t tap) {
    const Key key = O::key(cell);
    const auto wins = (key > best) | O::is_nan(key);
    best = wins ? key : best;
    index = wins ? broadcast(tap) : index;
  }
  CONELENS_INLINE void store(T* pooled, uint8_t* switches8, int32_t* switches32) const {
    store_vec(pooled, O::value(best));
    if constexpr (lanes == 1) {
      if (switches32)
        *switches32 = index;
      else
        *switches8 = static_cast<uint8_t>(index);
    } else {
      using Bits = typename UintOfBytes<sizeof(Cell)>::type;
      store_vec(switches8, convert<lanes, uint8_t, Bits>((Vec<Bits, lanes>)index));
    }
  }

 private:
  static CONELENS_INLINE Index broadcast(int64_t tap) {
    if constexpr (lanes == 1)
      return static_cast<int32_t>(tap);
    else
      return Index{} + static_cast<IntLike<Cell>>(tap);
  }
};

// `load(ky, kx)` gives the cells.
template <class T, int lanes, class Load>
CONELENS_INLINE void pool_windows(const Taps& taps, bool relu, const Load& load, T* pooled,
                                  uint8_t* switches8, int32_t* switches32) {
  Peak<T, lanes> peak;
  peak.start(load(taps.y0, taps.x0), taps.y0 * taps.width + taps.x0, relu);
  for (int64_t ky = taps.y0; ky < taps.y1; ++ky)
    for (int64_t kx = taps.x0; kx < taps.x1; ++kx) peak.compare(load(ky, kx), ky * taps.width + kx);
  peak.store(pooled, switches8, switches32);
}

constexpr int64_t kBlock = 2048;  // windows of a row that wait side by side, in the first-level cache
template <class T>
constexpr int full_lanes = kVectorBytes / static_cast<int>(sizeof(T));

// --- columns side by side
// ---------------------------------------------------------------------------------------------

// Pooled columns [begin, end) whose taps all lie inside the map, and which vectors may thus do.
struct Interior {
  int64_t begin, end;
};
Interior interior(const Params& p) {
  const int64_t step = p.stride[1], padding = p.padding[1], reach = p.dilation[1] * (p.kernel[1] - 1);
  // with stride 2 even lanes read one cell past their last: with one tap per row that cell may lie past the
  // map
  const bool vectors = p.switch_bytes == 1 && (step != 2 || p.kernel[1] > 1);
  const int64_t begin = (padding + step - 1) / step;
  int64_t end = vectors && p.width + padding > reach ? (p.width - 1 + padding - reach) / step + 1 : 0;
  end = end < p.out_width ? end : p.out_width;
  return begin < end ? Interior{begin, end} : Interior{p.out_width, p.out_width};
}

// One row of pooled cells. `x` is the input map's first cell of this plane; `fixed` the taps per row, 0: any
// number.
//
// The map is read strictly row after row, by the same instructions, and the peaks so far wait in a buffer:
// reading the window's rows side by side took twice as long from memory, as prefetchers lose their way at the
// ends of short rows.
template <class T, int step, int fixed>
void pool_row(const Params& p, const Interior& inner, const T* x, int64_t row, T* pooled, void* switches) {
  using Cell = typename Order<T, 1>::Cell;
  const int64_t start_y = row * p.stride[0] - p.padding[0];
  const int64_t step_x = p.stride[1], spread = p.dilation[1], width = fixed ? fixed : p.kernel[1];
  const int64_t y0 = pool::first_tap(start_y, p.dilation[0]);
  const int64_t y1 = pool::end_tap(start_y, p.dilation[0], p.kernel[0], p.height);
  uint8_t* switches8 = p.switch_bytes == 1 ? static_cast<uint8_t*>(switches) : nullptr;
  int32_t* switches32 = p.switch_bytes == 1 ? nullptr : static_cast<int32_t*>(switches);
  const int64_t row_stride = p.x_stride[2] * p.dilation[0];
  // may lie before the map: only taps inside are read
  const Cell* first_row = reinterpret_cast<const Cell*>(x) + start_y * p.x_stride[2];

  const auto edge = [&](int64_t column) {
    const int64_t start_x = column * step_x - p.padding[1];
    const Taps taps{y0, y1, pool::first_tap(start_x, spread), pool::end_tap(start_x, spread, width, p.width),
                    width};
    const auto load = [&](int64_t ky, int64_t kx) {
      return first_row[ky * row_stride + start_x + kx * spread];
    };
    pool_windows<T, 1>(taps, p.relu, load, pooled + column, switches8 ? switches8 + column : nullptr,
                       switches32 ? switches32 + column : nullptr);
  };
  for (int64_t column = 0; column < inner.begin; ++column) edge(column);
  for (int64_t column = inner.end; column < p.out_width; ++column) edge(column);

  Cell waiting[kBlock];
  IntLike<Cell> waiting_index[kBlock];
  for (int64_t begin = inner.begin; begin < inner.end; begin += kBlock) {
    const int64_t count = inner.end - begin < kBlock ? inner.end - begin : kBlock;
    const Cell* line = first_row + y0 * row_stride + begin * step_x - p.padding[1];
    for (int64_t ky = y0; ky < y1; ++ky, line += row_stride) {
      in_vectors<full_lanes<T>>(count, [&](auto lanes, int64_t i) CONELENS_INLINE_LAMBDA {
        constexpr int n = decltype(lanes)::value;
        using P = Peak<T, n>;
        P peak;
        const auto load = [&](int64_t kx) CONELENS_INLINE_LAMBDA {
          return load_tap<Cell, n, step>(line + i * step_x, kx * spread, step_x, kx == 0);
        };
        const auto first = load(0);
        if (ky == y0) {
          peak.start(first, ky * width, p.relu);
        } else {
          peak.best = load_vec<typename P::Key>(waiting + i);
          if constexpr (n == 1)
            peak.index = waiting_index[i];
          else
            peak.index = load_vec<typename P::Index>(waiting_index + i);
        }
        peak.compare(first, ky * width);
        for (int64_t kx = 1; kx < width; ++kx) peak.compare(load(kx), ky * width + kx);
        if (ky + 1 == y1) {
          peak.store(pooled + begin + i, switches8 + begin + i, nullptr);
        } else {
          store_vec(waiting + i, peak.best);
          if constexpr (n == 1)
            waiting_index[i] = static_cast<IntLike<Cell>>(peak.index);
          else
            store_vec(waiting_index + i, peak.index);
        }
      });
    }
  }
}

template <class T, int step, int fixed>
void pool_planes(const Params& p, int threads) {
  const Interior inner = interior(p);
  const int64_t rows = p.batch * p.channels * p.out_height;
  const int64_t grain = 1 + 16384 / (p.out_width * p.kernel[0] * p.kernel[1]);
  parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % p.out_height, plane = i / p.out_height;
      const int64_t n = plane / p.channels, c = plane % p.channels;
      const T* x = static_cast<const T*>(p.x) + n * p.x_stride[0] + c * p.x_stride[1];
      T* pooled = static_cast<T*>(p.pooled) + n * p.pooled_stride[0] + c * p.pooled_stride[1] +
                  row * p.pooled_stride[2];
      const int64_t at = n * p.switches_stride[0] + c * p.switches_stride[1] + row * p.switches_stride[2];
      pool_row<T, step, fixed>(p, inner, x, row, pooled,
                               static_cast<char*>(p.switches) + at * p.switch_bytes);
    }
  });
}

// --- channels side by side
// --------------------------------------------------------------------------------------------

template <class T>
void pool_channels(const Params& p, int threads) {
  using Cell = typename Order<T, 1>::Cell;
  const int64_t cells = p.batch * p.out_height * p.out_width;
  const int64_t grain = 1 + 16384 / (p.channels * p.kernel[0] * p.kernel[1]);
  parallel_for(cells, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % p.out_width, row = i / p.out_width % p.out_height,
                    n = i / p.out_width / p.out_height;
      const int64_t start_y = row * p.stride[0] - p.padding[0], start_x = column * p.stride[1] - p.padding[1];
      const Taps taps{pool::first_tap(start_y, p.dilation[0]),
                      pool::end_tap(start_y, p.dilation[0], p.kernel[0], p.height),
                      pool::first_tap(start_x, p.dilation[1]),
                      pool::end_tap(start_x, p.dilation[1], p.kernel[1], p.width), p.kernel[1]};
      const Cell* window = static_cast<const Cell*>(p.x) + n * p.x_stride[0] + start_y * p.x_stride[2] +
                           start_x * p.x_stride[3];
      T* pooled = static_cast<T*>(p.pooled) + n * p.pooled_stride[0] + row * p.pooled_stride[2] +
                  column * p.pooled_stride[3];
      const int64_t to =
          n * p.switches_stride[0] + row * p.switches_stride[2] + column * p.switches_stride[3];
      uint8_t* switches8 = p.switch_bytes == 1 ? static_cast<uint8_t*>(p.switches) + to : nullptr;
      int32_t* switches32 = p.switch_bytes == 1 ? nullptr : static_cast<int32_t*>(p.switches) + to;
      const auto at = [&](auto lanes, int64_t c) {
        constexpr int count = decltype(lanes)::value;
        const auto load = [&](int64_t ky, int64_t kx) {
          return load_vec<Vec<Cell, count>>(window + ky * p.dilation[0] * p.x_stride[2] +
                                            kx * p.dilation[1] * p.x_stride[3] + c);
        };
        pool_windows<T, count>(taps, p.relu, load, pooled + c, switches8 ? switches8 + c : nullptr,
                               switches32 ? switches32 + c : nullptr);
      };
      if (switches32)
        for (int64_t c = 0; c < p.channels; ++c) at(Lanes<1>{}, c);
      else
        in_vectors<full_lanes<T>>(p.channels, at);
    }
  });
}

template <class T>
int pool(const Params& p, int threads) {
  if (p.x_stride[3] == 1 && p.pooled_stride[3] == 1 && p.switches_stride[3] == 1) {
    const int64_t width = p.kernel[1];
    if (p.stride[1] == 1) {
      width == 3 ? pool_planes<T, 1, 3>(p, threads) : pool_planes<T, 1, 0>(p, threads);
    } else if (p.stride[1] == 2) {
      width == 2   ? pool_planes<T, 2, 2>(p, threads)
      : width == 3 ? pool_planes<T, 2, 3>(p, threads)
                   : pool_planes<T, 2, 0>(p, threads);
    } else {
      pool_planes<T, 0, 0>(p, threads);
    }
    return CONELENS_OK;
  }
  if (p.x_stride[1] == 1 && p.pooled_stride[1] == 1 && p.switches_stride[1] == 1) {
    pool_channels<T>(p, threads);
    return CONELENS_OK;
  }
  return CONELENS_UNSUPPORTED_LAYOUT;
}

}  // namespace

int max_pool2d_with_switches(const Params& p, int threads) {
  return dispatch_dtype(p.dtype, [&](auto type) { return pool<typename decltype(type)::type>(p, threads); });
}

}  // namespace conelens::cpu::CONELENS_ISA
