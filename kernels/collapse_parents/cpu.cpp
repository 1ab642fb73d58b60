// collapse_parents on the CPU, compiled once per instruction set. Rules: README.md.
//
// Vectors run over images: laid out [parent, axis, image], a parent is read in a few lines of the cache
// wherever it stands. Results of as many nodes as a vector has lanes are turned around in registers.
#include "collapse_parents.h"

#include <stdlib.h>

#include "parallel.h"
#include "simd_exp.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using Params = conelens_collapse_parents_params;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// From each pair of rows `step` apart, the halves of 2 * step lanes that belong together.
template <int step, bool upper, class V, int... i>
CONELENS_INLINE V exchange(const V& a, const V& b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b,
                                 ((i & step) == 0 ? i + (upper ? step : 0) : i - (upper ? 0 : step) + n)...);
}

template <int n, int step = n / 2, class V>
CONELENS_INLINE void transpose(V (&rows)[n]) {
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    if ((i & step) == 0) {
      const V a = rows[i], b = rows[i + step];
      rows[i] = exchange<step, false>(a, b, std::make_integer_sequence<int, n>{});
      rows[i + step] = exchange<step, true>(a, b, std::make_integer_sequence<int, n>{});
    }
  if constexpr (step > 1) transpose<n, step / 2>(rows);
}

// to[column * to_stride + row] = from[row * from_stride + column], for up to a vector's lanes of each; what
// is beyond is 0 in `to`, which has room for whole vectors
template <class T>
void lay_across(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int n = kLanes<T>;
  Vec<T, n> tile[n] = {};
  if (columns == n) {
    for (int64_t i = 0; i < rows; ++i) tile[i] = load_vec<Vec<T, n>>(from + i * from_stride);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) tile[i][j] = from[i * from_stride + j];
  }
  transpose<n>(tile);
  for (int64_t j = 0; j < columns; ++j) store_vec(to + j * to_stride, tile[j]);
}

// to[row * to_stride + column] = from[column][row]
template <class T>
void lay_back(const Vec<T, kLanes<T>>* from, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int n = kLanes<T>;
  Vec<T, n> tile[n];
  for (int j = 0; j < n; ++j) tile[j] = from[j];
  transpose<n>(tile);
  if (columns == n) {
    for (int64_t i = 0; i < rows; ++i) store_vec(to + i * to_stride, tile[i]);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[i * to_stride + j] = tile[i][j];
  }
}

// A call's work: as many images as a vector has lanes, from `first` on, in a table that is laid out anew for
// each.
template <class T>
struct Work {
  const Params& p;
  T* precision;  // [parents]
  T* per_total;  // [nodes]: one over the sum of a node's precisions
  T* table;      // [parents][axis][lanes]
  int64_t first = 0, images = 0;

  const T* parent(int64_t u) const { return table + u * 2 * kLanes<T>; }
};

template <class T>
void lay_out(const Work<T>& work, int64_t begin, int64_t end) {
  constexpr int n = kLanes<T>, parents = n / 2;  // whose numbers fill a vector
  const Params& p = work.p;
  const T* from = static_cast<const T*>(p.displacement) + work.first * p.parents * 2;
  for (int64_t u = begin; u < end; u += parents)
    lay_across<T>(from + 2 * u, p.parents * 2, work.images, 2 * min(parents, end - u), work.table + u * 2 * n,
                  n);
}

// What does not depend on images.
template <class T, class Index>
void total(const Work<T>& work, int64_t begin, int64_t end) {
  const int64_t m = work.p.edges_per_node;
  for (int64_t v = begin; v < end; ++v) {
    const Index* const edges = static_cast<const Index*>(work.p.edges) + v * m;
    T sum{};
    for (int64_t k = 0; k < m; ++k) sum += work.precision[edges[k]];
    work.per_total[v] = 1 / sum;
    static_cast<T*>(work.p.sigma_out)[v] = __builtin_sqrt(static_cast<T>(m) / sum);
  }
}

