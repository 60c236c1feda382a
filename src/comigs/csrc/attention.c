/* Causal attention of whole windows, forward and backward: what bases/attention.py says.

   B windows of L tokens, H heads of d numbers, G of them of keys and values (H / G heads share one). A task is a window's
   key head: its keys and values become float32 once, and ROWS queries at a time meet those before them, so that no
   (L, L) matrix is ever written. Everything is float32; what comes in and goes out is bfloat16 or float32 (`half`). */
#include <math.h>

#include "vectors.h"

#define ROWS 8

typedef struct {
  const void *at;
  int64_t window, head, token; /* strides; a head's numbers are next to each other */
} view;

typedef struct {
  int64_t B, H, G, L, d, half, threads;
  double scale;
  view q, k, v, grad;        /* grad: of the result, backward only */
  const uint8_t *mask;       /* (., L, L) whether a query reads a key, beside being after it; or null: every one */
  int64_t mask_window;       /* stride */
  void *out;                 /* (B, L, H, d): the result */
  float *log_sums;           /* (B, H, L): forward out, backward in */
  void *grad_q, *grad_k, *grad_v; /* (B, L, H or G, d) */
  float *room;               /* (threads, attention_room(L, d)) */
} call;

/* What a task works in: W columns for d, N columns for L, both whole vectors, 0 beyond what there is. */
typedef struct {
  int64_t W, N;
  float *k, *k_turned, *v, *v_turned; /* (L, W), turned (W, N) */
  float *grad_k, *grad_v;             /* (L, W) */
  float *q, *read, *grad;             /* (ROWS, W): read forward what is read, backward the gradient to q */
  float *p, *grad_p;                  /* (ROWS, N) */
} space;

static void turn(float *turned, int64_t N, const float *rows, int64_t W, int64_t L) {
  for (int64_t j = 0; j < L; j++)
    for (int64_t i = 0; i < W; i++) turned[i * N + j] = rows[j * W + i];
}

/* out (tall, vectors) = a (tall, m) @ b (m, vectors) */
INLINE void piece(float *out, int64_t stride, const float *a, int64_t stride_a, const float *b, int64_t stride_b, int64_t m,
                  const int tall, const int vectors) {
  vec sum[ROWS][2];
  for (int t = 0; t < tall; t++)
    for (int k = 0; k < vectors; k++) sum[t][k] = same(0);
  for (int64_t r = 0; r < m; r++)
    for (int k = 0; k < vectors; k++) {
      vec some = load(b + r * stride_b + k * LANES);
      for (int t = 0; t < tall; t++) sum[t][k] += a[t * stride_a + r] * some;
    }
  for (int t = 0; t < tall; t++)
    for (int k = 0; k < vectors; k++) store(out + t * stride + k * LANES, sum[t][k]);
}

/* out (ROWS, n) = a (ROWS, m) @ b (m, n), n in whole vectors */
static inline void product(float *out, int64_t stride, const float *a, int64_t stride_a, const float *b, int64_t stride_b,
                           int64_t m, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES)
    for (int t = 0; t < ROWS; t += TALL)
      piece(out + t * stride + i, stride, a + t * stride_a, stride_a, b + i, stride_b, m, TALL, 2);
  if (i < n) piece(out + i, stride, a, stride_a, b + i, stride_b, m, ROWS, 1);
}

/* out (m, W) += a^T @ b, a (ROWS, m), b (ROWS, W) */
static inline void outer(float *out, const float *a, int64_t stride_a, const float *b, int64_t W, int64_t m) {
  for (int64_t i = 0; i < W; i += LANES) {
    vec part[ROWS];
    for (int t = 0; t < ROWS; t++) part[t] = load(b + t * W + i);
    for (int64_t r = 0; r < m; r++) {
      vec sum = load(out + r * W + i);
      for (int t = 0; t < ROWS; t++) sum += a[t * stride_a + r] * part[t];
      store(out + r * W + i, sum);
    }
  }
}

static const uint8_t *allowed(const call *c, int64_t b, int64_t row) {
  return c->mask ? c->mask + b * c->mask_window + row * c->L : 0;
}

