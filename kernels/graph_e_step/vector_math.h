// What graph_e_step's loops need besides simd.h: log, the lanes of a comparison as bits, floats without
// denormals. Compiled once per instruction set.
#pragma once

#include "simd_exp.h"

namespace conelens {
namespace {  // internal linkage: each ISA's objects keep their own copy

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kHalfLanes = kLanes<T> >= 8 ? kLanes<T> / 2 : kLanes<T>;  // of a vector for what is left over

template <class V>
using LaneOf = std::decay_t<decltype(std::declval<V&>()[0])>;

template <class V>
constexpr int kLanesOf = static_cast<int>(sizeof(V) / sizeof(LaneOf<V>));

// x in every lane: unlike x + 0, x - 0 is x for compilers that heed the sign of zero
template <class V>
CONELENS_INLINE V all_lanes(LaneOf<V> x) {
  return x - V{};
}

template <class V>
CONELENS_INLINE V multiply_add(V a, V b, V c) {
  return fma_vec<LaneOf<V>, kLanesOf<V>>(a, b, c);
}
template <class V>
CONELENS_INLINE V multiply_add(LaneOf<V> a, V b, V c) {
  return multiply_add<V>(all_lanes<V>(a), b, c);
}

// Bit i: is lane i of a comparison's result true?
template <class Mask>
CONELENS_INLINE uint32_t lane_bits(const Mask& mask) {
  constexpr int lanes = static_cast<int>(sizeof(Mask) / sizeof(mask[0]));
  [[maybe_unused]] constexpr bool single = sizeof(mask[0]) == 4;
#if defined(__AVX512DQ__)
  if constexpr (single && sizeof(Mask) == 64) return _mm512_movepi32_mask((__m512i)mask);
  if constexpr (!single && sizeof(Mask) == 64) return _mm512_movepi64_mask((__m512i)mask);
#endif
#if defined(__AVX2__)
  if constexpr (single && sizeof(Mask) == 32) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  if constexpr (!single && sizeof(Mask) == 32)
    return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#endif
#if defined(__SSE2__)
  if constexpr (single && sizeof(Mask) == 16) return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
  if constexpr (!single && sizeof(Mask) == 16) return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < lanes; ++i) bits |= (mask[i] ? 1u : 0u) << i;
  return bits;
}

template <class T>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  static constexpr int mantissa = 23;
  static constexpr int32_t root_half = 0x3f3504f3;  // the bits of sqrt(1/2)
  static constexpr float tiny = 0x1p-126f, ln2 = 0.693147180559945309f;
};
template <>
struct FloatFormat<double> {
  static constexpr int mantissa = 52;
  static constexpr int64_t root_half = 0x3fe6a09e667f3bcd;
  static constexpr double tiny = 0x1p-1022, ln2 = 0.693147180559945309;
};

template <class V, class T, int n>
CONELENS_INLINE V polynomial(V x, const T (&coefficients)[n]) {  // highest power first
  V sum = V{} + coefficients[0];
  for (int i = 1; i < n; ++i) sum = multiply_add(sum, x, V{} + coefficients[i]);
  return sum;
}

// Is x a finite number, and not below the smallest normal one?
template <class V>
CONELENS_INLINE auto is_ordinary(V x) {
  using T = LaneOf<V>;
  return (x >= FloatFormat<T>::tiny) & (x < static_cast<T>(__builtin_inf()));
}

template <class V>
CONELENS_INLINE V log_of_ordinary(V x) {
  using T = LaneOf<V>;
  using I = decltype(x < x);
  using Format = FloatFormat<T>;
  const I exponent = ((I)x - Format::root_half) >> Format::mantissa;
  const V r = (V)((I)x - (exponent << Format::mantissa)) - T{1};  // sqrt(1/2) - 1 to sqrt(2) - 1
  V fraction;
  if constexpr (sizeof(T) == 4) {  // r - r^2/2 + r^3 P(r), fitted to 3.2e-8
    constexpr float c[] = {0.08700434526860856f,  -0.14267486774510596f, 0.14914768226587713f,
                           -0.16577584697817654f, 0.19963063776360265f,  -0.2500133703729371f,
                           0.33333910737772177f};
    fraction = multiply_add(r * r, multiply_add(r, polynomial(r, c), V{} - T{0.5}), r);
  } else {  // 2 atanh(s), s = r / (2 + r), to 1e-17
    constexpr double c[] = {2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11,
                            2.0 / 9,  2.0 / 7,  2.0 / 5,  2.0 / 3,  2.0};
    const V s = r / (r + 2.0);
    fraction = s * polynomial(s * s, c);
  }
  return multiply_add(Format::ln2, __builtin_convertvector(exponent, V), fraction);
}

// -infinity below the smallest normal number; infinity and NaN stay.
template <class V>
CONELENS_INLINE V log(V x) {
  const V special = x < FloatFormat<LaneOf<V>>::tiny ? V{} - static_cast<LaneOf<V>>(__builtin_inf()) : x;
  return is_ordinary(x) ? log_of_ordinary(x) : special;
}

// For its lifetime denormal numbers count as zero in this thread: far tails of densities would cost a hundred
// clocks each.
class WithoutDenormals {
 public:
#if defined(__SSE2__)
  WithoutDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~WithoutDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

}  // namespace
}  // namespace conelens
