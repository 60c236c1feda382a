/* The hidden layer of all experts in one walk over tokens and columns: what experts/hidden_torch.py says.

   T tokens, I columns (a multiple of LANES), E experts, S frozen products (1, or gate's and up's), R all ranks together.
   A block of tokens at a time, a tile of its columns at a time; in it an expert takes its tokens in groups of GROUP,
   whose numbers stay in the first cache from the frozen product to the last gradient. Everything is float32;
   frozen products, what comes out mixed, and its gradient are bfloat16 or float32 (`half`). */
#include "hidden.h"

#define GROUP 8
#define TILE 768
#define BLOCK 64
#define LARGEST_RANK 256

static inline vec sigmoid(vec q) { return reciprocal(1.f + exponential(-q)); }

#define ROOT 1.5957691216057308f /* sqrt(8 / pi) */
#define CUBE 0.044715f

static inline vec act(vec x, int64_t gelu) {
  return x * sigmoid(gelu ? ROOT * x * (1.f + CUBE * x * x) : x);
}

static inline vec act_and_slope(vec x, int64_t gelu, vec *slope) {
  vec s = sigmoid(gelu ? ROOT * x * (1.f + CUBE * x * x) : x);
  vec value = x * s;
  vec q = gelu ? ROOT * (1.f + 3 * CUBE * x * x) : same(1.f);
  *slope = s + value * (1.f - s) * q;
  return value;
}

typedef float tile[GROUP][TILE];

/* rows += few @ in, few (R, GROUP) */
static inline void outer(float *rows, int64_t stride, float (*few)[GROUP], tile in, int64_t R,
                         int64_t columns) {
  for (int64_t i = 0; i < columns; i += LANES) {
    vec part[GROUP];
    for (int t = 0; t < GROUP; t++) part[t] = load(&in[t][i]);
    for (int64_t r = 0; r < R; r++) {
      vec sum = load(rows + r * stride + i);
      for (int t = 0; t < GROUP; t++) sum += few[r][t] * part[t];
      store(rows + r * stride + i, sum);
    }
  }
}

/* few[token][r] += in @ rows^T, with `width` between tokens */
INLINE void reduce(float *few, int64_t width, const int64_t *tokens, int n, const float *rows, int64_t stride, tile in,
                   int64_t R, int64_t columns, const int size) {
  for (int64_t r = 0; r < R; r += 2) {
    int64_t next = r + 1 < R ? r + 1 : r;
    for (int first = 0; first < size; first += TALL) {
      const int tall = size < TALL ? size : TALL;
      vec one[TALL], two[TALL];
      for (int t = 0; t < tall; t++) one[t] = two[t] = same(0);
      for (int64_t i = 0; i < columns; i += LANES) {
        vec a = load(rows + r * stride + i), b = load(rows + next * stride + i);
        for (int t = 0; t < tall; t++) {
          vec x = load(&in[first + t][i]);
          one[t] += a * x;
          two[t] += b * x;
        }
      }
      for (int t = 0; t < tall && first + t < n; t++) {
        float *sums = few + tokens[first + t] * width;
        sums[r] += total(one[t]);
        if (next > r) sums[next] += total(two[t]);
      }
    }
  }
}

/* a group's rows of all (T, I) + low @ rows (R, I), and their low as few; low's tokens are `width` apart */
INLINE void with_low(tile z, const layer *l, const void *all, const float *low, int64_t width, const float *rows,
                     int64_t R, const int64_t *tokens, int n, int64_t from, int64_t columns, float (*few)[GROUP],
                     const int size) {
  int64_t at[GROUP];
  for (int t = 0; t < size; t++) {
    at[t] = tokens[t < n ? t : 0] * l->I + from;
    for (int64_t r = 0; r < R; r++) few[r][t] = t < n ? low[tokens[t] * width + r] : 0;
  }
  for (int64_t i = 0; i < columns; i += LANES) {
    vec sum[GROUP];
    for (int t = 0; t < size; t++) sum[t] = load_any(all, at[t] + i, l->half);
    for (int64_t r = 0; r < R; r++) {
      vec row = load(rows + r * l->I + from + i);
      for (int t = 0; t < size; t++) sum[t] += few[r][t] * row;
    }
    for (int t = 0; t < size; t++) store(&z[t][i], sum[t]);
  }
}

