/* Numbers of GGUF's blocks of 32 (what bases/packed.py says), as bfloat16 or float32 (`half`). */
#include "blocks.h"

/* out: 32 numbers of each block */
void unpack(int64_t groups, int64_t type, int64_t half, int64_t threads, const uint8_t *blocks, void *out) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; g++) {
    vec some[VECTORS];
    numbers_of(blocks + g * bytes_of(type), type, some);
    for (int k = 0; k < VECTORS; k++) store_any(out, g * 32 + k * LANES, half, some[k]);
  }
}
