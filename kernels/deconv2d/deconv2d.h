/* deconv2d: parameters and index arithmetic for every compiled implementation. Rules and layouts: README.md.
 */
#ifndef CONELENS_DECONV2D_H
#define CONELENS_DECONV2D_H

#include "types.h"

typedef struct conelens_deconv2d_params {
  const void* y;        /* [batch, in_channels, y_size] */
  const void* switches; /* same shape: uint8 or int32; null without a pool */
  const void* weight;   /* [in_channels, out_channels / groups, kernel] */
  const void* origin;   /* [batch, 2] contiguous (y, x), int32 or int64; or null */
  void* out;            /* [batch, out_channels, out_size] */
  int64_t batch, in_channels, out_channels, groups;
  int64_t y_size[2], out_size[2];
  int64_t map_size[2];    /* the whole map that the filter acts on */
  int64_t output_size[2]; /* the whole map that it writes; equals out_size without origin */
  int64_t y_stride[4], switches_stride[4], weight_stride[4], out_stride[4]; /* in elements */
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t pool_kernel[2], pool_stride[2], pool_padding[2], pool_dilation[2];
  int32_t dtype;
  int32_t switch_bytes; /* 1 or 4 */
  int32_t origin_bytes; /* 4 or 8 */
  int32_t relu;
} conelens_deconv2d_params;

#ifdef __cplusplus
namespace conelens::deconv {

/* One axis. The signal is what the filter acts on: y, or y unpooled. Signal cell c and tap t reach out cell
 * c * stride - shift + dilation * t; a pooled cell and its tap reach signal cells by the same rule of the
 * pool. */
struct Axis {
  int64_t taps, stride, shift, dilation;
  int64_t pool_taps, pool_stride, pool_shift, pool_dilation;
  int64_t y, signal, out; /* cells */
};

CONELENS_HD Axis axis(const conelens_deconv2d_params& p, int which) {
  Axis a;
  a.taps = p.kernel[which], a.stride = p.stride[which], a.dilation = p.dilation[which];
  a.pool_taps = p.pool_kernel[which], a.pool_stride = p.pool_stride[which],
  a.pool_dilation = p.pool_dilation[which];
  a.shift = p.origin ? 0 : p.padding[which]; /* a window's own coordinates begin at its first reached cell */
  a.pool_shift = p.origin ? 0 : p.pool_padding[which];
  a.y = p.y_size[which], a.out = p.out_size[which];
  a.signal = !p.switches ? a.y
             : !p.origin ? p.map_size[which]
                         : (a.y - 1) * a.pool_stride + a.pool_dilation * (a.pool_taps - 1) + 1;
  return a;
}

struct Span {
  int64_t begin, end;
};

CONELENS_HD Span intersect(Span a, Span b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

/* Map coordinate of a sample's first signal cell; 0 without origin. */
CONELENS_HD int64_t first_signal(const conelens_deconv2d_params& p, int64_t sample, int which) {
  if (!p.origin) return 0;
  const int64_t at = 2 * sample + which;
  const int64_t origin = p.origin_bytes == 8 ? static_cast<const int64_t*>(p.origin)[at]
                                             : static_cast<const int32_t*>(p.origin)[at];
  return p.switches ? origin * p.pool_stride[which] - p.pool_padding[which] : origin;
}

/* Signal cells of a sample that lie inside the map. */
CONELENS_HD Span live_signal(const conelens_deconv2d_params& p, int64_t sample, int which, int64_t signal) {
  const int64_t first = first_signal(p, sample, which);
  return intersect({0, signal}, {-first, p.map_size[which] - first});
}

/* Out cells of a sample that lie inside the map written. */
CONELENS_HD Span live_out(const conelens_deconv2d_params& p, int64_t sample, int which) {
  if (!p.origin) return {0, p.out_size[which]};
  const int64_t first = first_signal(p, sample, which) * p.stride[which] - p.padding[which];
  return intersect({0, p.out_size[which]}, {-first, p.output_size[which] - first});
}

}  // namespace conelens::deconv
#endif

#endif
