/* Vectors of LANES float32, as any C compiler of GCC's family makes them of what the processor has. */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(_OPENMP) && defined(__APPLE__) /* whose compiler has no header, where the library is PyTorch's */
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#elif defined(_OPENMP)
#include <omp.h>
#endif

/* As wide as the processor's own: what is wider, compilers cut into pieces that go through memory. TALL: rows of sums, two
   vectors each, that stay in its registers beside what they are made of. */
#if defined(__AVX512F__)
#define LANES 16
#define TALL 8
#elif defined(__AVX__)
#define LANES 8
#define TALL 4
#elif defined(__aarch64__)
#define LANES 4
#define TALL 8
#else
#define LANES 4
#define TALL 4
#endif

#define INLINE static inline __attribute__((always_inline)) /* so that sizes are known where they are used */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec same(float x) { return x - (vec){0}; }

static inline vec load_any(const void *base, int64_t at, int64_t half) {
  if (!half) return load((const float *)base + at);
  halves h;
  memcpy(&h, (const uint16_t *)base + at, sizeof h);
  return (vec)(__builtin_convertvector(h, words) << 16);
}

static inline void store_any(void *base, int64_t at, int64_t half, vec v) {
  if (!half) { store((float *)base + at, v); return; }
  words bits = (words)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to the nearest, ties to even */
  words nan = (words)(v != v);
  bits = (bits & ~nan) | (nan & 0x7fc0);
  halves h = __builtin_convertvector(bits, halves);
  memcpy((uint16_t *)base + at, &h, sizeof h);
}

static inline vec pick(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }

#ifdef __AVX512DQ__
#include <immintrin.h>

/* 2^t, t = x log2(e) up to 126 on either side: a polynomial of t's fraction, 1e-7 from it at most */
static inline vec exponential(vec x) {
  vec t = _mm512_max_ps(same(-126.f), _mm512_min_ps(same(126.f), x * 1.44269504088896341f)); /* NaN stays */
  vec r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
  vec p = same(1.87757667e-3f);
  p = p * r + 8.98934e-3f;
  p = p * r + 5.582632e-2f;
  p = p * r + 0.24015361f;
  p = p * r + 0.6931531f;
  p = p * r + 0.99999994f;
  return _mm512_scalef_ps(p, t);
}

/* 1 / x of a usual number: 14 bits from the processor, all of them after a step of Newton's */
static inline vec reciprocal(vec x) {
  vec y = _mm512_rcp14_ps(x);
  return y + y * (1.f - x * y);
}
#else
/* As Cephes' expf: to 2^n of the nearest n, and a polynomial of the rest; beyond 87 as at 87, on either side. */
static inline vec exponential(vec x) {
  x = pick(x > 87.f, same(87.f), x);
  x = pick(x < -87.f, same(-87.f), x);
  vec n = (x * 1.44269504088896341f + 12582912.f) - 12582912.f;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = same(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
}

static inline vec reciprocal(vec x) { return 1.f / x; }
#endif

/* the sum of a vector's numbers, by halves: one after the other, each would wait for the last */
static inline float total(vec v) {
  typedef float four __attribute__((vector_size(16)));
  union { vec all; four part[LANES / 4]; } of = {v};
  for (int n = LANES / 8; n; n /= 2)
    for (int k = 0; k < n; k++) of.part[k] += of.part[k + n];
  four sum = of.part[0];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* n numbers in whole vectors */
static inline int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* d numbers as float32 into a row, and from it; the row is as long as whole(d), the rest of it stays as it is */
static inline void take(float *row, const void *from, int64_t at, int64_t d, int64_t half) {
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) store(row + i, load_any(from, at + i, half));
  for (; i < d; i++) {
    uint32_t bits = half ? (uint32_t)((const uint16_t *)from)[at + i] << 16 : 0;
    if (half) memcpy(row + i, &bits, 4);
    else row[i] = ((const float *)from)[at + i];
  }
}

static inline void give(void *to, int64_t at, const float *row, int64_t d, int64_t half) {
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) store_any(to, at + i, half, load(row + i));
  if (i == d) return;
  float rest[LANES] = {0}, *numbers = (float *)to + at + i;
  uint16_t halves_of_rest[LANES];
  memcpy(rest, row + i, 4 * (d - i));
  if (!half) memcpy(numbers, rest, 4 * (d - i));
  store_any(halves_of_rest, 0, 1, load(rest));
  if (half) memcpy((uint16_t *)to + at + i, halves_of_rest, 2 * (d - i));
}