/* What a query must not read becomes minus infinity. */
static void forbid(const call *c, float *scores, int64_t b, int64_t row, int64_t n) {
  const uint8_t *reads = allowed(c, b, row);
  for (int64_t j = 0; reads && j <= row && j < c->L; j++)
    if (!reads[j]) scores[j] = -INFINITY;
  for (int64_t j = row + 1; j < n; j++) scores[j] = -INFINITY;
}

/* exp(score - least) of a row, 0 where it must not read; returns the sum */
static inline float to_weights(float *scores, float least, int64_t n) {
  vec never = same(-INFINITY), sum = same(0);
  for (int64_t j = 0; j < n; j += LANES) {
    vec s = load(scores + j), weight = pick(s == never, same(0), exponential(s - least));
    store(scores + j, weight);
    sum += weight;
  }
  return total(sum);
}

static inline float highest_of(const float *scores, int64_t n) {
  vec top = same(-INFINITY);
  for (int64_t j = 0; j < n; j += LANES) {
    vec s = load(scores + j);
    top = pick(s > top, s, top);
  }
  float highest = top[0];
  for (int i = 1; i < LANES; i++) highest = top[i] > highest ? top[i] : highest;
  return highest == -INFINITY ? 0 : highest; /* it reads nothing: its weights are 0 */
}

static void take_rows(float *rows, view from, int64_t b, int64_t h, int64_t first, int64_t count, int64_t W, int64_t d,
                      int64_t half) {
  for (int64_t t = 0; t < count; t++)
    take(rows + t * W, from.at, b * from.window + h * from.head + (first + t) * from.token, d, half);
}

/* the scores of the queries from `first` on, of which there are `count` */
static void scores(const call *c, space *s, int64_t b, int64_t h, int64_t first, int64_t count, int64_t n) {
  memset(s->q, 0, 4 * ROWS * s->W);
  take_rows(s->q, c->q, b, h, first, count, s->W, c->d, c->half);
  for (int64_t i = 0; i < ROWS * s->W; i += LANES) store(s->q + i, load(s->q + i) * (float)c->scale);
  product(s->p, s->N, s->q, s->W, s->k_turned, s->N, s->W, n);
  for (int64_t t = 0; t < ROWS; t++) forbid(c, s->p + t * s->N, b, first + (t < count ? t : 0), n);
}

static void forward_head(const call *c, space *s, int64_t b, int64_t h) {
  for (int64_t first = 0; first < c->L; first += ROWS) {
    int64_t count = c->L - first < ROWS ? c->L - first : ROWS, keys = first + count, n = whole(keys);
    scores(c, s, b, h, first, count, n);
    float sums[ROWS];
    for (int64_t t = 0; t < count; t++) {
      float highest = highest_of(s->p + t * s->N, n);
      sums[t] = to_weights(s->p + t * s->N, highest, n);
      c->log_sums[(b * c->H + h) * c->L + first + t] = sums[t] ? logf(sums[t]) + highest : 0;
    }
    product(s->read, s->W, s->p, s->N, s->v, s->W, keys, s->W);
    for (int64_t t = 0; t < count; t++) {
      float *read = s->read + t * s->W, share = sums[t] ? 1.f / sums[t] : 0;
      for (int64_t i = 0; i < s->W; i += LANES) store(read + i, load(read + i) * share);
      give(c->out, ((b * c->L + first + t) * c->H + h) * c->d, read, c->d, c->half);
    }
  }
}