// One node, in two passes: a mean, first about the first parent, so that parents who agree lose no digit;
// then, about that mean, what it lacks and the spread.
template <class T, class Index>
void collapse(const Work<T>& work, int64_t node, Vec<T, kLanes<T>>* shift, Vec<T, kLanes<T>>* log_agreement) {
  constexpr int n = kLanes<T>;
  using V = Vec<T, n>;
  const int64_t m = work.p.edges_per_node;
  const Index* const edges = static_cast<const Index*>(work.p.edges) + node * m;
  const T per_total = work.per_total[node];
  struct Sums {
    V y{}, x{}, squares{};
  };
  const auto about = [&](const V& y, const V& x) CONELENS_INLINE_LAMBDA {
    Sums sums;
    for (int64_t k = 0; k < m; ++k) {
      const T* const parent = work.parent(edges[k]);
      const V precision = V{} + work.precision[edges[k]];
      const V dy = load_vec<V>(parent) - y, dx = load_vec<V>(parent + n) - x;
      sums.y = fma_vec<T, n>(precision, dy, sums.y);
      sums.x = fma_vec<T, n>(precision, dx, sums.x);
      sums.squares = fma_vec<T, n>(precision, fma_vec<T, n>(dx, dx, dy * dy), sums.squares);
    }
    return sums;
  };
  const T* const origin = work.parent(edges[0]);
  const V y0 = load_vec<V>(origin), x0 = load_vec<V>(origin + n);
  const Sums rough = about(y0, x0);
  const V y = y0 + rough.y * per_total, x = x0 + rough.x * per_total;
  const Sums fine = about(y, x);
  const V more_y = fine.y * per_total, more_x = fine.x * per_total;
  const V spread = fine.squares - (more_y * fine.y + more_x * fine.x);
  shift[0] = y + more_y, shift[1] = x + more_x;
  *log_agreement = (spread < V{} ? V{} : spread) * (T(-0.5) / static_cast<T>(m));
}

template <class T, class Index>
void collapse_nodes(const Work<T>& work, int64_t begin, int64_t end) {
  constexpr int n = kLanes<T>;
  const Params& p = work.p;
  T* const shifts = static_cast<T*>(p.shift) + work.first * p.nodes * 2;
  T* const agreements = static_cast<T*>(p.log_agreement) + work.first * p.nodes;
  for (int64_t v = begin; v < end; v += n) {
    const int64_t nodes = min(n, end - v);
    Vec<T, n> shift[2 * n] = {}, agreement[n] = {};
    for (int64_t i = 0; i < nodes; ++i) collapse<T, Index>(work, v + i, shift + 2 * i, agreement + i);
    lay_back<T>(shift, shifts + 2 * v, p.nodes * 2, work.images, min(n, 2 * nodes));
    if (2 * nodes > n) lay_back<T>(shift + n, shifts + 2 * v + n, p.nodes * 2, work.images, 2 * nodes - n);
    lay_back<T>(agreement, agreements + v, p.nodes, work.images, nodes);
  }
}

template <class T, class Index>
int collapse_all(const Params& p, int threads) {
  constexpr int n = kLanes<T>;
  const auto padded = [](int64_t count) { return (count + n - 1) / n * n; };
  const int64_t elements = padded(p.parents) + padded(p.nodes) + padded(p.parents * 2 * n);
  T* const memory = static_cast<T*>(aligned_alloc(64, (elements * sizeof(T) + 63) / 64 * 64));
  if (!memory) return CONELENS_OUT_OF_MEMORY;
  T* const per_total = memory + padded(p.parents);
  Work<T> work{p, memory, per_total, per_total + padded(p.nodes)};
  for (int64_t u = 0; u < p.parents; ++u) {
    const T inverse = 1 / static_cast<const T*>(p.sigma)[u];
    work.precision[u] = inverse * inverse;
  }
  const auto in_tiles = [&](int64_t count, int64_t grain, auto body) {
    parallel_for((count + n - 1) / n, grain, threads,
                 [&](int64_t begin, int64_t end) { body(work, begin * n, min(end * n, count)); });
  };
  in_tiles(p.nodes, 64, total<T, Index>);
  for (; work.first < p.images; work.first += n) {
    work.images = min(n, p.images - work.first);
    in_tiles(p.parents, 16, lay_out<T>);
    in_tiles(p.nodes, 4, collapse_nodes<T, Index>);
  }
  free(memory);
  return CONELENS_OK;
}

}  // namespace

int collapse_parents(const Params& p, int threads) {
  if (p.nodes == 0) return CONELENS_OK;
  if (p.edges_per_node < 1) return CONELENS_INVALID_ARGUMENT;
  const bool wide = p.edges_bytes == 8;
  if (p.dtype == CONELENS_FLOAT32)
    return wide ? collapse_all<float, int64_t>(p, threads) : collapse_all<float, int32_t>(p, threads);
  if (p.dtype == CONELENS_FLOAT64)
    return wide ? collapse_all<double, int64_t>(p, threads) : collapse_all<double, int32_t>(p, threads);
  return CONELENS_UNSUPPORTED_DTYPE;
}

}  // namespace conelens::cpu::CONELENS_ISA
