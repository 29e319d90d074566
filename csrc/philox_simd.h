// Dropout keep masks, W / 2 Philox blocks (2 * W neighbouring columns of one row) a call.
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
};

GPT2_INLINE Dropout dropout_of(addr rng, int64_t threshold, double scale, int64_t site) {
  uint64_t key = rng ? *(const uint64_t*)rng : 0;
  return {key, (uint32_t)threshold, (uint32_t)site, (float)scale};
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

// keep[i] = -1 where column col + i of `row` is kept, else 0, for KEEP_COLS columns; col is a multiple of 4.
// Each 64-bit lane runs one block, so a round needs no shuffle, only the products' own high and low halves.
GPT2_INLINE void keep_columns(const Dropout& d, uint32_t z, uint32_t row, int64_t col, int8_t* keep) {
  vq c0, c1 = vq{} + row, c2 = vq{} + z, c3 = vq{} + d.site;
  for (int i = 0; i < W / 2; ++i) c0[i] = (uint64_t)(uint32_t)(col >> 2) + i;
  uint32_t k0 = (uint32_t)d.key, k1 = (uint32_t)(d.key >> 32);
  for (int round = 0; round < 10; ++round) {
    vq p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // The four words of a block become the four bytes of a lane, in column order (little endian).
  vq low = vq{} + 0xffffffffull, limit = vq{} + (uint64_t)d.threshold;
  vq kept = (as<vq>((c0 & low) >= limit) & 0xffull) | (as<vq>((c1 & low) >= limit) & 0xff00ull) |
            (as<vq>((c2 & low) >= limit) & 0xff0000ull) | (as<vq>((c3 & low) >= limit) & 0xff000000ull);
  vq_low packed = __builtin_convertvector(kept, vq_low);
  memcpy(keep, &packed, sizeof(packed));
}

// x * scale where kept, 0 elsewhere (also where x is not finite).
GPT2_INLINE vf apply_keep(vf x, float scale, const int8_t* keep) {
  vb bytes;
  memcpy(&bytes, keep, sizeof(bytes));
  return as<vf>(as<vi>(x * scale) & __builtin_convertvector(bytes, vi));
}

}  // namespace GPT2_ISA
}  // namespace gpt2
