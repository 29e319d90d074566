// Dropout keep masks, W / 2 Philox blocks (2 * W neighbouring columns of one row) a vector.
#pragma once

#include "isa.h"

namespace gpt2 {
namespace GPT2_ISA {

typedef uint64_t vq __attribute__((vector_size(4 * W)));
typedef uint32_t vq_low __attribute__((vector_size(2 * W)));
typedef int8_t vb __attribute__((vector_size(W)));

constexpr int KEEP_COLS = 2 * W;

// What one forward pass draws for one dropout site. Kept values are multiplied by `scale`.
struct Dropout {
  uint64_t key;
  uint32_t threshold, site;
  float scale;
  bool on;
};

GPT2_INLINE Dropout dropout_of(addr rng, int64_t threshold, double scale, int64_t site) {
  uint64_t key = rng ? *(const uint64_t*)rng : 0;
  return {key, (uint32_t)threshold, (uint32_t)site, (float)scale, rng != 0};
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

// keep[i] = -1 where column col + i of `row` is kept, else 0, for N * KEEP_COLS columns; col is a multiple of 4.
// Each 64-bit lane runs one block, so a round needs no shuffle, only the products' own high and low halves. A
// round waits for its products, so N = 2 vectors side by side take little longer than one.
template <int N = 1>
GPT2_OUT_OF_LINE void keep_columns(const Dropout& d, uint32_t z, uint32_t row, int64_t col, int8_t* keep) {
  vq lane = {}, c0[N], c1[N], c2[N], c3[N];
  for (int i = 0; i < W / 2; ++i) lane[i] = i;
  for (int k = 0; k < N; ++k) {
    c0[k] = lane + (uint64_t)((col >> 2) + k * (W / 2));
    c1[k] = vq{} + row;
    c2[k] = vq{} + z;
    c3[k] = vq{} + d.site;
  }
  uint32_t k0 = (uint32_t)d.key, k1 = (uint32_t)(d.key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
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
  // The four words of a block become the four bytes of a lane, in column order (little endian).
  vq low = vq{} + 0xffffffffull, limit = vq{} + (uint64_t)d.threshold;
#pragma GCC unroll 2
  for (int k = 0; k < N; ++k) {
    vq kept = (as<vq>((c0[k] & low) >= limit) & 0xffull) | (as<vq>((c1[k] & low) >= limit) & 0xff00ull) |
              (as<vq>((c2[k] & low) >= limit) & 0xff0000ull) | (as<vq>((c3[k] & low) >= limit) & 0xff000000ull);
    vq_low packed = __builtin_convertvector(kept, vq_low);
    memcpy(keep + k * KEEP_COLS, &packed, sizeof(packed));
  }
}

// x * scale where kept, 0 elsewhere (also where x is not finite).
GPT2_INLINE vf apply_keep(vf x, float scale, const int8_t* keep) {
  vb bytes;
  memcpy(&bytes, keep, sizeof(bytes));
  return as<vf>(as<vi>(x * scale) & __builtin_convertvector(bytes, vi));
}

}  // namespace GPT2_ISA
}  // namespace gpt2
