/* What every conelens kernel shares with its callers, in C: dtypes, error codes, and the mark for index
 * arithmetic that host and device both use. Sizes and strides are int64; strides count elements. */
#ifndef CONELENS_TYPES_H
#define CONELENS_TYPES_H

#include <stdint.h>

enum { CONELENS_FLOAT32 = 0, CONELENS_FLOAT16 = 1, CONELENS_BFLOAT16 = 2, CONELENS_FLOAT64 = 3 };

enum {
  CONELENS_OK = 0,
  CONELENS_UNSUPPORTED_DTYPE = 1,
  CONELENS_UNSUPPORTED_LAYOUT = 2,
  CONELENS_INVALID_SWITCH = 3,
  CONELENS_INVALID_ARGUMENT = 4,
  CONELENS_OUT_OF_MEMORY = 5,
  CONELENS_CUDA_ERROR = 1000 /* plus the cudaError_t */
};

#if defined(_WIN32)
#define CONELENS_API
#else
#define CONELENS_API __attribute__((visibility("default")))
#endif

#if defined(__CUDACC__)
#define CONELENS_HD static __host__ __device__ __forceinline__
#elif defined(__cplusplus)
#define CONELENS_HD [[maybe_unused]] static inline __attribute__((always_inline))
#else
#define CONELENS_HD static inline
#endif

#endif
