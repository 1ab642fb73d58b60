// What the CUDA kernels share: conversions, vectors of 1 to 16 bytes, index decoding, and the launch.
// tests/aot/emulation stands in for the CUDA headers, so that the same source also runs on the host, thread
// by thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "dtype.h"
#include "types.h"

namespace conelens::cuda {

#define CONELENS_DEVICE __device__ __forceinline__

constexpr int kThreads = 256;

// --- conversions: 16-bit floats are computed in float
// --------------------------------------------------------------

template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using Compute = typename Wide<T>::type;

CONELENS_DEVICE float widen(float value) {
  return value;
}
CONELENS_DEVICE double widen(double value) {
  return value;
}
CONELENS_DEVICE float widen(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return to_float(value);
#endif
}
CONELENS_DEVICE float widen(BFloat16 value) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
#else
  return to_float(value);
#endif
}

template <class T>
CONELENS_DEVICE T narrow(Compute<T> value) {
  if constexpr (sizeof(T) > 2) {
    return value;
#if defined(__CUDA_ARCH__)
  } else if constexpr (std::is_same_v<T, Half>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  } else {
    return Element<T>::store(value);
#endif
  }
}

// max(value, 0); NaN stays NaN
template <class C>
CONELENS_DEVICE C rectify(C value) {
  return value < C(0) ? C(0) : value;
}

// --- vectors: V elements in one access
// -----------------------------------------------------------------------------

template <int bytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using type = unsigned char;
};
template <>
struct BitsOf<2> {
  using type = unsigned short;
};
template <>
struct BitsOf<4> {
  using type = unsigned int;
};
template <>
struct BitsOf<8> {
  using type = uint2;
};
template <>
struct BitsOf<16> {
  using type = uint4;
};

// V neighbours at `from`, which is aligned to min(16, V * sizeof(T)) bytes
template <class T, int V>
CONELENS_DEVICE void load_vector(T (&to)[V], const T* from) {
  constexpr int bytes = V * sizeof(T) < 16 ? V * sizeof(T) : 16;
  using Bits = typename BitsOf<bytes>::type;
  constexpr int accesses = V * sizeof(T) / bytes;
  Bits bits[accesses];
#pragma unroll
  for (int i = 0; i < accesses; ++i) bits[i] = __ldg(reinterpret_cast<const Bits*>(from) + i);
  memcpy(to, bits, sizeof bits);
}

template <class T, int V>
CONELENS_DEVICE void store_vector(T* to, const T (&from)[V]) {
  constexpr int bytes = V * sizeof(T) < 16 ? V * sizeof(T) : 16;
  using Bits = typename BitsOf<bytes>::type;
  constexpr int accesses = V * sizeof(T) / bytes;
  Bits bits[accesses];
  memcpy(bits, from, sizeof bits);
#pragma unroll
  for (int i = 0; i < accesses; ++i)
    __stwb(reinterpret_cast<Bits*>(to) + i, bits[i]);  // a plain store gets split
}

template <class T>
CONELENS_DEVICE T load_one(const T* from) {
  T to[1];
  load_vector(to, from);
  return to[0];
}

// --- indices
// -------------------------------------------------------------------------------------------------------

// Splits off the fastest axis: returns index % size and leaves the quotient.
template <class Index>
CONELENS_DEVICE Index take_axis(Index& index, Index size) {
  const Index quotient = index / size, rest = index - quotient * size;
  index = quotient;
  return rest;
}

template <class Index>
CONELENS_DEVICE Index thread_index() {
  return static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
}

CONELENS_HD constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// body(uint32_t{}) while 32 bits can count the threads, else body(uint64_t{}): narrow divisions are much
// cheaper
template <class Body>
int dispatch_index(int64_t threads, const Body& body) {
  return threads < (int64_t{1} << 32) - 2 * kThreads ? body(uint32_t{}) : body(uint64_t{});
}

// All maps can be accessed V elements at a time along `axis`: neighbours, other strides and addresses
// multiples of V.
struct Layout {
  const void* data;
  const int64_t* stride;  // n c y x, in elements
  int bytes;              // per element
};
inline bool vectorises(const Layout& map, int axis, int v) {
  if (v == 1) return true;
  if (map.stride[axis] != 1) return false;
  for (int i = 0; i < 4; ++i)
    if (i != axis && map.stride[i] % v != 0) return false;
  const int bytes = v * map.bytes < 16 ? v * map.bytes : 16;
  return reinterpret_cast<uintptr_t>(map.data) % bytes == 0;
}

// --- launch
// --------------------------------------------------------------------------------------------------------

inline int launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? CONELENS_OK : CONELENS_CUDA_ERROR + static_cast<int>(error);
}

#if defined(__CUDACC__)
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), int64_t blocks, int threads, void* stream, Args&&... args) {
  if (blocks > std::numeric_limits<int32_t>::max()) return CONELENS_INVALID_ARGUMENT;
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      std::forward<Args>(args)...);
  return launch_status();
}
#endif

}  // namespace conelens::cuda
