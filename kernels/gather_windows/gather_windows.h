/* gather_windows: parameters and index arithmetic for every implementation. Rules: README.md. */
#ifndef CONELENS_GATHER_WINDOWS_H
#define CONELENS_GATHER_WINDOWS_H

#include "types.h"

typedef struct conelens_gather_windows_params {
  const void* base;          /* [samples, channels, height, width] */
  const void* patch;         /* [units, channels, patch_height, patch_width], or null */
  const void* patch_origin;  /* [units, 2] contiguous (y, x), int32 or int64; null without patch */
  const void* window_origin; /* likewise */
  const void* rows;          /* [units] contiguous, int32 or int64; null: sample u, or the only sample */
  void* out;                 /* [units, channels, out_height, out_width] */
  int64_t samples, units, channels, height, width, patch_height, patch_width, out_height, out_width;
  int64_t base_stride[4], patch_stride[4],
      out_stride[4];     /* in elements, axes n c y x; c or x is 1 in all three */
  uint64_t fill;         /* the bits of one element, in the lowest bytes */
  int32_t element_bytes; /* 1, 2, 4 or 8 */
  int32_t dtype;         /* CONELENS_FLOAT32 ...; read with add only */
  int32_t patch_origin_bytes, window_origin_bytes, rows_bytes; /* 4 or 8 */
  int32_t add;
} conelens_gather_windows_params;

#ifdef __cplusplus
namespace conelens::gather {

CONELENS_HD int64_t load_integer(const void* from, int64_t at, int32_t bytes) {
  return bytes == 8 ? static_cast<const int64_t*>(from)[at] : static_cast<const int32_t*>(from)[at];
}

/* A coordinate, cut off where nothing is any more, so that differences of two fit. */
CONELENS_HD int64_t coordinate(const void* origin, int64_t at, int32_t bytes) {
  constexpr int64_t far = int64_t{1} << 61;
  const int64_t value = load_integer(origin, at, bytes);
  return value < -far ? -far : (value > far ? far : value);
}

/* One axis of one unit, in cells of its window: cell i is map cell i + first, and patch cell i - shift. Cells
 * in [begin, end) lie inside the map, those in [patch_begin, patch_end), a part of it, come from the patch.
 */
struct Axis {
  int64_t first, shift, begin, end, patch_begin, patch_end;
};

CONELENS_HD int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

CONELENS_HD Axis axis(const conelens_gather_windows_params& p, int64_t unit, int which) {
  const int64_t out = which == 0 ? p.out_height : p.out_width;
  Axis a;
  a.first = coordinate(p.window_origin, 2 * unit + which, p.window_origin_bytes);
  a.begin = clamp(-a.first, 0, out);
  a.end = clamp((which == 0 ? p.height : p.width) - a.first, a.begin, out);
  a.shift = 0;
  a.patch_begin = a.patch_end = a.begin;
  if (p.patch) {
    a.shift = coordinate(p.patch_origin, 2 * unit + which, p.patch_origin_bytes) - a.first;
    a.patch_begin = clamp(a.shift, a.begin, a.end);
    a.patch_end = clamp(a.shift + (which == 0 ? p.patch_height : p.patch_width), a.patch_begin, a.end);
  }
  return a;
}

/* The sample of base that a unit reads, or -1: there is none. */
template <class Params>
CONELENS_HD int64_t sample(const Params& p, int64_t unit) {
  const int64_t row = p.rows ? load_integer(p.rows, unit, p.rows_bytes) : (p.samples == 1 ? 0 : unit);
  return row >= 0 && row < p.samples ? row : -1;
}

}  // namespace conelens::gather
#endif

#endif
