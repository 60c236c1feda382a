/* Numbers of GGUF's blocks of 32 (what bases/packed.py says), as bfloat16 or float32 (`half`). */
#include "vectors.h"

typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef int8_t small __attribute__((vector_size(LANES)));

enum { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8 }; /* as in ggml.h */

/* a float16, of which scales are: its exponent is moved to float32's by a product, which is exact */
static inline float short_float(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
  float x;
  memcpy(&x, &bits, 4);
  x *= 0x1p112f;
  return h & 0x8000 ? -x : x;
}

static inline vec numbers(bytes b) { return __builtin_convertvector(__builtin_convertvector(b, ints), vec); }

/* out: 32 numbers of each block */
void unpack(int64_t groups, int64_t type, int64_t half, int64_t threads, const uint8_t *blocks, void *out) {
  int64_t size = type == Q8_0 ? 34 : type == Q4_1 ? 20 : 18, head = type == Q4_1 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t *block = blocks + g * size;
    float scale = short_float(block), least = type == Q4_1 ? short_float(block + 2) : -8 * scale;
    vec first, second;
    if (type == Q8_0) {
      small low, high;
      memcpy(&low, block + head, LANES);
      memcpy(&high, block + head + LANES, LANES);
      first = __builtin_convertvector(__builtin_convertvector(low, ints), vec) * scale;
      second = __builtin_convertvector(__builtin_convertvector(high, ints), vec) * scale;
    } else {
      bytes both;
      memcpy(&both, block + head, LANES);
      first = numbers(both & 15) * scale + least;
      second = numbers(both >> 4) * scale + least;
    }
    store_any(out, g * 2 * LANES, half, first);
    store_any(out, g * 2 * LANES + LANES, half, second);
  }
}
