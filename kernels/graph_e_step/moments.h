// The two loops over cells of graph_e_step on the CPU. Compiled once per instruction set.
#pragma once

#include "vector_math.h"

namespace conelens {
namespace {  // internal linkage: each ISA's objects keep their own copy

// One channel of one image, and the tables of its nodes. Nodes and columns are padded to whole vectors. Only
// the box of lit cells is filled in.
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
  uint64_t* lit;           // [height, words()]: a bit for each column
  T* below;                // [padded_width, padded_nodes]: evidence summed down the columns, weighted
  T *mass, *first[2], *second, *score;  // [padded_nodes]
  int64_t* position;                    // [padded_nodes]

  T coordinate(int axis, int64_t cell) const { return start[axis] + step[axis] * static_cast<T>(cell); }
  int64_t words() const { return (width + 63) / 64; }
  // bit i: has column 64 * word + i a lit cell in these rows?
  uint64_t lit_columns(int64_t y, int64_t count, int64_t word) const {
    uint64_t any = 0;
    for (int64_t i = 0; i < count; ++i) any |= lit[(y + i) * words() + word];
    return any;
  }
};

// --- evidence: sums of densities as a product of rows and columns, a vector of columns at a time ---

constexpr int kRows = 7;  // at once, as maps have 7, 14, 28 ... of them

// F log(sum of densities) of `count` rows from `y` on, columns of vector `x`
template <class T, int count>
Vec<T, kLanes<T>> evidence_of_rows(const Channel<T>& c, int64_t y, int64_t x) {
  using V = Vec<T, kLanes<T>>;
  V total[count];
  for (int i = 0; i < count; ++i) total[i] = all_lanes<V>(c.tau);
  const T* weighted = c.weighted + y * c.padded_nodes;
  const T* across = c.across + x;
  for (int64_t k = 0; k < c.nodes; ++k, across += c.padded_width) {
    const V column = load_vec<V>(across);
    for (int i = 0; i < count; ++i)
      total[i] = multiply_add<V>(weighted[i * c.padded_nodes + k], column, total[i]);
  }
  // dark cells count as 1, whose log is 0
  V activity[count], likelihood = {};
  auto odd = V{} != V{};
  for (int i = 0; i < count; ++i) {
    activity[i] = load_vec<V>(c.activity + (y + i) * c.padded_width + x);
    total[i] = activity[i] != T{0} ? total[i] : V{} + T{1};
    odd |= ~is_ordinary(total[i]);
  }
  if (!lane_bits(odd)) {
    for (int i = 0; i < count; ++i) {
      store_vec(c.evidence + (y + i) * c.padded_width + x, activity[i] / total[i]);
      likelihood = multiply_add<V>(activity[i], log_of_ordinary(total[i]), likelihood);
    }
    return likelihood;
  }
  for (int i = 0; i < count; ++i) {  // sums that underflow, overflow or are no numbers
    const V owned = total[i] >= FloatFormat<T>::tiny ? activity[i] / total[i] : V{};
    store_vec(c.evidence + (y + i) * c.padded_width + x, owned);
    likelihood += activity[i] != T{0} ? activity[i] * log(total[i]) : V{};
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
  Vec<T, lanes> likelihood = {};
  for (int64_t y = c.top; y < c.bottom; y += kRows) {
    const int64_t rows = c.bottom - y < kRows ? c.bottom - y : kRows;
    for (int64_t x = c.left / lanes * lanes; x < c.right; x += lanes)
      if (c.lit_columns(y, rows, x / 64) >> x % 64 & ((1u << lanes) - 1))
        likelihood += evidence_of_some_rows(c, rows, y, x);
  }
  T sum = 0;
  for (int i = 0; i < lanes; ++i) sum += likelihood[i];
  return sum;
}

// --- moments: a vector of nodes side by side, the columns of some rows one after the other ---

// body(x) for the columns in which these rows have a lit cell
template <class T, class Body>
CONELENS_INLINE void over_lit_columns(const Channel<T>& c, int64_t y, int64_t rows, const Body& body) {
  const int64_t right = c.right;
  for (int64_t word = c.left / 64; word * 64 < right; ++word)
    for (uint64_t bits = c.lit_columns(y, rows, word); bits; bits &= bits - 1)
      body(word * 64 + __builtin_ctzll(bits));
}

// Sums over cells of a vector of nodes.
template <class V>
struct Moments {
  V mass = {}, first = {}, second = {};
};

// The rows' part of mass and of the moments along y; what they add to the columns goes below.
template <class V, int count, class T>
void moments_of_rows(const Channel<T>& c, int64_t y, int64_t k, Moments<V>& moments) {
  // copies, as the compiler has to expect that stores change what c says
  const int64_t nodes = c.padded_nodes, width = c.padded_width;
  const T *columns = c.columns + k, *evidence = c.evidence + y * width;
  T* below = c.below + k;
  V row[count], along[count] = {};
  for (int i = 0; i < count; ++i) row[i] = load_vec<V>(c.weighted + (y + i) * nodes + k);
  over_lit_columns(c, y, count, [&](int64_t x) CONELENS_INLINE_LAMBDA {
    const V column = load_vec<V>(columns + x * nodes);
    V sum = load_vec<V>(below + x * nodes);
    for (int i = 0; i < count; ++i) {
      const V here = all_lanes<V>(evidence[i * width + x]);
      along[i] = multiply_add<V>(here, column, along[i]);
      sum = multiply_add<V>(here, row[i], sum);
    }
    store_vec(below + x * nodes, sum);
  });
  const V mean = load_vec<V>(c.mean[0] + k);
  for (int i = 0; i < count; ++i) {
    const V off = c.coordinate(0, y + i) - mean, owned = along[i] * row[i], moment = owned * off;
    moments.mass += owned, moments.first += moment;
    moments.second = multiply_add<V>(moment, off, moments.second);
  }
}

template <class V, class T, int count = kRows>
void moments_of_some_rows(const Channel<T>& c, int64_t rows, int64_t y, int64_t k, Moments<V>& sum) {
  if constexpr (count > 1)
    if (rows < count) return moments_of_some_rows<V, T, count - 1>(c, rows, y, k, sum);
  moments_of_rows<V, count>(c, y, k, sum);
}

template <class V, class T>
void find_moments(const Channel<T>& c, int64_t k) {
  for (int64_t x = c.left; x < c.right; ++x) store_vec(c.below + x * c.padded_nodes + k, V{});
  Moments<V> sum;
  for (int64_t y = c.top; y < c.bottom; y += kRows)
    moments_of_some_rows(c, c.bottom - y < kRows ? c.bottom - y : kRows, y, k, sum);
  store_vec(c.mass + k, sum.mass);
  store_vec(c.first[0] + k, sum.first);

  sum.first = V{};
  const V mean = load_vec<V>(c.mean[1] + k);
  for (int64_t x = c.left; x < c.right; ++x) {
    const int64_t at = x * c.padded_nodes + k;
    const V off = c.coordinate(1, x) - mean;
    const V moment = load_vec<V>(c.below + at) * load_vec<V>(c.columns + at) * off;
    sum.first += moment;
    sum.second = multiply_add<V>(moment, off, sum.second);
  }
  store_vec(c.first[1] + k, sum.first);
  store_vec(c.second + k, sum.second);
}

// --- arg-max: the largest of each row, of the rows the first best, and in it the first cell that has it ---

template <class V>
struct Peak {
  V score = {}, along = {};      // along: the largest activity times Gaussian of x
  decltype(V{} < V{}) row = {};  // the row that has it
};

template <class V, int count, class T>
void peaks_of_rows(const Channel<T>& c, int64_t y, int64_t k, Peak<V>& peak) {
  V largest[count] = {};
  over_lit_columns(c, y, count, [&](int64_t x) CONELENS_INLINE_LAMBDA {
    const V column = load_vec<V>(c.columns + x * c.padded_nodes + k);
    for (int i = 0; i < count; ++i) {
      const V seen = all_lanes<V>(c.activity[(y + i) * c.padded_width + x]) * column;
      largest[i] = seen > largest[i] ? seen : largest[i];
    }
  });
  for (int i = 0; i < count; ++i) {
    const V seen = largest[i] * load_vec<V>(c.weighted + (y + i) * c.padded_nodes + k);
    const auto better = seen > peak.score;
    peak.score = better ? seen : peak.score;
    peak.along = better ? largest[i] : peak.along;
    peak.row = better ? decltype(peak.row){} + static_cast<IntLike<T>>(y + i) : peak.row;
  }
}

template <class V, class T, int count = kRows>
void peaks_of_some_rows(const Channel<T>& c, int64_t rows, int64_t y, int64_t k, Peak<V>& peak) {
  if constexpr (count > 1)
    if (rows < count) return peaks_of_some_rows<V, T, count - 1>(c, rows, y, k, peak);
  peaks_of_rows<V, count>(c, y, k, peak);
}

template <class T>
int64_t find_cell(const Channel<T>& c, int64_t k, int64_t y, T along) {
  using V = Vec<T, kLanes<T>>;
  const T* activity = c.activity + y * c.padded_width;
  for (int64_t x = c.left / kLanes<T> * kLanes<T>; x < c.right; x += kLanes<T>) {
    const V seen = load_vec<V>(activity + x) * load_vec<V>(c.across + k * c.padded_width + x);
    if (const uint32_t bits = lane_bits(seen == along)) return y * c.width + x + __builtin_ctz(bits);
  }
  return -1;
}

template <class V, class T>
void find_peaks(const Channel<T>& c, int64_t k) {
  Peak<V> peak;
  for (int64_t y = c.top; y < c.bottom; y += kRows)
    peaks_of_some_rows(c, c.bottom - y < kRows ? c.bottom - y : kRows, y, k, peak);
  store_vec(c.score + k, peak.score);
  for (int i = 0; i < kLanesOf<V> && k + i < c.nodes; ++i)
    c.position[k + i] = peak.score[i] > 0 ? find_cell(c, k + i, peak.row[i], peak.along[i]) : -1;
}

}  // namespace
}  // namespace conelens