static void backward_head(const call *c, space *s, int64_t b, int64_t h) {
  for (int64_t first = 0; first < c->L; first += ROWS) {
    int64_t count = c->L - first < ROWS ? c->L - first : ROWS, keys = first + count, n = whole(keys);
    scores(c, s, b, h, first, count, n);
    for (int64_t t = 0; t < ROWS; t++) {
      float *weights = s->p + t * s->N;
      if (t < count) to_weights(weights, c->log_sums[(b * c->H + h) * c->L + first + t], n);
      else memset(weights, 0, 4 * n);
    }
    memset(s->grad, 0, 4 * ROWS * s->W);
    take_rows(s->grad, c->grad, b, h, first, count, s->W, c->d, c->half);
    outer(s->grad_v, s->p, s->N, s->grad, s->W, keys);
    product(s->grad_p, s->N, s->grad, s->W, s->v_turned, s->N, s->W, n);

    /* through the softmax: p (grad_p - sum p grad_p) */
    for (int64_t t = 0; t < ROWS; t++) {
      float *weights = s->p + t * s->N, *grads = s->grad_p + t * s->N;
      vec dot = same(0);
      for (int64_t j = 0; j < n; j += LANES) dot += load(weights + j) * load(grads + j);
      float all = total(dot);
      for (int64_t j = 0; j < n; j += LANES) store(grads + j, load(weights + j) * (load(grads + j) - all));
    }
    outer(s->grad_k, s->grad_p, s->N, s->q, s->W, keys); /* q holds the scale already */
    product(s->read, s->W, s->grad_p, s->N, s->k, s->W, keys, s->W);
    for (int64_t i = 0; i < ROWS * s->W; i += LANES) store(s->read + i, load(s->read + i) * (float)c->scale);
    for (int64_t t = 0; t < count; t++)
      give(c->grad_q, ((b * c->L + first + t) * c->H + h) * c->d, s->read + t * s->W, c->d, c->half);
  }
}

static void task(const call *c, space *s, int64_t b, int64_t g, int is_backward) {
  take_rows(s->k, c->k, b, g, 0, c->L, s->W, c->d, c->half);
  take_rows(s->v, c->v, b, g, 0, c->L, s->W, c->d, c->half);
  turn(s->k_turned, s->N, s->k, s->W, c->L);
  if (is_backward) {
    turn(s->v_turned, s->N, s->v, s->W, c->L);
    memset(s->grad_k, 0, 4 * c->L * s->W);
    memset(s->grad_v, 0, 4 * c->L * s->W);
  }
  int64_t share = c->H / c->G;
  for (int64_t h = g * share; h < (g + 1) * share; h++)
    if (is_backward) backward_head(c, s, b, h);
    else forward_head(c, s, b, h);
  for (int64_t j = 0; is_backward && j < c->L; j++) {
    int64_t at = ((b * c->L + j) * c->G + g) * c->d;
    give(c->grad_k, at, s->grad_k + j * s->W, c->d, c->half);
    give(c->grad_v, at, s->grad_v + j * s->W, c->d, c->half);
  }
}

/* numbers that a thread works in */
int64_t attention_room(int64_t L, int64_t d) {
  int64_t W = whole(d), N = whole(L);
  return 4 * L * W + 2 * W * N + ROWS * (3 * W + 2 * N);
}

static float *part(float **room, int64_t size) {
  *room += size;
  return *room - size;
}

static void walk(const call *c, int is_backward) {
  int64_t W = whole(c->d), N = whole(c->L), size = attention_room(c->L, c->d);
#pragma omp parallel num_threads(c->threads)
  {
    int64_t thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    float *room = c->room + thread * size;
    memset(room, 0, 4 * size); /* what is beyond d and L stays 0 */
    space s = {.W = W, .N = N};
    float **tall[] = {&s.k, &s.v, &s.grad_k, &s.grad_v}, **turned[] = {&s.k_turned, &s.v_turned};
    float **few[] = {&s.q, &s.read, &s.grad}, **wide[] = {&s.p, &s.grad_p};
    for (int i = 0; i < 4; i++) *tall[i] = part(&room, c->L * W);
    for (int i = 0; i < 2; i++) *turned[i] = part(&room, W * N);
    for (int i = 0; i < 3; i++) *few[i] = part(&room, ROWS * W);
    for (int i = 0; i < 2; i++) *wide[i] = part(&room, ROWS * N);
    /* A task writes what no other does, so that it may be any thread's. */
#pragma omp for schedule(dynamic)
    for (int64_t one = 0; one < c->B * c->G; one++) task(c, &s, one / c->G, one % c->G, is_backward);
  }
}

void attention_forward(const call *c) { walk(c, 0); }
void attention_backward(const call *c) { walk(c, 1); }
