// channel_peaks on the CPU: x is read once; where columns lie side by side, only the block that held the
// maximum is read again to find it. Vectors have the same lanes on every instruction set, so sums have the
// same bits.
#include "channel_peaks.h"

#include <stdlib.h>
#include <string.h>

#include "parallel.h"
#include "simd.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using Params = conelens_channel_peaks_params;

constexpr int64_t kBlock = 1024;     // cells whose sum is taken in the compute type; blocks add in double
constexpr int64_t kGrain = 1 << 15;  // cells worth a thread

template <class E>
struct Types {
  using T = typename Element<E>::Compute;
  static constexpr int lanes = 64 / sizeof(T);
  using V = Vec<T, lanes>;
  using Mask = Vec<IntLike<T>, lanes>;

  static V load(const E* from) {
    if constexpr (sizeof(E) == sizeof(T))
      return load_vec<V>(from);
    else
      return widen<E, lanes>(reinterpret_cast<const int16_t*>(from));
  }
  static bool any(const Mask& mask) {
    IntLike<T> bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= mask[i];
    return bits != 0;
  }
};

template <class T>
T lowest() {
  return -static_cast<T>(__builtin_inf());
}

// --- columns side by side: a plane is one run of cells, or one per row ---

template <class E>
struct Plane {
  using T = typename Types<E>::T;
  using V = typename Types<E>::V;
  using Mask = typename Types<E>::Mask;
  static constexpr int lanes = Types<E>::lanes;

  T best = lowest<T>();
  const E* block = nullptr;  // where the maximum, or the first NaN, is
  int64_t block_cells = 0, block_position = 0;
  bool has_nan = false;
  double total = 0;

  template <bool sums>
  void add_block(const E* x, int64_t cells, int64_t position) {
    V top[2], sum[2] = {V{}, V{}};
    Mask nan[2] = {Mask{}, Mask{}};
    top[0] = top[1] = V{} + lowest<T>();
    int64_t i = 0;
    for (; i + 2 * lanes <= cells; i += 2 * lanes)
      for (int k = 0; k < 2; ++k) {
        const V v = Types<E>::load(x + i + k * lanes);
        top[k] = v > top[k] ? v : top[k];
        nan[k] |= v != v;
        if constexpr (sums) sum[k] += v;
      }
    T peak = lowest<T>(), tail = 0;
    bool found_nan = Types<E>::any(nan[0] | nan[1]);
    for (; i < cells; ++i) {
      const T v = Element<E>::load(x[i]);
      peak = v > peak ? v : peak;
      found_nan |= v != v;
      if constexpr (sums) tail += v;
    }
    top[0] = top[1] > top[0] ? top[1] : top[0];
    for (int lane = 0; lane < lanes; ++lane) peak = top[0][lane] > peak ? top[0][lane] : peak;
    if constexpr (sums) {
      sum[0] += sum[1];
      for (int width = lanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) sum[0][lane] += sum[0][lane + width];
      total += static_cast<double>(sum[0][0] + tail);
    }
    if (has_nan || !(found_nan || peak > best || !block)) return;
    has_nan = found_nan;
    best = peak;
    block = x, block_cells = cells, block_position = position;
  }

  void add_run(const E* x, int64_t cells, int64_t position, bool sums) {
    for (int64_t i = 0; i < cells; i += kBlock) {
      const int64_t n = cells - i < kBlock ? cells - i : kBlock;
      if (sums)
        add_block<true>(x + i, n, position + i);
      else if (!has_nan)
        add_block<false>(x + i, n, position + i);
    }
  }

  int64_t locate() const {
    int64_t i = 0;
    for (; i + lanes <= block_cells; i += lanes) {
      const V v = Types<E>::load(block + i);
      if (Types<E>::any(has_nan ? v != v : v == best)) break;
    }
    for (; i + 1 < block_cells; ++i) {
      const T v = Element<E>::load(block[i]);
      if (has_nan ? v != v : v == best) break;
    }
    return i;
  }
};

template <class E>
void plane(const Params& p, int64_t index) {
  const E* x =
      static_cast<const E*>(p.x) + index / p.channels * p.x_stride[0] + index % p.channels * p.x_stride[1];
  const bool sums = p.reduce != CONELENS_REDUCE_MAX, whole = p.x_stride[2] == p.width;
  const int64_t cells = p.height * p.width;
  Plane<E> state;
  if (whole)
    state.add_run(x, cells, 0, sums);
  else
    for (int64_t y = 0; y < p.height; ++y) state.add_run(x + y * p.x_stride[2], p.width, y * p.width, sums);
  const int64_t at = state.locate();
  p.positions[index] = static_cast<int32_t>(state.block_position + at);
  using T = typename Types<E>::T;
  E* value = static_cast<E*>(p.values) + index;
  if (!sums)
    *value = state.block[at];
  else
    *value = Element<E>::store(
        static_cast<T>(p.reduce == CONELENS_REDUCE_SUM ? state.total : state.total / cells));
}

