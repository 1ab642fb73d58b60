/* graph_e_step: parameters for every implementation. Rules: README.md. */
#ifndef CONELENS_GRAPH_E_STEP_H
#define CONELENS_GRAPH_E_STEP_H

#include "types.h"

typedef struct conelens_graph_e_step_params {
  const void* features; /* [images, channels, height, width], columns side by side */
  /* real: float64 for float64 features, else float32; contiguous */
  const void* mean;     /* real [channels, nodes, 2] (y, x) */
  const void* shift;    /* real [images, channels, nodes, 2], or null: none */
  const void* sigma;    /* real [channels, nodes] */
  const void* weight;   /* real [images, channels, nodes] by weight_stride */
  const void* tau;      /* real [images] */
  void* mass;           /* real [images, channels, nodes] */
  void* first;          /* real [images, channels, nodes, 2] */
  void* second;         /* real [images, channels, nodes] */
  void* log_likelihood; /* real [images, channels] */
  int32_t* position;    /* [images, channels, nodes], or null: no arg-max */
  void* score;          /* real [images, channels, nodes], or null */
  int64_t images, channels, nodes, height, width;
  int64_t features_stride[4], weight_stride[3]; /* in elements */
  double start[2], step[2];                     /* (y, x): cell (i, j) stands at start + step * (i, j) */
  int32_t dtype;                                /* CONELENS_FLOAT32 ... of features */
} conelens_graph_e_step_params;

#endif
