// Element types of kernels and the dispatch over them. 16-bit floats are kept as bits and computed in float.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "types.h"

namespace conelens {
namespace {  // internal linkage: each ISA's objects keep their own copy

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

[[maybe_unused]] inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
[[maybe_unused]] inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] inline float to_float(BFloat16 value) {
  return bits_to_float(uint32_t{value.bits} << 16);
}
[[maybe_unused]] inline float to_float(Half value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // scaling by 2^112 moves the exponent's bias and makes subnormals normal, exactly
  const float magnitude = bits_to_float(rest << 13) * bits_to_float(0x77800000u);
  return bits_to_float(sign | float_to_bits(magnitude));
#endif
}

// round to nearest, ties to even
[[maybe_unused]] inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
[[maybe_unused]] inline Half to_half(float value) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (rest < 0x38800000u) {                                                 // subnormal: let the adder round
    const float shifted = bits_to_float(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  rest += 0xfffu + (rest >> 13 & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rest >> 13)};
#endif
}

// How an element type T is computed with.
template <class T>
struct Element {  // float, double
  using Compute = T;
  static Compute load(T value) { return value; }
  static T store(Compute value) { return value; }
};
template <>
struct Element<Half> {
  using Compute = float;
  static float load(Half value) { return to_float(value); }
  static Half store(float value) { return to_half(value); }
};
template <>
struct Element<BFloat16> {
  using Compute = float;
  static float load(BFloat16 value) { return to_float(value); }
  static BFloat16 store(float value) { return to_bfloat16(value); }
};

template <class T>
struct Type {
  using type = T;
};

// body(Type<T>{}) for the element type of a CONELENS_ dtype; body returns an error code.
template <class Body>
int dispatch_dtype(int32_t dtype, const Body& body) {
  switch (dtype) {
    case CONELENS_FLOAT32:
      return body(Type<float>{});
    case CONELENS_FLOAT16:
      return body(Type<Half>{});
    case CONELENS_BFLOAT16:
      return body(Type<BFloat16>{});
    case CONELENS_FLOAT64:
      return body(Type<double>{});
    default:
      return CONELENS_UNSUPPORTED_DTYPE;
  }
}

}  // namespace
}  // namespace conelens
