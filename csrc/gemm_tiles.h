// The products of gemm_micro.h in Intel's tile registers, of pairs of bfloat16 whose A lies by rows.
//
// What does not fill a register is multiplied with it: rows of A and C up to a multiple of 16 are readable and
// writable, and so are units of A and B; of those past the end A's are finite and B's are 0. A thread has made
// TileRegisters.
#pragma once

#include "amx.h"

namespace gpt2 {
namespace GPT2_ISA {

// C[16 M][16 N] (+=, = unless ADDS) A[16 M][k_count] * B[k_count][16 N].
template <int M, int N, bool ADDS>
GPT2_INLINE void tiles_of(int64_t k_count, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                          int64_t ldc) {
  const int64_t row_a = lda * 4, row_b = ldb * 4, row_c = ldc * 4;
  const float *lower_a = a + TILE_ROWS * lda, *lower_c = c + TILE_ROWS * ldc;
  if (ADDS) {
    GPT2_TILE_LOAD(0, c, row_c);
    if (N == 2) GPT2_TILE_LOAD(1, c + W, row_c);
    if (M == 2) GPT2_TILE_LOAD(2, lower_c, row_c);
    if (M == 2 && N == 2) GPT2_TILE_LOAD(3, lower_c + W, row_c);
  } else {
    GPT2_TILE_ZERO(0);
    if (N == 2) GPT2_TILE_ZERO(1);
    if (M == 2) GPT2_TILE_ZERO(2);
    if (M == 2 && N == 2) GPT2_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < k_count; k += TILE_UNITS, b += TILE_UNITS * ldb) {
    GPT2_TILE_LOAD(6, b, row_b);
    GPT2_TILE_LOAD(4, a + k, row_a);
    GPT2_TILE_MULTIPLY(0, 4, 6);
    if (N == 2) GPT2_TILE_LOAD(7, b + W, row_b);
    if (N == 2) GPT2_TILE_MULTIPLY(1, 4, 7);
    if (M == 2) GPT2_TILE_LOAD(5, lower_a + k, row_a);
    if (M == 2) GPT2_TILE_MULTIPLY(2, 5, 6);
    if (M == 2 && N == 2) GPT2_TILE_MULTIPLY(3, 5, 7);
  }
  GPT2_TILE_STORE(0, c, row_c);
  if (N == 2) GPT2_TILE_STORE(1, c + W, row_c);
  if (M == 2) GPT2_TILE_STORE(2, lower_c, row_c);
  if (M == 2 && N == 2) GPT2_TILE_STORE(3, lower_c + W, row_c);
}

// n_count is a multiple of W. An element's sum does not depend on the sizes.
template <bool ADDS>
static __attribute__((noinline)) void gemm_tiles(int64_t m_count, int64_t n_count, int64_t k_count, const float* a,
                                                 int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  for (int64_t m = 0; m < m_count; m += 2 * TILE_ROWS)
    for (int64_t n = 0; n < n_count; n += 2 * W) {
      const float *at_a = a + m * lda, *at_b = b + n;
      float* at_c = c + m * ldc + n;
      const bool tall = m + TILE_ROWS < m_count, wide = n + W < n_count;
      if (tall && wide)
        tiles_of<2, 2, ADDS>(k_count, at_a, lda, at_b, ldb, at_c, ldc);
      else if (tall)
        tiles_of<2, 1, ADDS>(k_count, at_a, lda, at_b, ldb, at_c, ldc);
      else if (wide)
        tiles_of<1, 2, ADDS>(k_count, at_a, lda, at_b, ldb, at_c, ldc);
      else
        tiles_of<1, 1, ADDS>(k_count, at_a, lda, at_b, ldb, at_c, ldc);
    }
}

}  // namespace GPT2_ISA
}  // namespace gpt2
