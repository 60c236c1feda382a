/* What hidden.c is given: the hidden layer of T tokens, I columns (a multiple of LANES), E experts and S frozen products
   (1, or gate's and up's). R: all ranks together. */
#include "vectors.h"

typedef struct {
  int64_t from, rank;     /* its rows of R */
  int64_t learns;         /* else its rows of grad_B and grad_A stay as they are */
} expert;

typedef struct {
  int64_t T, I, R, E, S, half, act, all, threads;
  const void *frozen[2];  /* (T, I) */
  void *grad_frozen[2];
  const float *weights;   /* (T, E) */
  const float *low;       /* (T, S, R) */
  const float *B;         /* (S, R, I) */
  const float *A;         /* (R, I) */
  void *mixed;            /* (T, I): forward out, backward the gradient to it */
  float *out_low;         /* (T, R): forward h A^T, backward the gradient to it */
  float *grad_weights, *grad_low; /* or null */
  float *grad_B, *grad_A; /* (threads, ...) or null */
  const expert *experts;
} layer;

void forward(const layer *l);
void backward(const layer *l);

