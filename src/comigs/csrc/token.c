/* One token's way through what experts change of a block, as text is written: what experts/token.py says.

   Such a product takes as long as its matrix takes to come from memory. So a row is read at a time, from its start to
   its end, which the processor sees and fetches ahead; several rows side by side take twice as long. Everything is
   float32; matrices, what comes in and what goes out are bfloat16 or float32 (`half`), frozen weights in GGUF's blocks of 32
   as well. Widths are multiples of LANES. */
#include "blocks.h"
#include "hidden.h"

#define COLUMNS 4096 /* at a time, of those that a thread makes */

typedef struct {
  int64_t I, O, R, half, type, turned;
  const void *weight;         /* (O, I), in blocks of `type` where that is not 0; (I, O) where it is turned */
  const void *change, *bias;  /* a frozen change (O, I) of the weight, and (O,); or null */
  const void *A, *B;          /* LoRA: (R, I), and (R, O) with its scale */
} linear;

typedef struct {
  layer hidden;               /* of one token, in float32; its frozen, weights, low, mixed and out_low are set here */
  linear in[2];               /* gate's and up's, or up's, without their LoRA */
  linear down;                /* its B is all experts', and its low is what `hidden` makes */
  const void *A;              /* (S * R, D): of all experts and in */
} mixture;

static inline float dot_of(const void *rows, int64_t at, const float *x, int64_t I, const int64_t half) {
  vec sum[4] = {{0}};
  int64_t i = 0;
  for (; i + 4 * LANES <= I; i += 4 * LANES)
    for (int k = 0; k < 4; k++) sum[k] += load(x + i + k * LANES) * load_any(rows, at + i + k * LANES, half);
  for (; i < I; i += LANES) sum[0] += load(x + i) * load_any(rows, at + i, half);
  return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

static inline float dot(const void *rows, int64_t row, const float *x, int64_t I, int64_t half) {
  return half ? dot_of(rows, row * I, x, I, 1) : dot_of(rows, row * I, x, I, 0);
}

static inline float block_dot_of(const uint8_t *block, const int64_t type, const float *x, int64_t I) {
  vec sum[VECTORS] = {{0}}, some[VECTORS];
  for (int64_t i = 0; i < I; i += 32, block += bytes_of(type)) {
    numbers_of(block, type, some);
    for (int k = 0; k < VECTORS; k++) sum[k] += load(x + i + k * LANES) * some[k];
  }
  for (int k = 1; k < VECTORS; k++) sum[0] += sum[k];
  return total(sum[0]);
}

static inline float weight_dot(const linear *l, int64_t row, const float *x) {
  if (!l->type) return dot(l->weight, row, x, l->I, l->half);
  const uint8_t *block = (const uint8_t *)l->weight + row * (l->I / 32) * bytes_of(l->type);
  if (l->type == Q8_0) return block_dot_of(block, Q8_0, x, l->I);
  return l->type == Q4_1 ? block_dot_of(block, Q4_1, x, l->I) : block_dot_of(block, Q4_0, x, l->I);
}

/* Both of these are shared by the threads of the region that calls them. */

/* low (R,) = A (R, I) @ x */
static void lower(float *low, const void *A, int64_t R, const float *x, int64_t I, int64_t half) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < R; r++) low[r] = dot(A, r, x, I, half);
}

/* sum (n,) = columns of a turned weight, from `from` on: a row after another here, too */
static void turned(float *sum, const linear *l, int64_t from, int64_t n, const float *x) {
  memset(sum, 0, n * sizeof *sum);
  for (int64_t i = 0; i < l->I; i++)
    for (int64_t k = 0; k < n; k += LANES)
      store(sum + k, load(sum + k) + x[i] * load_any(l->weight, i * l->O + from + k, l->half));
}

/* y (O,), from `at` on and of its own `half`, = (weight + change) @ x + bias + low @ B */
static void apply(void *y, int64_t at, int64_t half, int64_t threads, const linear *l, const float *x,
                  const float *low) {
  int64_t tile = whole((l->O + threads - 1) / threads);
  if (tile > COLUMNS) tile = COLUMNS;
#pragma omp for schedule(static)
  for (int64_t from = 0; from < l->O; from += tile) {
    int64_t n = l->O - from < tile ? l->O - from : tile;
    float some[COLUMNS];
    if (l->turned) turned(some, l, from, n, x);
    else
      for (int64_t k = 0; k < n; k++) some[k] = weight_dot(l, from + k, x);
    if (l->change)
      for (int64_t k = 0; k < n; k++) some[k] += dot(l->change, from + k, x, l->I, l->half);
    for (int64_t k = 0; k < n; k += LANES) {
      vec sum = load(some + k);
      if (l->bias) sum += load_any(l->bias, from + k, l->half);
      for (int64_t r = 0; r < l->R; r++) sum += low[r] * load_any(l->B, r * l->O + from + k, l->half);
      store_any(y, at + from + k, half, sum);
    }
  }
}

/* y: one after another what n linears make of x (I,) */
void token_linears(int64_t n, int64_t threads, const linear *const *all, const void *x, void *y) {
  int64_t I = all[0]->I, half = all[0]->half, R = 0;
  for (int64_t k = 0; k < n; k++) R += all[k]->R;
  float row[I], low[R + 1];
  take(row, x, 0, I, half);
#pragma omp parallel num_threads(threads)
  {
    float *own = low;
    for (int64_t k = 0; k < n; own += all[k]->R, k++) lower(own, all[k]->A, all[k]->R, row, I, half);
    int64_t at = 0;
    own = low;
    for (int64_t k = 0; k < n; at += all[k]->O, own += all[k]->R, k++) apply(y, at, half, threads, all[k], row, own);
  }
}

/* y (D,) of x (D,) and the experts' weights (E,) */
void token_mixture(int64_t threads, const mixture *m, const float *weights, const void *x, void *y) {
  layer h = m->hidden;
  int64_t D = m->in[0].I, half = m->down.half;
  float row[D], low[h.S * h.R], frozen[h.S][h.I], mixed[h.I], out_low[h.R];
  take(row, x, 0, D, half);
  memset(out_low, 0, sizeof out_low);
#pragma omp parallel num_threads(threads)
  {
    lower(low, m->A, h.S * h.R, row, D, half);
    for (int64_t s = 0; s < h.S; s++) apply(frozen[s], 0, 0, threads, m->in + s, row, 0);
  }
  for (int64_t s = 0; s < h.S; s++) h.frozen[s] = frozen[s];
  h.weights = weights, h.low = low, h.mixed = mixed, h.out_low = out_low;
  forward(&h);
#pragma omp parallel num_threads(threads)
  apply(y, 0, half, threads, &m->down, mixed, out_low);
}
