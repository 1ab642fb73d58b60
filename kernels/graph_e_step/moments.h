// The two loops over cells of graph_e_step on the CPU. Compiled once per instruction set.
#pragma once

#include "vector_math.h"

namespace conelens {
namespace {  // internal linkage: each ISA's objects keep their own copy

// One channel of one image, and the tables of its nodes. Nodes are padded to whole (half) vectors, columns to
// whole vectors. Only the box of lit cells is filled in.
template <class T>
struct Channel {
  int64_t nodes, padded_nodes, width, padded_width;
  int64_t top, bottom, left, right;  // the box of lit cells: rows [top, bottom), columns [left, right)
  T tau, start[2], step[2];
  T *mean[2], *narrow;     // [padded_nodes]: (y, x), and what makes a distance the root of an exponent of 2
  T* weight;               // [padded_nodes]
  T *rows, *columns;       // [height, padded_nodes], [padded_width, padded_nodes]: Gaussians along y and x
  T* across;               // [padded_nodes, padded_width]: columns, transposed
  T* weighted;             // rows times weight
  T *activity, *evidence;  // [height, padded_width]: F, and F over the sum of all densities
  uint32_t* lit;           // [height, vectors of a row]: bit i for column i of a vector
  T* below;                // [padded_width, padded_nodes]: evidence summed down the columns, weighted
  T *mass, *first[2], *second, *score;  // [padded_nodes]
  IntLike<T>* position;                 // [padded_nodes]

  T coordinate(int axis, int64_t cell) const { return start[axis] + step[axis] * static_cast<T>(cell); }
};

// --- evidence: sums of densities as a product of rows and columns, a vector of columns at a time ---

constexpr int kRows = 7;  // at once, as maps have 7, 14, 28 ... of them

// F log(sum of densities) of `count` rows from `y` on, columns of vector `x`
template <class T, int count>
Vec<T, kLanes<T>> evidence_of_rows(const Channel<T>& c, int64_t y, int64_t x) {
  using V = Vec<T, kLanes<T>>;
  V total[count];
  for (int i = 0; i < count; ++i) total[i] = V{} + c.tau;
  const T* weighted = c.weighted + y * c.padded_nodes;
  const T* across = c.across + x;
  for (int64_t k = 0; k < c.nodes; ++k, across += c.padded_width) {
    const V column = load_vec<V>(across);
    for (int i = 0; i < count; ++i)
      total[i] = multiply_add<V>(weighted[i * c.padded_nodes + k], column, total[i]);
  }
  V likelihood = V{};
  for (int i = 0; i < count; ++i) {
    const int64_t at = (y + i) * c.padded_width + x;
    const V activity = load_vec<V>(c.activity + at);
    store_vec(c.evidence + at, total[i] >= FloatFormat<T>::tiny ? activity / total[i] : V{});
    likelihood += activity != T{0} ? activity * log(total[i]) : V{};
  }
  return likelihood;
}

template <class T, int count = kRows>
Vec<T, kLanes<T>> evidence_of_some_rows(const Channel<T>& c, int64_t rows, int64_t y, int64_t x) {
  if constexpr (count > 1)
    if (rows < count) return evidence_of_some_rows<T, count - 1>(c, rows, y, x);
  return evidence_of_rows<T, count>(c, y, x);
}

template <class T>
T find_evidence(const Channel<T>& c) {
  constexpr int lanes = kLanes<T>;
  const int64_t vectors = c.padded_width / lanes;
  Vec<T, lanes> likelihood = {};
  for (int64_t y = c.top; y < c.bottom; y += kRows) {
    const int64_t rows = c.bottom - y < kRows ? c.bottom - y : kRows;
    for (int64_t v = c.left / lanes; v * lanes < c.right; ++v) {
      uint32_t any = 0;
      for (int64_t i = 0; i < rows; ++i) any |= c.lit[(y + i) * vectors + v];
      if (any) likelihood += evidence_of_some_rows(c, rows, y, v * lanes);
    }
  }
  T sum = 0;
  for (int i = 0; i < lanes; ++i) sum += likelihood[i];
  return sum;
}

// --- moments: nodes side by side, lit cells one after the other ---

// `full` vectors and perhaps half a one, of T
template <class T, int full, bool half>
struct Pack {
  using V = Vec<T, kLanes<T>>;
  using Half = Vec<T, kHalfLanes<T>>;
  V v[full + 1];  // the last one is not used
  Half h;

