/* max_pool2d_with_switches: parameters and index arithmetic for every implementation. Rules: README.md. */
#ifndef CONELENS_MAX_POOL2D_WITH_SWITCHES_H
#define CONELENS_MAX_POOL2D_WITH_SWITCHES_H

#include "types.h"

typedef struct conelens_max_pool2d_params {
  const void* x;  /* [batch, channels, height, width] */
  void* pooled;   /* [batch, channels, out_height, out_width], dtype of x */
  void* switches; /* same shape: uint8 or int32 */
  int64_t batch, channels, height, width, out_height, out_width;
  int64_t x_stride[4], pooled_stride[4], switches_stride[4]; /* in elements, axes n c y x */
  int64_t kernel[2], stride[2], padding[2], dilation[2];     /* y, x */
  int32_t dtype;                                             /* CONELENS_FLOAT32 ... */
  int32_t switch_bytes;                                      /* 1 up to 256 taps, or 4 */
  int32_t relu;
} conelens_max_pool2d_params;

#ifdef __cplusplus
namespace conelens::pool {

/* Window that starts at cell `start` (may be negative): its taps [first_tap, end_tap) lie inside a map of
 * `size`. */
CONELENS_HD int64_t first_tap(int64_t start, int64_t dilation) {
  return start >= 0 ? 0 : (dilation - 1 - start) / dilation;
}
CONELENS_HD int64_t end_tap(int64_t start, int64_t dilation, int64_t kernel, int64_t size) {
  if (start >= size) return 0;
  const int64_t inside = (size - 1 - start) / dilation + 1;
  return inside < kernel ? inside : kernel;
}

}  // namespace conelens::pool
#endif

#endif
