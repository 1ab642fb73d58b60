/* edge_scores: parameters. Rules: README.md. */
#ifndef CONELENS_EDGE_SCORES_H
#define CONELENS_EDGE_SCORES_H

#include "types.h"

typedef struct conelens_edge_scores_params {
  const void* displacement; /* [images, nodes, 2] contiguous */
  const void* weight;       /* [images, nodes] contiguous */
  const void* parent;       /* [images, parents, 2] contiguous */
  const void* bandwidth;    /* [nodes] contiguous; null: squared differences */
  void* out;                /* [nodes, parents] contiguous */
  int64_t images, nodes, parents;
  int32_t dtype; /* CONELENS_FLOAT32 or CONELENS_FLOAT64, of everything */
} conelens_edge_scores_params;

#endif
