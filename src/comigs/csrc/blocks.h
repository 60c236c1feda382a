/* Numbers of GGUF's blocks of 32 (what bases/packed.py says). */
#include "vectors.h"

typedef uint8_t bytes __attribute__((vector_size(LANES)));

#define VECTORS (32 / LANES)

enum { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8 }; /* as in ggml.h */

static inline int64_t bytes_of(int64_t type) { return type == Q8_0 ? 34 : type == Q4_1 ? 20 : 18; }

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

/* a block's numbers, in order */
static inline void numbers_of(const uint8_t *block, int64_t type, vec out[VECTORS]) {
  float scale = short_float(block), least = type == Q4_1 ? short_float(block + 2) : -8 * scale;
  for (int k = 0; k < VECTORS; k++) {
    bytes some;
    if (type == Q8_0) { /* signed bytes, which GCC makes wider one at a time, as unsigned ones less 128 */
      memcpy(&some, block + 2 + k * LANES, LANES);
      out[k] = (numbers(some ^ 128) - 128.f) * scale;
    } else { /* the lower halves of 16 bytes, then the upper ones */
      memcpy(&some, block + (type == Q4_1 ? 4 : 2) + k * LANES % 16, LANES);
      out[k] = numbers(k * LANES < 16 ? some & 15 : some >> 4) * scale + least;
    }
  }
}
