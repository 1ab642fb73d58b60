// Elements in 32-bit words, so that one instruction serves two 16-bit floats: a word holds one float, or two
// Half or BFloat16. Masks have all bits of a lane set or clear; selecting by them is plain bit logic.
#pragma once

#include "cuda_device.cuh"

namespace conelens::cuda {

template <class T>
constexpr int kLanes = 4 / sizeof(T);

// words that hold V elements; a single 16-bit element fills both lanes of one word
template <class T, int V>
constexpr int kWords = V < kLanes<T> ? 1 : V / kLanes<T>;

template <class T, int V>
CONELENS_DEVICE void to_words(uint32_t (&words)[kWords<T, V>], const T (&elements)[V]) {
  if constexpr (V < kLanes<T>) {
    words[0] = elements[0].bits * 0x10001u;
  } else {
    memcpy(words, elements, sizeof words);
  }
}

// element i of the words
template <class T, int N>
CONELENS_DEVICE T from_words(const uint32_t (&words)[N], int i) {
  T element;
  if constexpr (kLanes<T> == 1) {
    memcpy(&element, &words[i], sizeof element);
  } else {
    element.bits = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
  }
  return element;
}

// the same small number in every lane
template <class T>
CONELENS_DEVICE uint32_t in_lanes(uint32_t value) {
  return kLanes<T> == 1 ? value : value * 0x10001u;
}
template <class T>
CONELENS_DEVICE uint32_t lane_of(uint32_t word, int lane) {
  return kLanes<T> == 1 ? word : (word >> (lane * 16)) & 0xffffu;
}

CONELENS_DEVICE uint32_t select(uint32_t mask, uint32_t yes, uint32_t no) {
  return (mask & yes) | (~mask & no);
}

template <class T>
constexpr uint32_t kLowest = 0xff800000u;  // -infinity in every lane
template <>
constexpr uint32_t kLowest<Half> = 0xfc00fc00u;
template <>
constexpr uint32_t kLowest<BFloat16> = 0xff80ff80u;

// Lane by lane: the larger one (NaN when either is NaN), and masks of a == b and a > b (false for NaN).
template <class T>
struct LaneMath {
  template <class F>
  static CONELENS_DEVICE uint32_t each(uint32_t a, uint32_t b, const F& f) {  // the host's way
    const uint32_t as[1] = {a}, bs[1] = {b};
    uint32_t result = 0;
    for (int i = 0; i < kLanes<T>; ++i) {
      const uint32_t lane =
          f(widen(from_words<T>(as, i)), widen(from_words<T>(bs, i)), lane_of<T>(a, i), lane_of<T>(b, i));
      result |= kLanes<T> == 1 ? lane : (lane & 0xffffu) << (i * 16);
    }
    return result;
  }
};

#if defined(__CUDA_ARCH__)
CONELENS_DEVICE __half2 as_half2(uint32_t word) {
  return *reinterpret_cast<__half2*>(&word);
}
CONELENS_DEVICE __nv_bfloat162 as_bfloat162(uint32_t word) {
  return *reinterpret_cast<__nv_bfloat162*>(&word);
}
#endif

template <class T>
CONELENS_DEVICE uint32_t lane_max(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, Half>) {
    const __half2 larger = __hmax2_nan(as_half2(a), as_half2(b));
    return *reinterpret_cast<const uint32_t*>(&larger);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 larger = __hmax2_nan(as_bfloat162(a), as_bfloat162(b));
    return *reinterpret_cast<const uint32_t*>(&larger);
  } else {
    const float x = __uint_as_float(a), y = __uint_as_float(b);
    return __float_as_uint(x > y || x != x ? x : y);
  }
#else
  return LaneMath<T>::each(a, b,
                           [](float x, float y, uint32_t i, uint32_t j) { return x > y || x != x ? i : j; });
#endif
}

template <class T>
CONELENS_DEVICE uint32_t lane_equal(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, Half>) {
    return __heq2_mask(as_half2(a), as_half2(b));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __heq2_mask(as_bfloat162(a), as_bfloat162(b));
  } else {
    return __uint_as_float(a) == __uint_as_float(b) ? ~0u : 0u;
  }
#else
  return LaneMath<T>::each(a, b, [](float x, float y, uint32_t, uint32_t) { return x == y ? ~0u : 0u; });
#endif
}

template <class T>
CONELENS_DEVICE uint32_t lane_greater(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, Half>) {
    return __hgt2_mask(as_half2(a), as_half2(b));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __hgt2_mask(as_bfloat162(a), as_bfloat162(b));
  } else {
    return __uint_as_float(a) > __uint_as_float(b) ? ~0u : 0u;
  }
#else
  return LaneMath<T>::each(a, b, [](float x, float y, uint32_t, uint32_t) { return x > y ? ~0u : 0u; });
#endif
}

}  // namespace conelens::cuda