INLINE void z_of(tile z, const layer *l, const expert *e, int s, const int64_t *tokens, int n, int64_t from,
                 int64_t columns, float (*few)[GROUP], const int size) {
  const float *low = l->low + s * l->R + e->from, *B = l->B + (s * l->R + e->from) * l->I;
  with_low(z, l, l->frozen[s], low, l->S * l->R, B, e->rank, tokens, n, from, columns, few, size);
}

static int64_t tokens_of(int64_t *tokens, const layer *l, int64_t e, int64_t begin, int64_t end) {
  int64_t n = 0;
  for (int64_t t = begin; t < end; t++)
    if (l->all || l->weights[t * l->E + e] != 0) tokens[n++] = t;
  return n;
}

typedef struct { tile one, two, three, four; float sums[2][BLOCK][TILE]; float few[3][LARGEST_RANK][GROUP]; } workspace;

/* a block's tile of what is (T, I) */
static inline void write_sums(void *all, const layer *l, float (*sums)[TILE], int64_t begin, int64_t end, int64_t from,
                              int64_t columns) {
  for (int64_t t = begin; t < end; t++)
    for (int64_t i = 0; i < columns; i += LANES)
      store_any(all, t * l->I + from + i, l->half, load(&sums[t - begin][i]));
}

/* size: GROUP, or 1 for a single token, beside which seven zeros would be worked on */
INLINE void forward_block(const layer *l, workspace *w, int64_t begin, int64_t end, const int size) {
  int64_t tokens[BLOCK];
  for (int64_t from = 0; from < l->I; from += TILE) {
    int64_t columns = l->I - from < TILE ? l->I - from : TILE;
    memset(w->sums[0], 0, (end - begin) * sizeof w->sums[0][0]);
    for (int64_t k = 0; k < l->E; k++) {
      const expert *e = l->experts + k;
      int64_t own = tokens_of(tokens, l, k, begin, end);
      for (int64_t g = 0; g < own; g += size) {
        int n = own - g < size ? own - g : size;
        const int64_t *group = tokens + g;
        z_of(w->one, l, e, 0, group, n, from, columns, w->few[0], size);
        if (l->S == 2) z_of(w->two, l, e, 1, group, n, from, columns, w->few[0], size);
        for (int t = 0; t < size; t++) {
          float weight = t < n ? l->weights[group[t] * l->E + k] : 0;
          float *sum = w->sums[0][group[t < n ? t : 0] - begin];
          for (int64_t i = 0; i < columns; i += LANES) {
            vec h = act(load(&w->one[t][i]), l->act) * weight;
            if (l->S == 2) h *= load(&w->two[t][i]);
            store(&w->one[t][i], h);
            if (t < n) store(sum + i, load(sum + i) + h);
          }
        }
        reduce(l->out_low + e->from, l->R, group, n, l->A + e->from * l->I + from, l->I, w->one, e->rank, columns, size);
      }
    }
    write_sums(l->mixed, l, w->sums[0], begin, end, from, columns);
  }
}

