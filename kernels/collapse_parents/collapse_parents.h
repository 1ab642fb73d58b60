/* collapse_parents: parameters for every implementation. Rules: README.md. */
#ifndef CONELENS_COLLAPSE_PARENTS_H
#define CONELENS_COLLAPSE_PARENTS_H

#include "types.h"

typedef struct conelens_collapse_parents_params {
  const void* displacement; /* [images, parents, 2] contiguous */
  const void* sigma;        /* [parents] contiguous */
  const void* edges;        /* [nodes, edges_per_node] contiguous, int32 or int64, each in [0, parents) */
  void* shift;              /* [images, nodes, 2] contiguous */
  void* sigma_out;          /* [nodes] contiguous */
  void* log_agreement;      /* [images, nodes] contiguous */
  int64_t images, nodes, parents, edges_per_node;
  int32_t dtype;       /* CONELENS_FLOAT32 or CONELENS_FLOAT64, of all but the edges */
  int32_t edges_bytes; /* 4 or 8 */
} conelens_collapse_parents_params;

#endif
