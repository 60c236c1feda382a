/* What a block does beside its products: norms by the root of the mean square, and rotation by position. What
   bases/norm.py and bases/rotation.py say. All in float32; what comes in and goes out is bfloat16 or float32 (`half`). */
#include <math.h>

#include "vectors.h"

/* y (T, D) = x / root * (weight + plus), where root = sqrt(mean x^2 + eps); inverse (T,) is 1 / root. D: whole vectors. */
void rms_norm_forward(int64_t T, int64_t D, int64_t half, int64_t threads, double eps, double plus, const void *x,
                      const void *weight, void *y, float *inverse) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < T; t++) {
    vec squares = same(0);
    for (int64_t i = 0; i < D; i += LANES) {
      vec part = load_any(x, t * D + i, half);
      squares += part * part;
    }
    float one = 1.f / sqrtf(total(squares) / D + (float)eps);
    inverse[t] = one;
    for (int64_t i = 0; i < D; i += LANES)
      store_any(y, t * D + i, half, load_any(x, t * D + i, half) * one * (load_any(weight, i, half) + (float)plus));
  }
}

/* grad_x = (g - n mean(g n)) / root, of g = grad (weight + plus) and n = x / root */
void rms_norm_backward(int64_t T, int64_t D, int64_t half, int64_t threads, double plus, const void *x,
                       const void *weight, const float *inverse, const void *grad, void *grad_x) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < T; t++) {
    float one = inverse[t];
    vec dot = same(0);
    for (int64_t i = 0; i < D; i += LANES) {
      vec g = load_any(grad, t * D + i, half) * (load_any(weight, i, half) + (float)plus);
      dot += g * load_any(x, t * D + i, half);
    }
    float mean = total(dot) * one / D;
    for (int64_t i = 0; i < D; i += LANES) {
      vec g = load_any(grad, t * D + i, half) * (load_any(weight, i, half) + (float)plus);
      store_any(grad_x, t * D + i, half, (g - load_any(x, t * D + i, half) * (one * mean)) * one);
    }
  }
}

/* y (B, L, H, d): the halves of each head's numbers turned by the token's angles, or back (`way` -1).
   cos and sin (B or 1, L, d): `window` between windows, or 0. d: two whole vectors, or more. */
void rotate(int64_t B, int64_t L, int64_t H, int64_t d, int64_t half, int64_t threads, int64_t window, int64_t token,
            double way, const void *x, const void *cosines, const void *sines, void *y) {
  int64_t middle = d / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < B * L; row++) {
    int64_t at = row / L * window + row % L * d, from = row * token;
    for (int64_t i = 0; i < middle; i += LANES) {
      vec c1 = load_any(cosines, at + i, half), c2 = load_any(cosines, at + middle + i, half);
      vec s1 = load_any(sines, at + i, half) * (float)way, s2 = load_any(sines, at + middle + i, half) * (float)way;
      for (int64_t h = 0; h < H; h++) {
        int64_t in = from + h * d + i, out = (row * H + h) * d + i;
        vec one = load_any(x, in, half), two = load_any(x, in + middle, half);
        /* back: the matrix of the turn, transposed */
        vec left = way > 0 ? s1 : s2, right = way > 0 ? s2 : s1;
        store_any(y, out, half, one * c1 - two * left);
        store_any(y, out + middle, half, two * c2 + one * right);
      }
    }
  }
}