  CONELENS_INLINE static Pack load(const T* from) {
    Pack pack;
    for (int i = 0; i < full; ++i) pack.v[i] = load_vec<V>(from + i * kLanes<T>);
    if constexpr (half) pack.h = load_vec<Half>(from + full * kLanes<T>);
    return pack;
  }
  CONELENS_INLINE void store(T* to) const {
    for (int i = 0; i < full; ++i) store_vec(to + i * kLanes<T>, v[i]);
    if constexpr (half) store_vec(to + full * kLanes<T>, h);
  }
  CONELENS_INLINE static Pack zero() {
    return map([](auto x) CONELENS_INLINE_LAMBDA { return decltype(x){}; }, Pack{});
  }
  template <class Op, class... Packs>
  CONELENS_INLINE static Pack map(const Op& op, const Packs&... packs) {
    Pack result;
    for (int i = 0; i < full; ++i) result.v[i] = op(packs.v[i]...);
    if constexpr (half) result.h = op(packs.h...);
    return result;
  }
};

template <class T, int full, bool half, bool argmax>
void moments_of_nodes(const Channel<T>& c, int64_t k) {
  using P = Pack<T, full, half>;
  using Places = Pack<IntLike<T>, full, half>;
  constexpr int lanes = kLanes<T>;
  const auto times = [](auto a, auto b) CONELENS_INLINE_LAMBDA { return a * b; };
  const auto plus = [](auto a, auto b) CONELENS_INLINE_LAMBDA { return a + b; };
  const auto fused = [](auto a, auto b, auto sum) CONELENS_INLINE_LAMBDA { return multiply_add(a, b, sum); };
  const auto larger = [](auto a, auto b) CONELENS_INLINE_LAMBDA { return a > b ? a : b; };
  const auto place_of_larger = [](auto a, auto b, auto at_a, auto at_b)
                                   CONELENS_INLINE_LAMBDA { return a > b ? at_a : at_b; };
  const int64_t vectors = c.padded_width / lanes;

  for (int64_t x = c.left; x < c.right; ++x) P::zero().store(c.below + x * c.padded_nodes + k);
  P mass = P::zero(), first = mass, second = mass, best = mass;
  Places place = Places::zero();
  for (int64_t y = c.top; y < c.bottom; ++y) {
    const P row = P::load(c.weighted + y * c.padded_nodes + k);
    P along = P::zero(), row_best = along;  // evidence along the row; the largest F times Gaussian of x
    Places row_place = Places::zero();
    bool dark = true;
    for (int64_t v = c.left / lanes; v * lanes < c.right; ++v)
      for (uint32_t bits = c.lit[y * vectors + v]; bits; bits &= bits - 1) {
        const int64_t x = v * lanes + __builtin_ctz(bits), cell = y * c.padded_width + x;
        const T evidence = c.evidence[cell];
        const P column = P::load(c.columns + x * c.padded_nodes + k);
        const auto weigh = [&](auto a, auto sum)
                               CONELENS_INLINE_LAMBDA { return multiply_add(evidence, a, sum); };
        along = P::map(weigh, column, along);
        T* below = c.below + x * c.padded_nodes + k;
        P::map(weigh, row, P::load(below)).store(below);
        if constexpr (argmax) {
          const T activity = c.activity[cell];
          const IntLike<T> here = static_cast<IntLike<T>>(y * c.width + x);
          const P seen = P::map([&](auto a) CONELENS_INLINE_LAMBDA { return activity * a; }, column);
          row_place = Places::map([&](auto a, auto b, auto at)
                                      CONELENS_INLINE_LAMBDA { return a > b ? decltype(at){} + here : at; },
                                  seen, row_best, row_place);
          row_best = P::map(larger, seen, row_best);
        }
        dark = false;
      }
    if (dark) continue;
    const T at = c.coordinate(0, y);
    const P off = P::map([&](auto m) CONELENS_INLINE_LAMBDA { return at - m; }, P::load(c.mean[0] + k));
    const P owned = P::map(times, along, row), moment = P::map(times, owned, off);
    mass = P::map(plus, mass, owned);
    first = P::map(plus, first, moment);
    second = P::map(fused, moment, off, second);
    if constexpr (argmax) {
      const P seen = P::map(times, row_best, row);
      place = Places::map(place_of_larger, seen, best, row_place, place);
      best = P::map(larger, seen, best);
    }
  }
  mass.store(c.mass + k);
  first.store(c.first[0] + k);
  if constexpr (argmax) best.store(c.score + k), place.store(c.position + k);

  first = P::zero();
  for (int64_t x = c.left; x < c.right; ++x) {
    const T at = c.coordinate(1, x);
    const P off = P::map([&](auto m) CONELENS_INLINE_LAMBDA { return at - m; }, P::load(c.mean[1] + k));
    const P below = P::load(c.below + x * c.padded_nodes + k);
    const P moment = P::map(times, P::map(times, below, P::load(c.columns + x * c.padded_nodes + k)), off);
    first = P::map(plus, first, moment);
    second = P::map(fused, moment, off, second);
  }
  first.store(c.first[1] + k);
  second.store(c.second + k);
}

constexpr int kVectors = 3;  // of nodes at once

template <class T, bool half, bool argmax, int full = kVectors>
void moments_of_some_nodes(const Channel<T>& c, int64_t vectors, int64_t k) {
  if constexpr (full > 0)
    if (vectors < full) return moments_of_some_nodes<T, half, argmax, full - 1>(c, vectors, k);
  moments_of_nodes<T, full, half, argmax>(c, k);
}

template <class T, bool argmax>
void find_moments(const Channel<T>& c) {
  constexpr int lanes = kLanes<T>;
  int64_t k = 0;
  for (;; k += kVectors * lanes) {
    const int64_t rest = c.padded_nodes - k, vectors = rest / lanes;
    if (vectors >= kVectors && rest > kVectors * lanes + (lanes - kHalfLanes<T>)) {
      moments_of_nodes<T, kVectors, false, argmax>(c, k);
      continue;
    }
    if (rest % lanes)
      moments_of_some_nodes<T, true, argmax>(c, vectors, k);
    else
      moments_of_some_nodes<T, false, argmax>(c, vectors, k);
    return;
  }
}

}  // namespace
}  // namespace conelens
