/* channel_peaks: parameters for every implementation. Rules: README.md. */
#ifndef CONELENS_CHANNEL_PEAKS_H
#define CONELENS_CHANNEL_PEAKS_H

#include "types.h"

enum { CONELENS_REDUCE_MAX = 0, CONELENS_REDUCE_SUM = 1, CONELENS_REDUCE_MEAN = 2 };

typedef struct conelens_channel_peaks_params {
  const void* x;      /* [batch, channels, height, width] */
  void* values;       /* [batch, channels] contiguous, x's dtype */
  int32_t* positions; /* [batch, channels] contiguous: y * width + x of the first maximum */
  int64_t batch, channels, height, width;
  int64_t x_stride[4]; /* in elements, axes n c y x; x or c is 1 */
  int32_t dtype;       /* CONELENS_FLOAT32 ... */
  int32_t reduce;      /* CONELENS_REDUCE_...: what values hold */
} conelens_channel_peaks_params;

#endif
