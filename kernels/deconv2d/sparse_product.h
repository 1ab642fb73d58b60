// The inner loop of deconv2d on the CPU: rows of sparse cells times a packed filter block, added to output
// runs. Compiled once per instruction set, so everything here has internal linkage.
#pragma once

#include <cstdint>

#include "simd.h"

namespace conelens {
namespace {  // internal linkage: each ISA's objects keep their own copy

constexpr int kSums = 12;  // vectors of sums that stay in registers

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = kVectorBytes / sizeof(T);
};

inline Simd<float>::Vector fma(float a, Simd<float>::Vector b, Simd<float>::Vector c) {
#if defined(__AVX512F__)
  return (Simd<float>::Vector)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Simd<float>::Vector)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Simd<double>::Vector fma(double a, Simd<double>::Vector b, Simd<double>::Vector c) {
#if defined(__AVX512F__)
  return (Simd<double>::Vector)_mm512_fmadd_pd(_mm512_set1_pd(a), (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Simd<double>::Vector)_mm256_fmadd_pd(_mm256_set1_pd(a), (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// A non-zero channel of a cell: its value, and where its vectors begin in the packed filter block.
template <class T>
struct Entry {
  T value;
  int32_t offset;
};

// A row of cells, each with up to `depth` entries, and for every segment where its first cell's run begins.
template <class T>
struct CellRow {
  const Entry<T>* entries;
  const int32_t* counts;
  int64_t cells, depth, step;  // step: elements between the runs of neighbouring cells
  const T* filter;
  T* runs[kSums];
};

template <class T, int kSegments, int kVectors, int kWays>
void add_row(const CellRow<T>& row) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int lanes = Simd<T>::lanes, n = kSegments * kVectors;
  for (int64_t cell = 0; cell < row.cells; ++cell) {
    const Entry<T>* entry = row.entries + cell * row.depth;
    const Entry<T>* end = entry + row.counts[cell];
    if (entry == end) continue;
    Vector sums[kWays * n];
    for (int i = 0; i < kWays * n; ++i) sums[i] = Vector{};
    for (; entry + kWays <= end; entry += kWays)
      for (int way = 0; way < kWays; ++way) {
        const T* block = row.filter + entry[way].offset;
        for (int i = 0; i < n; ++i)
          sums[way * n + i] = fma(entry[way].value, *(const Vector*)(block + i * lanes), sums[way * n + i]);
      }
    for (; entry < end; ++entry)
      for (int i = 0; i < n; ++i)
        sums[i] = fma(entry->value, *(const Vector*)(row.filter + entry->offset + i * lanes), sums[i]);
    for (int s = 0; s < kSegments; ++s)
      for (int v = 0; v < kVectors; ++v) {
        Vector* run = (Vector*)(row.runs[s] + cell * row.step + v * lanes);
        Vector sum = sums[s * kVectors + v];
        if (kWays == 2) sum += sums[(kWays - 1) * n + s * kVectors + v];
        *run += sum;
      }
  }
}

template <class T>
using AddRow = void (*)(const CellRow<T>&);

// `two_ways` takes two entries at once: few sums alone cannot hide the latency of a multiply-add.
template <class T, int kVectors, int kSegments = kSums / kVectors>
AddRow<T> pick_segments(int segments, bool two_ways) {
  if (segments == kSegments) {
    if constexpr (kSegments * kVectors <= 4)
      if (two_ways) return add_row<T, kSegments, kVectors, 2>;
    return add_row<T, kSegments, kVectors, 1>;
  }
  if constexpr (kSegments > 1) return pick_segments<T, kVectors, kSegments - 1>(segments, two_ways);
  return nullptr;
}

template <class T>
AddRow<T> pick_add_row(int segments, int vectors, bool two_ways) {
  switch (vectors) {
    case 1:
      return pick_segments<T, 1>(segments, two_ways);
    case 2:
      return pick_segments<T, 2>(segments, two_ways);
    case 3:
      return pick_segments<T, 3>(segments, two_ways);
    default:
      return pick_segments<T, 4>(segments, two_ways);
  }
}

}  // namespace
}  // namespace conelens
