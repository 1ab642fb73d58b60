// edge_scores on the CPU, compiled once per instruction set. Rules: README.md.
//
// Blocks as in a matrix product: a tile of nodes by parents stays in registers while the images of a block
// pass by; the parents of a block are laid out in panels that the second-level cache holds.
#include "edge_scores.h"

#include <stdlib.h>
#include <string.h>

#include "parallel.h"
#include "simd_exp.h"

namespace conelens::cpu::CONELENS_ISA {
namespace {

using Params = conelens_edge_scores_params;

constexpr int kRows = 4, kColumns = 2;  // nodes by vectors of parents in registers
constexpr int kNodes = 16;              // laid out side by side, with all images of a block
constexpr int64_t kImages = 128;        // of a block: sums of so many terms are added up
constexpr int64_t kPanelBytes = 1 << 19;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kWidth = kColumns * kLanes<T>;  // parents of a panel

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// A node in one image.
template <class T>
struct Node {
  T y, x, weight;
};

// Panel `panel` of these parents: for each image y of all, then x of all; 0 beyond the last parent.
template <class T>
void lay_out_parents(const Params& p, Range images, Range parents, int64_t panel, T* to) {
  const int64_t first = parents.begin + panel * kWidth<T>, count = min(kWidth<T>, parents.end - first);
  for (int64_t image = images.begin; image < images.end; ++image, to += 2 * kWidth<T>) {
    const T* from = static_cast<const T*>(p.parent) + (image * p.parents + first) * 2;
    for (int64_t u = 0; u < kWidth<T>; ++u)
      for (int axis = 0; axis < 2; ++axis) to[axis * kWidth<T> + u] = u < count ? from[2 * u + axis] : T(0);
  }
}

// [kNodes / kRows][images][kRows]; weight 0 beyond the last node
template <class T>
void lay_out_nodes(const Params& p, Range images, int64_t first, Node<T>* to) {
  const int64_t count = min(kNodes, p.nodes - first);
  for (int64_t image = images.begin; image < images.end; ++image) {
    const int64_t at = image * p.nodes + first;
    const T *place = static_cast<const T*>(p.displacement) + 2 * at,
            *weight = static_cast<const T*>(p.weight) + at;
    for (int64_t v = 0; v < kNodes; ++v)
      to[(v / kRows * images.size() + image - images.begin) * kRows + v % kRows] =
          v < count ? Node<T>{place[2 * v], place[2 * v + 1], weight[v]} : Node<T>{};
  }
}

// What kRows nodes and a panel add to out, its first cell of them; `steepness` is -log2(e) / 2b of each node.
template <class T, bool kernel>
void score_tile(int64_t images, const Node<T>* nodes, const T* panel, const T* steepness, T* out,
                int64_t out_stride, int64_t rows, int64_t columns, bool add) {
  constexpr int n = kLanes<T>;
  using V = Vec<T, n>;
  V sums[kRows][kColumns] = {};
  for (int64_t image = 0; image < images; ++image, nodes += kRows, panel += 2 * kWidth<T>) {
    V y[kColumns], x[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      y[c] = load_vec<V>(panel + c * n);
      x[c] = load_vec<V>(panel + kWidth<T> + c * n);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Node<T>& node = nodes[r];
      for (int c = 0; c < kColumns; ++c) {
        const V dy = y[c] - node.y, dx = x[c] - node.x;
        const V square = fma_vec<T, n>(dx, dx, dy * dy);
        const V term = kernel ? exp2_vec<T, n>(square * steepness[r]) : square;
        sums[r][c] = fma_vec<T, n>(V{} + node.weight, term, sums[r][c]);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* row = out + r * out_stride;
    T found[kWidth<T>];
    for (int c = 0; c < kColumns; ++c) store_vec(found + c * n, sums[r][c]);
    for (int64_t u = 0; u < columns; ++u) row[u] = add ? row[u] + found[u] : found[u];
  }
}

// Nodes [begin, end) against the parents of a block, over its images.
template <class T, bool kernel>
void score_nodes(const Params& p, Range images, Range parents, const T* panels, Range nodes, Node<T>* work) {
  constexpr T log2e = T(1.4426950408889634);
  const int64_t panel_size = images.size() * 2 * kWidth<T>;
  for (int64_t first = nodes.begin; first < nodes.end; first += kNodes) {
    lay_out_nodes(p, images, first, work);
    T steepness[kNodes] = {};
    for (int64_t v = 0; kernel && v < min(kNodes, p.nodes - first); ++v)
      steepness[v] = -log2e / (2 * static_cast<const T*>(p.bandwidth)[first + v]);
    for (int64_t u = parents.begin, panel = 0; u < parents.end; u += kWidth<T>, ++panel)
      for (int64_t v = first; v < min(first + kNodes, p.nodes); v += kRows)
        score_tile<T, kernel>(images.size(), work + (v - first) * images.size(), panels + panel * panel_size,
                              steepness + v - first, static_cast<T*>(p.out) + v * p.parents + u, p.parents,
                              min(kRows, p.nodes - v), min(kWidth<T>, parents.end - u), images.begin > 0);
  }
}

template <class T, bool kernel>
int score(const Params& p, int threads) {
  const int64_t most_images = min(kImages, p.images);
  const int64_t per_panel = most_images * 2 * kWidth<T> * static_cast<int64_t>(sizeof(T));
  const int64_t all_panels = (p.parents + kWidth<T> - 1) / kWidth<T>;
  const int64_t panels = min(all_panels, kPanelBytes / per_panel < 1 ? 1 : kPanelBytes / per_panel);
  const int64_t work_bytes = (most_images * kNodes * static_cast<int64_t>(sizeof(Node<T>)) + 63) / 64 * 64;
  T* memory = static_cast<T*>(aligned_alloc(64, panels * per_panel));
  if (!memory) return CONELENS_OUT_OF_MEMORY;
  int code = CONELENS_OK;
  for (int64_t i = 0; i < p.images; i += kImages)
    for (int64_t u = 0; u < p.parents; u += panels * kWidth<T>) {
      const Range images{i, min(i + kImages, p.images)}, parents{u, min(u + panels * kWidth<T>, p.parents)};
      const int64_t count = (parents.size() + kWidth<T> - 1) / kWidth<T>;
      parallel_for(count, 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel)
          lay_out_parents(p, images, parents, panel, memory + panel * images.size() * 2 * kWidth<T>);
      });
      const int64_t tiles = (p.nodes + kNodes - 1) / kNodes;
      parallel_for(tiles, 1, threads, [&](int64_t begin, int64_t end) {
        auto* work = static_cast<Node<T>*>(aligned_alloc(64, work_bytes));
        if (!work) {
          __atomic_store_n(&code, static_cast<int>(CONELENS_OUT_OF_MEMORY), __ATOMIC_RELAXED);
          return;
        }
        score_nodes<T, kernel>(p, images, parents, memory, {begin * kNodes, min(end * kNodes, p.nodes)},
                               work);
        free(work);
      });
    }
  free(memory);
  return code;
}

}  // namespace

int edge_scores(const Params& p, int threads) {
  if (p.dtype != CONELENS_FLOAT32 && p.dtype != CONELENS_FLOAT64) return CONELENS_UNSUPPORTED_DTYPE;
  const bool single = p.dtype == CONELENS_FLOAT32;
  if (p.images == 0) memset(p.out, 0, p.nodes * p.parents * (single ? sizeof(float) : sizeof(double)));
  if (p.images * p.nodes * p.parents == 0) return CONELENS_OK;
  if (p.bandwidth) return single ? score<float, true>(p, threads) : score<double, true>(p, threads);
  return single ? score<float, false>(p, threads) : score<double, false>(p, threads);
}

}  // namespace conelens::cpu::CONELENS_ISA