// --- channels side by side: every cell updates what is known of each channel ---

// Channels [first, first + n) of a sample; state holds the best values, their cells, partial sums and totals.
template <class E>
void channel_range(const Params& p, int64_t sample, int64_t first, int64_t n, char* state) {
  using T = typename Types<E>::T;
  using I = IntLike<T>;
  using V = typename Types<E>::V;
  using Mask = typename Types<E>::Mask;
  constexpr int lanes = Types<E>::lanes;
  const int64_t room = (n + lanes - 1) / lanes * lanes, vectors = n / lanes * lanes;
  double* total = reinterpret_cast<double*>(state);
  T* best = reinterpret_cast<T*>(total + room);
  I* at = reinterpret_cast<I*>(best + room);
  T* part = reinterpret_cast<T*>(at + room);
  for (int64_t c = 0; c < room; ++c) best[c] = lowest<T>(), at[c] = 0, part[c] = 0, total[c] = 0;
  const bool sums = p.reduce != CONELENS_REDUCE_MAX;
  const E* origin = static_cast<const E*>(p.x) + sample * p.x_stride[0] + first;
  const int64_t cells = p.height * p.width;
  int64_t cell = 0;
  for (int64_t y = 0; y < p.height; ++y)
    for (int64_t column = 0; column < p.width; ++column, ++cell) {
      const E* x = origin + y * p.x_stride[2] + column * p.x_stride[3];
      for (int64_t c = 0; c < vectors; c += lanes) {
        const V v = Types<E>::load(x + c), old = load_vec<V>(best + c);
        const Mask take = ~(v <= old) & (old == old);  // a NaN is taken once and never left
        store_vec(best + c, take ? v : old);
        store_vec(at + c, take ? Mask{} + static_cast<I>(cell) : load_vec<Mask>(at + c));
        if (sums) store_vec(part + c, load_vec<V>(part + c) + v);
      }
      for (int64_t c = vectors; c < n; ++c) {
        const T v = Element<E>::load(x[c]);
        if (!(v <= best[c]) && best[c] == best[c]) best[c] = v, at[c] = static_cast<I>(cell);
        if (sums) part[c] += v;
      }
      if (sums && (cell % 64 == 63 || cell + 1 == cells))
        for (int64_t c = 0; c < n; ++c) total[c] += static_cast<double>(part[c]), part[c] = 0;
    }
  E* values = static_cast<E*>(p.values) + sample * p.channels + first;
  int32_t* positions = p.positions + sample * p.channels + first;
  for (int64_t c = 0; c < n; ++c) {
    positions[c] = static_cast<int32_t>(at[c]);
    const double mean = p.reduce == CONELENS_REDUCE_MEAN ? total[c] / cells : total[c];
    values[c] = Element<E>::store(sums ? static_cast<T>(mean) : best[c]);
  }
}

template <class E>
int run(const Params& p, int threads) {
  const int64_t cells = p.height * p.width;
  if (p.x_stride[3] == 1) {
    parallel_for(p.batch * p.channels, kGrain / cells, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) plane<E>(p, i);
    });
    return CONELENS_OK;
  }
  if (p.x_stride[1] != 1) return CONELENS_UNSUPPORTED_LAYOUT;
  const int64_t share = (p.channels + threads - 1) / threads, wide = share < 64 ? 64 : share;
  const int64_t ranges = p.batch >= threads ? 1 : (p.channels + wide - 1) / wide;
  const int64_t width = (p.channels + ranges - 1) / ranges;
  int code = CONELENS_OK;
  parallel_for(p.batch * ranges, kGrain / (cells * width), threads, [&](int64_t begin, int64_t end) {
    char* state = static_cast<char*>(malloc((width + 64) * 32));
    if (!state) {
      __atomic_store_n(&code, static_cast<int>(CONELENS_OUT_OF_MEMORY), __ATOMIC_RELAXED);
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % ranges * width, rest = p.channels - first;
      if (rest > 0) channel_range<E>(p, i / ranges, first, rest < width ? rest : width, state);
    }
    free(state);
  });
  return code;
}

}  // namespace

int channel_peaks(const conelens_channel_peaks_params& p, int threads) {
  return dispatch_dtype(p.dtype, [&](auto type) { return run<typename decltype(type)::type>(p, threads); });
}

}  // namespace conelens::cpu::CONELENS_ISA
