// Philox4x32-7 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"), for C++ and CUDA.
//
// gpt2_fast/ops/runtime/philox.py is the reference and says which eight elements share a block; kernels/philox.py is
// the Triton form, philox_simd.h the one in vectors.
#pragma once

#ifdef __CUDACC_RTC__
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
typedef unsigned short uint16_t;
#else
#include <stdint.h>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define GPT2_HOST_DEVICE __host__ __device__ __forceinline__
#define GPT2_HOST_DEVICE_MEMBER __host__ __device__ __forceinline__
#else
#define GPT2_HOST_DEVICE static inline __attribute__((always_inline))
#define GPT2_HOST_DEVICE_MEMBER inline __attribute__((always_inline))
#endif

namespace gpt2 {

constexpr int PHILOX_ROUNDS = 7;

struct PhiloxBlock {
  uint32_t word[4];

  // The number of element i of eight, in the high half; what is below it changes no comparison with a threshold.
  GPT2_HOST_DEVICE_MEMBER uint32_t number(int i) const { return i % 2 ? word[i / 2] : word[i / 2] << 16; }
};

GPT2_HOST_DEVICE PhiloxBlock philox4x32(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace gpt2
