/* relu_change: parameters and index arithmetic for every implementation. Rules: README.md. */
#ifndef CONELENS_RELU_CHANGE_H
#define CONELENS_RELU_CHANGE_H

#include "types.h"

typedef struct conelens_relu_change_params {
  const void* change; /* [units, channels, out_height, out_width] */
  const void* base;   /* [samples, channels, height, width] */
  const void* origin; /* [units, 2] contiguous (y, x), int32 or int64 */
  const void* rows;   /* [units] contiguous, int32 or int64; null: sample u, or the only sample */
  void* out;          /* like change; may be change itself, with its strides */
  int64_t samples, units, channels, height, width, out_height, out_width;
  int64_t change_stride[4], base_stride[4],
      out_stride[4];                /* in elements, axes n c y x; c or x is 1 in all three */
  int32_t dtype;                    /* CONELENS_FLOAT32 ... */
  int32_t origin_bytes, rows_bytes; /* 4 or 8 */
} conelens_relu_change_params;

#ifdef __cplusplus
#include "gather_windows.h"

namespace conelens::relu {

/* One axis of one unit: its cells [begin, end) lie inside the map, cell i on map cell i + first. */
struct Axis {
  int64_t first, begin, end;
};

CONELENS_HD Axis axis(const conelens_relu_change_params& p, int64_t unit, int which) {
  const int64_t out = which == 0 ? p.out_height : p.out_width;
  Axis a;
  a.first = gather::coordinate(p.origin, 2 * unit + which, p.origin_bytes);
  a.begin = gather::clamp(-a.first, 0, out);
  a.end = gather::clamp((which == 0 ? p.height : p.width) - a.first, a.begin, out);
  return a;
}

}  // namespace conelens::relu
#endif

#endif
