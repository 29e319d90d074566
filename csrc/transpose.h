// Transposing W x W floats in registers.
#pragma once

#include "isa.h"

namespace gpt2 {
namespace GPT2_ISA {

// Rows become columns.
#if defined(__AVX512F__)
GPT2_INLINE void transpose(vf (&x)[W]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
  }
  __m512 u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512 a = _mm512_shuffle_f32x4(u[j], u[j + 4], 0x88), b = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0x88);
    __m512 c = _mm512_shuffle_f32x4(u[j], u[j + 4], 0xdd), d = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0xdd);
    x[j] = (vf)_mm512_shuffle_f32x4(a, b, 0x88);
    x[j + 4] = (vf)_mm512_shuffle_f32x4(c, d, 0x88);
    x[j + 8] = (vf)_mm512_shuffle_f32x4(a, b, 0xdd);
    x[j + 12] = (vf)_mm512_shuffle_f32x4(c, d, 0xdd);
  }
}
#elif defined(__AVX2__)
GPT2_INLINE void transpose(vf (&x)[W]) {
  __m256 u[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    __m256 a = _mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
    __m256 b = _mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
    __m256 c = _mm256_unpacklo_ps((__m256)x[i + 2], (__m256)x[i + 3]);
    __m256 d = _mm256_unpackhi_ps((__m256)x[i + 2], (__m256)x[i + 3]);
    u[i] = _mm256_shuffle_ps(a, c, 0x44);
    u[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    u[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    u[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    x[j] = (vf)_mm256_permute2f128_ps(u[j], u[j + 4], 0x20);
    x[j + 4] = (vf)_mm256_permute2f128_ps(u[j], u[j + 4], 0x31);
  }
}
#elif defined(__SSE2__)
GPT2_INLINE void transpose(vf (&x)[W]) {
  __m128 a = (__m128)x[0], b = (__m128)x[1], c = (__m128)x[2], d = (__m128)x[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  x[0] = (vf)a, x[1] = (vf)b, x[2] = (vf)c, x[3] = (vf)d;
}
#else
GPT2_INLINE void transpose(vf (&x)[W]) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      float swap = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = swap;
    }
}
#endif

}  // namespace GPT2_ISA
}  // namespace gpt2
