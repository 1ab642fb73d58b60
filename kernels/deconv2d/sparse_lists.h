// How deconv2d on the CPU lists the non-zero channels of a cell. Compiled once per instruction set.
#pragma once

#include <cstdint>

#include "sparse_product.h"

namespace conelens {
namespace {  // internal linkage: each ISA's objects keep their own copy

constexpr int64_t kSlotUnit =
    16;  // a cell's slot holds a multiple of so many entries: whole vectors are stored

// Appends channels 0 .. n - 1 of a cell that are not zero (with relu: not negative either; NaN stays) and,
// where switches are given, whose switch is `tap`. Channel i's filter block begins at i * unit. Returns the
// new count.
template <class T>
int32_t append_channels(Entry<T>* slot, int32_t count, const T* values, const uint8_t* switches, int tap,
                        int64_t n, int32_t unit, bool relu) {
  for (int64_t i = 0; i < n; ++i) {
    slot[count] = {values[i], static_cast<int32_t>(i) * unit};
    const bool keep = relu ? !(values[i] <= 0) : values[i] != 0;
    count += keep & (!switches || switches[i] == tap);
  }
  return count;
}

#if defined(__AVX512F__)
template <>
[[maybe_unused]] int32_t append_channels<float>(Entry<float>* slot, int32_t count, const float* values,
                                                const uint8_t* switches, int tap, int64_t n, int32_t unit,
                                                bool relu) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(unit));
  const __m512i step = _mm512_set1_epi32(16 * unit);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = n - i < 16 ? (1u << (n - i)) - 1 : 0xffffu;
    const __m512 value = _mm512_maskz_loadu_ps(some, values + i);
    __mmask16 keep = relu ? _mm512_mask_cmp_ps_mask(some, value, _mm512_setzero_ps(), _CMP_NLE_UQ)
                          : _mm512_mask_cmp_ps_mask(some, value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    if (switches)
      keep &= _mm_mask_cmpeq_epi8_mask(some, _mm_maskz_loadu_epi8(some, switches + i),
                                       _mm_set1_epi8(static_cast<char>(tap)));
    const __m512 kept = _mm512_maskz_compress_ps(keep, value);
    const __m512 at = _mm512_castsi512_ps(_mm512_maskz_compress_epi32(keep, offsets));
    _mm512_storeu_ps(slot + count, _mm512_permutex2var_ps(kept, low, at));
    _mm512_storeu_ps(slot + count + 8, _mm512_permutex2var_ps(kept, high, at));
    count += __builtin_popcount(keep);
    offsets = _mm512_add_epi32(offsets, step);
  }
  return count;
}
#endif

}  // namespace
}  // namespace conelens
