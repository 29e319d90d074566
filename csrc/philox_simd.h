// Dropout keep masks, W / 2 Philox blocks a vector: of a row's 4 * W neighbouring columns, or of a tile of attention.
#pragma once

#include "isa.h"
#include "kernels.h"
#include "philox.h"

namespace gpt2 {
namespace GPT2_ISA {

typedef uint64_t vq __attribute__((vector_size(4 * W)));
typedef int8_t vb __attribute__((vector_size(W)));

constexpr int KEEP_COLS = 4 * W, KEEP_KEYS = 16;

// What one forward pass draws for one dropout site. Kept values are multiplied by `scale`.
struct Dropout {
  uint64_t key;
  uint32_t threshold, site;
  float scale;
  bool on;
};

GPT2_INLINE Dropout dropout_of(const Drop& d) {
  uint64_t key = d.key ? *(const uint64_t*)d.key : 0;
  return {key, (uint32_t)d.threshold, (uint32_t)d.site, (float)d.scale, d.key != 0};
}

// 64-bit products of the low halves; whatever the high halves hold is ignored.
GPT2_INLINE vq multiply_low(vq a, uint32_t m) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffull) * (uint64_t)m;
#endif
}

// The high halves in place of the low ones; the high halves are then of no account. A shift, but not on the port
// that multiplies.
GPT2_INLINE vq high_half(vq p) {
#if defined(__AVX512F__)
  return (vq)_mm512_shuffle_epi32((__m512i)p, (_MM_PERM_ENUM)0xF5);
#elif defined(__AVX2__)
  return (vq)_mm256_shuffle_epi32((__m256i)p, 0xF5);
#else
  return p >> 32;
#endif
}

// Philox of N vectors of counters. Only low halves count: what the high ones hold changes nothing. Each 64-bit lane
// runs one block, so a round needs no shuffle, only the products' own high and low halves. A round waits for its
// products, so N = 2 vectors side by side take little longer than one.
template <int N>
GPT2_INLINE void philox_rounds(uint64_t key, vq (&c0)[N], vq (&c1)[N], vq (&c2)[N], vq (&c3)[N]) {
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
#pragma GCC unroll 2
    for (int k = 0; k < N; ++k) {
      vq p0 = multiply_low(c0[k], 0xD2511F53u), p1 = multiply_low(c2[k], 0xCD9E8D57u);
      c0[k] = high_half(p1) ^ c1[k] ^ (uint64_t)k0;
      c1[k] = p1;
      c2[k] = high_half(p0) ^ c3[k] ^ (uint64_t)k1;
      c3[k] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// keep[i] = -1 where column col + i of `row` is kept, else 0, for N * KEEP_COLS columns; col is a multiple of 8.
template <int N = 1>
GPT2_OUT_OF_LINE void keep_columns(const Dropout& d, uint32_t row, int64_t col, int8_t* keep) {
  vq lane = {}, word[4][N];
  for (int i = 0; i < W / 2; ++i) lane[i] = i;
  for (int k = 0; k < N; ++k) {
    word[0][k] = lane + (uint64_t)((col >> 3) + k * (W / 2));
    word[1][k] = vq{} + row;
    word[2][k] = vq{};
    word[3][k] = vq{} + d.site;
  }
  philox_rounds<N>(d.key, word[0], word[1], word[2], word[3]);
  // The eight numbers of a block become the eight bytes of a lane, in column order (little endian).
  const vq limit = vq{} + ((uint64_t)d.threshold << 32);
#pragma GCC unroll 2
  for (int k = 0; k < N; ++k) {
    vq kept = {};
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) kept |= as<vq>((word[i / 2][k] << (i % 2 ? 32 : 48)) >= limit) & (0xffull << (8 * i));
    memcpy(keep + k * KEEP_COLS, &kept, sizeof(kept));
  }
}

// x * scale where kept, 0 elsewhere (also where x is not finite).
GPT2_INLINE vf apply_keep(vf x, float scale, const int8_t* keep) {
  vb bytes;
  memcpy(&bytes, keep, sizeof(bytes));
  return as<vf>(as<vi>(x * scale) & __builtin_convertvector(bytes, vi));
}

// Numbers of W queries, from `query` on, and of the two keys that differ in bit 0, one in each half of a lane. `high`
// is bit 3 of these keys; queries whose bit 3 is set have the second pair of words.
GPT2_INLINE vu numbers_of(const vq (&word)[4][2], int i, int64_t query, int high) {
#if defined(__AVX512F__)
  const __m512i low_halves = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return (vu)_mm512_permutex2var_epi32((__m512i)word[high][i], low_halves, (__m512i)word[2 + high][i]);
#else
  const vq* words = word[2 * (query >> 3 & 1) + high];
  return as<vu>((words[0] & 0xffffffffull) | (words[1] << 32));
#endif
}

// keep[j]: which of W queries keep key `key` + j of head z; `query` is a multiple of W and `key` of KEEP_KEYS.
GPT2_OUT_OF_LINE void keep_keys(const Dropout& d, uint32_t z, int64_t query, int64_t key, vi (&keep)[KEEP_KEYS]) {
  // Two vectors side by side: 16 queries are 8 blocks, and the next two keys' are taken with them; fewer queries are a
  // block each, the even and the odd ones.
  constexpr bool WHOLE = W == 16;
  vq row = {};
  for (int i = 0; i < W / 2; ++i) row[i] = (query >> 4 << 3) + (query & 7) + (WHOLE ? i : 2 * i);
  for (int k = 0; k < 4; k += WHOLE ? 2 : 1) {
    vq word[4][2];
    for (int i = 0; i < 2; ++i) {
      word[0][i] = vq{} + (uint64_t)((key >> 2) + k + (WHOLE ? i : 0));
      word[1][i] = row + (uint64_t)(WHOLE ? 0 : i);
      word[2][i] = vq{} + (uint64_t)z;
      word[3][i] = vq{} + (uint64_t)d.site;
    }
    philox_rounds<2>(d.key, word[0], word[1], word[2], word[3]);
    for (int i = 0; i < (WHOLE ? 2 : 1); ++i)
      for (int high = 0; high < 2; ++high) {
        const vu numbers = numbers_of(word, i, query, high), limit = vu{} + d.threshold;
        vi* pair = keep + 8 * high + 2 * (k + i);
        pair[0] = (vi)((numbers << 16) >= limit);
        pair[1] = (vi)(numbers >= limit);
      }
  }
}

}  // namespace GPT2_ISA
}  // namespace gpt2
