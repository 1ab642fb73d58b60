// Vectors of the compiler (GCC, Clang), as wide as the instruction set at hand: plain operators and shuffles,
// which the compiler turns into the set's instructions. One lane is a plain number, so that edges share the
// same code.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace conelens {
namespace {  // internal linkage: each ISA's objects keep their own copy

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define CONELENS_INLINE inline __attribute__((always_inline, unused))
#define CONELENS_INLINE_LAMBDA __attribute__((always_inline))

template <class T, int lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <class T>
struct VectorOf<T, 1> {
  using type = T;
};
template <class T, int lanes>
using Vec = typename VectorOf<T, lanes>::type;

template <class V, class T>
CONELENS_INLINE V load_vec(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class T>
CONELENS_INLINE void store_vec(T* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

// The integer as wide as a lane of T, which comparisons give.
template <int bytes>
struct UintOfBytes;
template <>
struct UintOfBytes<1> {
  using type = uint8_t;
};
template <>
struct UintOfBytes<2> {
  using type = uint16_t;
};
template <>
struct UintOfBytes<4> {
  using type = uint32_t;
};
template <>
struct UintOfBytes<8> {
  using type = uint64_t;
};
template <class T>
using IntLike = std::make_signed_t<typename UintOfBytes<sizeof(T)>::type>;

// Element-wise conversion between unsigned integers, by a factor of two per step: compilers have instructions
// for that, and take lanes apart for more.
template <int lanes, class To, class From>
CONELENS_INLINE Vec<To, lanes> convert(const Vec<From, lanes>& v) {
  if constexpr (lanes == 1) {
    return static_cast<To>(v);
  } else if constexpr (sizeof(To) > 2 * sizeof(From)) {
    using Next = typename UintOfBytes<2 * sizeof(From)>::type;
    return convert<lanes, To, Next>(__builtin_convertvector(v, Vec<Next, lanes>));
#if defined(__AVX512BW__)
  } else if constexpr (sizeof(To) == 1 && sizeof(From) == 2 && lanes == 32) {
    return (Vec<To, lanes>)_mm512_cvtepi16_epi8((__m512i)v);
  } else if constexpr (sizeof(To) == 1 && sizeof(From) == 4 && lanes == 16) {
    return (Vec<To, lanes>)_mm512_cvtepi32_epi8((__m512i)v);
  } else if constexpr (sizeof(To) == 1 && sizeof(From) == 8 && lanes == 8) {
    const __m128i bytes = _mm512_cvtepi64_epi8((__m512i)v);
    return load_vec<Vec<To, lanes>>(&bytes);
#endif
  } else if constexpr (2 * sizeof(To) < sizeof(From)) {
    using Next = typename UintOfBytes<sizeof(From) / 2>::type;
    return convert<lanes, To, Next>(__builtin_convertvector(v, Vec<Next, lanes>));
  } else {
    return __builtin_convertvector(v, Vec<To, lanes>);
  }
}

// every second lane of the pair (a, b), from lane `odd` on
template <bool odd, class V, int... i>
CONELENS_INLINE V every_second(const V& a, const V& b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i + odd)...);
}
// the lower (or upper) half of a0 b0 a1 b1 ...
template <bool upper, class V, int... i>
CONELENS_INLINE V alternate(const V& a, const V& b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, ((i + (upper ? n : 0)) / 2 + (i % 2 ? n : 0))...);
}

// from[odd], from[2 + odd], ...: reads 2 * lanes elements
template <class T, int lanes, bool odd>
CONELENS_INLINE Vec<T, lanes> load_second(const T* from) {
  if constexpr (lanes == 1) {
    return from[odd];
  } else {
    using V = Vec<T, lanes>;
    return every_second<odd>(load_vec<V>(from), load_vec<V>(from + lanes),
                             std::make_integer_sequence<int, lanes>{});
  }
}

// to[0] = even[0], to[1] = odd[0], to[2] = even[1], ...
template <class T, int lanes, class V>
CONELENS_INLINE void store_alternate(T* to, const V& even, const V& odd) {
  if constexpr (lanes == 1) {
    to[0] = even;
    to[1] = odd;
  } else {
    store_vec(to, alternate<false>(even, odd, std::make_integer_sequence<int, lanes>{}));
    store_vec(to + lanes, alternate<true>(even, odd, std::make_integer_sequence<int, lanes>{}));
  }
}

// Runs body(Lanes<n>{}, first) over `count` items in vectors of n = `lanes`, of fewer where they fill none;
// the last vector overlaps its neighbour, so that the body must only write what it computes afresh.
template <int n>
struct Lanes {
  static constexpr int value = n;
};
constexpr int kFewestLanes = 4;
template <int lanes, class Body>
CONELENS_INLINE void in_vectors(int64_t count, const Body& body) {
  if constexpr (lanes >= kFewestLanes) {
    if (count < lanes) return in_vectors<lanes / 2>(count, body);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) body(Lanes<lanes>{}, i);
    if (i < count) body(Lanes<lanes>{}, count - lanes);
  } else {
    for (int64_t i = 0; i < count; ++i) body(Lanes<1>{}, i);
  }
}

// --- 16-bit floats, as bits in memory, to and from float lanes ---

template <class T, int n>
CONELENS_INLINE Vec<float, n> widen(const int16_t* from) {
  if constexpr (n == 1) {
    return to_float(T{static_cast<uint16_t>(*from)});
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = convert<n, uint32_t, uint16_t>(load_vec<Vec<uint16_t, n>>(from)) << 16;
    return (Vec<float, n>)bits;
#if defined(__AVX512F__)
  } else if constexpr (n == 16) {
    return (Vec<float, n>)_mm512_cvtph_ps(load_vec<__m256i>(from));
#endif
#if defined(__F16C__)
  } else if constexpr (n == 8) {
    return (Vec<float, n>)_mm256_cvtph_ps(load_vec<__m128i>(from));
  } else if constexpr (n == 4) {
    __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Vec<float, n>)_mm_cvtph_ps(bits);
#endif
  } else {
    Vec<float, n> v;
    for (int i = 0; i < n; ++i) v[i] = to_float(T{static_cast<uint16_t>(from[i])});
    return v;
  }
}

template <class T, int n>
CONELENS_INLINE Vec<int16_t, n> narrow(const Vec<float, n>& v) {
  if constexpr (n == 1) {
    return static_cast<int16_t>(Element<T>::store(v).bits);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    using Bits = Vec<uint32_t, n>;
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (Vec<int16_t, n>)convert<n, uint16_t, uint32_t>(v != v ? (bits >> 16) | 0x40u : rounded);
#if defined(__AVX512F__)
  } else if constexpr (n == 16) {
    return (Vec<int16_t, n>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(__F16C__)
  } else if constexpr (n == 8) {
    return (Vec<int16_t, n>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
  } else {
    Vec<int16_t, n> bits;
    for (int i = 0; i < n; ++i) bits[i] = static_cast<int16_t>(Element<T>::store(v[i]).bits);
    return bits;
  }
}

}  // namespace
}  // namespace conelens
