/* max_unpool2d and its adjoint: parameters and index arithmetic for every implementation. Rules: README.md.
 */
#ifndef CONELENS_MAX_UNPOOL2D_H
#define CONELENS_MAX_UNPOOL2D_H

#include "types.h"

typedef struct conelens_max_unpool2d_params {
  const void* pooled;   /* [batch, channels, height, width]; written by the adjoint */
  const void* switches; /* same shape: uint8 or int32 */
  const void* origin;   /* [batch, 2] contiguous (y, x), int32 or int64; or null */
  void* out;            /* [batch, channels, out_height, out_width]; read by the adjoint */
  int64_t batch, channels, height, width, out_height, out_width;
  int64_t map_size[2]; /* the whole map (y, x); equals out_height, out_width without origin */
  int64_t pooled_stride[4], switches_stride[4], out_stride[4]; /* in elements, axes n c y x */
  int64_t kernel[2], stride[2], padding[2], dilation[2];       /* y, x */
  int32_t dtype;                                               /* CONELENS_FLOAT32 ... */
  int32_t switch_bytes;                                        /* 1 or 4 */
  int32_t origin_bytes;                                        /* 4 or 8 */
  int32_t relu;
} conelens_max_unpool2d_params;

#ifdef __cplusplus
namespace conelens::unpool {

/* One axis for one sample, in cells of the output. Pooled cell P writes cell P * stride - shift + dilation *
 * tap. Only cells in [begin, end) lie inside the map; the others are zero. */
struct Axis {
  int64_t kernel, stride, shift, dilation, pooled, begin, end;
};

CONELENS_HD Axis axis(const conelens_max_unpool2d_params& p, int64_t sample, int which) {
  Axis a;
  a.kernel = p.kernel[which];
  a.stride = p.stride[which];
  a.dilation = p.dilation[which];
  a.pooled = which == 0 ? p.height : p.width;
  const int64_t size = which == 0 ? p.out_height : p.out_width;
  a.begin = 0;
  a.end = size;
  a.shift = p.padding[which];
  if (p.origin) {
    const int64_t at = 2 * sample + which;
    const int64_t origin = p.origin_bytes == 8 ? static_cast<const int64_t*>(p.origin)[at]
                                               : static_cast<const int32_t*>(p.origin)[at];
    const int64_t first = origin * a.stride - a.shift; /* map coordinate of output cell 0 */
    a.shift = 0;
    a.begin = first < 0 ? -first : 0;
    a.end = p.map_size[which] - first;
    a.begin = a.begin < size ? a.begin : size;
    a.end = a.end < a.begin ? a.begin : (a.end < size ? a.end : size);
  }
  return a;
}

/* Pooled cell that reaches output cell `cell` through `tap`, or -1. */
CONELENS_HD int64_t source(const Axis& a, int64_t cell, int64_t tap) {
  const int64_t offset = cell + a.shift - a.dilation * tap;
  if (offset < 0) return -1;
  const int64_t at = offset / a.stride;
  return at < a.pooled && at * a.stride == offset ? at : -1;
}

}  // namespace conelens::unpool
#endif

#endif
