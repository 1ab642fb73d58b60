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

// Compares the taps in row-major order: the first maximum wins, or else the last NaN. `load(ky, kx)` gives
// the cells. Rectifying the first value is enough: only larger ones replace it.
template <class T, int lanes, int fixed_width, class Load>
CONELENS_INLINE void pool_windows(const Taps& taps, bool relu, const Load& load, T* pooled,
                                  uint8_t* switches8, int32_t* switches32) {
  using O = Order<T, lanes>;
  using Cell = typename O::Cell;
  using Key = typename O::Key;
  using Index = Vec<IntLike<Cell>, lanes>;
  const int64_t width = fixed_width ? fixed_width : taps.width;
  Key best = O::key(load(taps.y0, taps.x0));
  if (relu) best = best < Key{} ? Key{} : best;
  Index index = Index{} + static_cast<IntLike<Cell>>(taps.y0 * width + taps.x0);
  int32_t wide_index = static_cast<int32_t>(taps.y0 * width + taps.x0);
  for (int64_t ky = taps.y0; ky < taps.y1; ++ky) {
    for (int64_t kx = taps.x0; kx < taps.x1; ++kx) {
      const Key key = O::key(load(ky, kx));
      const auto wins = (key > best) | O::is_nan(key);
      best = wins ? key : best;
      if constexpr (lanes == 1) {
        wide_index = wins ? static_cast<int32_t>(ky * width + kx) : wide_index;
      } else {
        const Index tap = Index{} + static_cast<IntLike<Cell>>(ky * width + kx);
        index = wins ? tap : index;
      }
    }
  }
  store_vec(pooled, O::value(best));
  if constexpr (lanes == 1) {
    if (switches32)
      *switches32 = wide_index;
    else
      *switches8 = static_cast<uint8_t>(wide_index);
  } else {
    using Bits = typename UintOfBytes<sizeof(Cell)>::type;
    store_vec(switches8, convert<lanes, uint8_t, Bits>((Vec<Bits, lanes>)index));
  }
}

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

// One row of pooled cells. `x` is the input map's first cell of this plane.
template <class T, int step, int fixed_width>
void pool_row(const Params& p, const Interior& inner, const T* x, int64_t row, T* pooled, void* switches) {
  using Cell = typename Order<T, 1>::Cell;
  const int64_t start_y = row * p.stride[0] - p.padding[0];
  const int64_t step_x = p.stride[1], spread = p.dilation[1], width = fixed_width ? fixed_width : p.kernel[1];
  const Taps all{pool::first_tap(start_y, p.dilation[0]),
                 pool::end_tap(start_y, p.dilation[0], p.kernel[0], p.height), 0, width, width};
  uint8_t* switches8 = p.switch_bytes == 1 ? static_cast<uint8_t*>(switches) : nullptr;
  int32_t* switches32 = p.switch_bytes == 1 ? nullptr : static_cast<int32_t*>(switches);
  const Cell* map = reinterpret_cast<const Cell*>(x);
  const int64_t row_stride = p.x_stride[2] * p.dilation[0];
  const Cell* first_row = map + start_y * p.x_stride[2];  // may lie before the map: only taps inside are read

  const auto at = [&](auto lanes, int64_t column, const Taps& taps) {
    constexpr int n = decltype(lanes)::value;
    const int64_t start_x = column * step_x - p.padding[1];
    const auto load = [&](int64_t ky, int64_t kx) {
      return load_tap<Cell, n, step>(first_row + ky * row_stride + start_x, kx * spread, step_x, kx == 0);
    };
    pool_windows<T, n, fixed_width>(taps, p.relu, load, pooled + column,
                                    switches8 ? switches8 + column : nullptr,
                                    switches32 ? switches32 + column : nullptr);
  };
  const auto edge = [&](int64_t column) {
    const int64_t start_x = column * step_x - p.padding[1];
    Taps taps = all;
    taps.x0 = pool::first_tap(start_x, spread);
    taps.x1 = pool::end_tap(start_x, spread, width, p.width);
    at(Lanes<1>{}, column, taps);
  };
  for (int64_t column = 0; column < inner.begin; ++column) edge(column);
  in_vectors<full_lanes<T>>(inner.end - inner.begin,
                            [&](auto lanes, int64_t i) { at(lanes, inner.begin + i, all); });
  for (int64_t column = inner.end; column < p.out_width; ++column) edge(column);
}

template <class T, int step, int fixed_width>
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
      pool_row<T, step, fixed_width>(p, inner, x, row, pooled,
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
        pool_windows<T, count, 0>(taps, p.relu, load, pooled + c, switches8 ? switches8 + c : nullptr,
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