static void backward_block(const layer *l, workspace *w, int64_t begin, int64_t end, int64_t thread) {
  int64_t tokens[BLOCK];
  for (int64_t from = 0; from < l->I; from += TILE) {
    int64_t columns = l->I - from < TILE ? l->I - from : TILE;
    memset(w->sums, 0, sizeof w->sums);
    for (int64_t k = 0; k < l->E; k++) {
      const expert *e = l->experts + k;
      int64_t own = tokens_of(tokens, l, k, begin, end), width = l->S * l->R, row = e->from * l->I + from;
      float *grad_A = l->grad_A && e->learns ? l->grad_A + thread * l->R * l->I : 0;
      float *grad_B = l->grad_B && e->learns ? l->grad_B + thread * width * l->I : 0;
      for (int64_t g = 0; g < own; g += GROUP) {
        int n = own - g < GROUP ? own - g : GROUP;
        const int64_t *group = tokens + g;
        z_of(w->one, l, e, 0, group, n, from, columns, w->few[0], GROUP);
        if (l->S == 2) z_of(w->two, l, e, 1, group, n, from, columns, w->few[1], GROUP);
        with_low(w->three, l, l->mixed, l->out_low + e->from, l->R, l->A + e->from * l->I, e->rank, group, n, from,
                 columns, w->few[2], GROUP);
        for (int t = 0; t < GROUP; t++) {
          float weight = t < n ? l->weights[group[t] * l->E + k] : 0;
          vec slope, dot = same(0);
          int64_t at = group[t < n ? t : 0] - begin;
          float *sum = w->sums[0][at], *sum_up = w->sums[1][at];
          for (int64_t i = 0; i < columns; i += LANES) {
            vec a = act_and_slope(load(&w->one[t][i]), l->act, &slope), grad_h = load(&w->three[t][i]);
            if (l->S == 2) {
              vec up = load(&w->two[t][i]), h = a * up;
              dot += grad_h * h;
              grad_h *= weight;
              store(&w->four[t][i], h);
              vec grad_gate = grad_h * slope * up, grad_up = grad_h * a;
              store(&w->one[t][i], grad_gate);
              store(&w->two[t][i], grad_up);
              if (t < n) { store(sum + i, load(sum + i) + grad_gate); store(sum_up + i, load(sum_up + i) + grad_up); }
            } else {
              dot += grad_h * a;
              vec grad_up = grad_h * weight * slope;
              store(&w->four[t][i], a);
              store(&w->one[t][i], grad_up);
              if (t < n) store(sum + i, load(sum + i) + grad_up);
            }
          }
          if (t < n && l->grad_weights) l->grad_weights[group[t] * l->E + k] += total(dot);
          if (grad_A) for (int64_t r = 0; r < e->rank; r++) w->few[2][r][t] *= weight;
        }
        if (grad_A) outer(grad_A + row, l->I, w->few[2], w->four, e->rank, columns);
        for (int s = 0; s < l->S; s++) {
          float (*grad)[TILE] = s ? w->two : w->one;
          float *grad_low = l->grad_low ? l->grad_low + s * l->R + e->from : 0;
          int64_t site = s * l->R * l->I + row;
          if (grad_low) reduce(grad_low, width, group, n, l->B + site, l->I, grad, e->rank, columns, GROUP);
          if (grad_B) outer(grad_B + site, l->I, w->few[s], grad, e->rank, columns);
        }
      }
    }
    for (int s = 0; s < l->S; s++) write_sums(l->grad_frozen[s], l, w->sums[s], begin, end, from, columns);
  }
}

static _Thread_local _Alignas(64) workspace space; /* a vector to a cache line */

static void walk(const layer *l, int is_backward) {
  int64_t block = (l->T + l->threads * GROUP - 1) / (l->threads * GROUP) * GROUP; /* something for each thread */
  if (block > BLOCK) block = BLOCK;
  int64_t blocks = (l->T + block - 1) / block;
#pragma omp parallel num_threads(l->threads)
  {
    int64_t thread = 0, threads = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num();
    threads = omp_get_num_threads();
#endif
    for (int64_t b = blocks * thread / threads; b < blocks * (thread + 1) / threads; b++) {
      int64_t begin = b * block, end = begin + block < l->T ? begin + block : l->T;
      if (is_backward) backward_block(l, &space, begin, end, thread);
      else if (l->T > 1) forward_block(l, &space, begin, end, GROUP);
      else forward_block(l, &space, begin, end, 1);
    }
  }
}

void forward(const layer *l) { walk(l, 0); }
void backward(const layer *l) { walk(l, 1); }

int64_t lanes(void) { return LANES; }

int64_t is_parallel(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
