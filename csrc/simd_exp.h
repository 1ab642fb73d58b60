// Fused multiply-add and powers of two of the vectors of simd.h, lane by lane.
#pragma once

#include "simd.h"

namespace conelens {
namespace {  // internal linkage: each ISA's objects keep their own copy

// a * b + c, rounded once where the instruction set can
template <class T, int n>
CONELENS_INLINE Vec<T, n> fma_vec(const Vec<T, n>& a, const Vec<T, n>& b, const Vec<T, n>& c) {
#if defined(__AVX512F__)
  if constexpr (n == 16 && sizeof(T) == 4)
    return (Vec<T, n>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else if constexpr (n == 8 && sizeof(T) == 8)
    return (Vec<T, n>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  else
#endif
#if defined(__FMA__)
      if constexpr (n == 1 && sizeof(T) == 4)
    return __builtin_fmaf(a, b, c);
  else if constexpr (n == 1)
    return __builtin_fma(a, b, c);
  else if constexpr (n == 8 && sizeof(T) == 4)
    return (Vec<T, n>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else if constexpr (n == 4 && sizeof(T) == 8)
    return (Vec<T, n>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  else if constexpr (n == 4)
    return (Vec<T, n>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
  else if constexpr (n == 2 && sizeof(T) == 8)
    return (Vec<T, n>)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
  else
#endif
    return a * b + c;
}

// 2^f = sum of factor[k] f^k for |f| <= 1/2: the best polynomials in relative error, 2e-9 and 3e-18.
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr int digits = 23, bias = 127;
  static constexpr float factor[] = {1.0f,           0.693147206f,   0.240226469f,   0.0555032878f,
                                     0.00961848892f, 0.00133999313f, 0.000153458205f};
};
template <>
struct Exp2<double> {
  static constexpr int digits = 52, bias = 1023;
  static constexpr double factor[] = {1.0,
                                      0.69314718055994533046,
                                      0.24022650695910156203,
                                      0.055504108664819921482,
                                      0.0096181291075883356971,
                                      0.0013333558146789954566,
                                      0.00015403530462513906055,
                                      0.000015252733489955560676,
                                      1.321543308990612687e-6,
                                      1.0178198035371477308e-7,
                                      7.0741055798305341942e-9,
                                      4.4352807031925459598e-10};
};

// x as whole + f, |f| <= 1/2, for which `scaled` gives y * 2^whole.
template <class T, int n>
struct Halved {
  using V = Vec<T, n>;
  V whole, f;  // `whole` of the common way: see below

  CONELENS_INLINE explicit Halved(const V& x) {
#if defined(__AVX512DQ__)
    if constexpr (n == 16 && sizeof(T) == 4) {
      whole = (V)_mm512_roundscale_ps((__m512)x, 0);
      f = (V)_mm512_reduce_ps((__m512)x, 0);
      return;
    } else if constexpr (n == 8 && sizeof(T) == 8) {
      whole = (V)_mm512_roundscale_pd((__m512d)x, 0);
      f = (V)_mm512_reduce_pd((__m512d)x, 0);
      return;
    }
#endif
    const V least = V{} - kBias, most = V{} + (kBias + 1);
    const V low = x < least ? least : x, inside = low > most ? most : low;
    // adding 1.5 * 2^digits rounds to a whole number, which, with the bias, stands in the lowest bits
    const V shift = V{} + (T(3ull << (Exp2<T>::digits - 1)) + kBias);
    whole = inside + shift;
    f = inside - (whole - shift);
  }

  CONELENS_INLINE V scaled(const V& y) const {
#if defined(__AVX512DQ__)
    if constexpr (n == 16 && sizeof(T) == 4)
      return (V)_mm512_scalef_ps((__m512)y, (__m512)whole);
    else if constexpr (n == 8 && sizeof(T) == 8)
      return (V)_mm512_scalef_pd((__m512d)y, (__m512d)whole);
#endif
    Vec<typename UintOfBytes<sizeof(T)>::type, n> bits;
    std::memcpy(&bits, &whole, sizeof bits);
    bits <<= Exp2<T>::digits;
    V power;
    std::memcpy(&power, &bits, sizeof power);
    return y * power;
  }

 private:
  static constexpr T kBias = Exp2<T>::bias;
};

// 2^x to an ulp (without fused multiply-add: to 1.2). Exactly 1 at 0; NaN stays; infinity from half a power
// of two below the largest on, 0 as far below the smallest normal number. exp(x) is exp2_vec(x * log2(e)),
// less the rounding of that product.
template <class T, int n>
CONELENS_INLINE Vec<T, n> exp2_vec(const Vec<T, n>& x) {
  using E = Exp2<T>;
  using V = Vec<T, n>;
  const Halved<T, n> parts(x);
  constexpr int last = sizeof(E::factor) / sizeof(T) - 1;
  V power = V{} + E::factor[last];
  for (int k = last; k-- > 0;) power = fma_vec<T, n>(power, parts.f, V{} + E::factor[k]);
  return parts.scaled(power);
}

}  // namespace
}  // namespace conelens
