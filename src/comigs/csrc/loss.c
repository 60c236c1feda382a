/* Cross-entropy of logits (C, V), bfloat16 or float32 (`half`), in one walk over each row: what client/loss.py says. */
#include <math.h>

#include "vectors.h"

/* LANES numbers of a row from column v, -inf beyond its end */
static inline vec columns(const void *logits, int64_t row, int64_t v, int64_t V, int64_t half) {
  if (v + LANES <= V) return load_any(logits, row * V + v, half);
  float part[LANES];
  uint16_t halves_part[LANES];
  for (int k = 0; k < LANES; k++) part[k] = -INFINITY, halves_part[k] = 0xff80;
  if (half) memcpy(halves_part, (const uint16_t *)logits + row * V + v, 2 * (V - v));
  else memcpy(part, (const float *)logits + row * V + v, 4 * (V - v));
  return load_any(half ? (void *)halves_part : (void *)part, 0, half);
}

static inline void put(void *logits, int64_t row, int64_t v, int64_t V, int64_t half, vec x) {
  if (v + LANES <= V) {
    store_any(logits, row * V + v, half, x);
    return;
  }
  float part[LANES];
  uint16_t halves_part[LANES];
  store_any(half ? (void *)halves_part : (void *)part, 0, half, x);
  if (half) memcpy((uint16_t *)logits + row * V + v, halves_part, 2 * (V - v));
  else memcpy((float *)logits + row * V + v, part, 4 * (V - v));
}

/* nats[c] = -log p(targets[c]); to_gradient: the logits become its gradient, p - [is target] */
void cross_entropy(int64_t C, int64_t V, int64_t half, int64_t to_gradient, int64_t threads, void *logits,
                   const int64_t *targets, float *nats) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < C; row++) {
    vec highest = same(-INFINITY), sum = same(0);
    for (int64_t v = 0; v < V; v += LANES) {
      vec x = columns(logits, row, v, V, half);
      highest = pick(x > highest, x, highest);
    }
    float top = highest[0];
    for (int k = 1; k < LANES; k++) top = highest[k] > top ? highest[k] : top;
    for (int64_t v = 0; v < V; v += LANES) sum += exponential(columns(logits, row, v, V, half) - top);
    float norm = total(sum), chosen = columns(logits, row, targets[row], V, half)[0], share = 1.f / norm;
    nats[row] = logf(norm) + top - chosen;
    if (!to_gradient) continue;
    for (int64_t v = 0; v < V; v += LANES) {
      vec p = exponential(columns(logits, row, v, V, half) - top) * share;
      if (targets[row] >= v && targets[row] < v + LANES) p[targets[row] - v] -= 1;
      put(logits, row, v, V, half, p);
    }
  }
}
