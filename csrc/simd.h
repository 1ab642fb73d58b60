// Vectors of the compiler (GCC, Clang), as wide as the instruction set at hand: plain operators and shuffles, which
// the compiler turns into the set's instructions. One lane is a plain number, so that edges share the same code.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__) || defined(__SSE2__)
#include <immintrin.h>
#endif

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

// element-wise conversion, e.g. of switches to the width of the values
template <class To, int lanes, class V>
CONELENS_INLINE Vec<To, lanes> convert(const V& v) {
  if constexpr (lanes == 1)
    return static_cast<To>(v);
  else
    return __builtin_convertvector(v, Vec<To, lanes>);
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
    return every_second<odd>(load_vec<V>(from), load_vec<V>(from + lanes), std::make_integer_sequence<int, lanes>{});
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

// The integer as wide as a lane of T, which comparisons give.
template <int bytes>
struct IntOfBytes;
template <>
struct IntOfBytes<2> {
  using type = int16_t;
};
template <>
struct IntOfBytes<4> {
  using type = int32_t;
};
template <>
struct IntOfBytes<8> {
  using type = int64_t;
};
template <class T>
using IntLike = typename IntOfBytes<sizeof(T)>::type;

}  // namespace
}  // namespace conelens
