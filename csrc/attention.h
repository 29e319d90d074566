// Kernels of attention.cpp, for kernels.h.
#pragma once

#include <stdint.h>

namespace gpt2 {
// Keys of one task of the backward pass, and of one split in decoding; Python is told it as _C.ATTENTION_KEY_GROUP.
constexpr int64_t ATTENTION_KEY_GROUP = 256;
}  // namespace gpt2

// qkv [B, T, 3, H, D], out and dout [B, T, H, D], dqkv as qkv, all contiguous and of qkv's dtype; lse [B, H, T]
// float32; segments [B, T] int32 or 0; D at most 128.
// partial: 0, or float32 [B, H, ceil(T / ATTENTION_KEY_GROUP), T, round_up(D, 16)] when the keys of a head go to
// several threads.
#define GPT2_ATTENTION_KERNELS(KERNEL) \
  KERNEL(attention_forward, \
         (addr qkv, addr out, f32 lse, i32 segments, int64_t B, int64_t T, int64_t H, int64_t D, double scale, \
          int64_t qkv_dtype, Drop dropout)) \
  KERNEL(attention_backward, \
         (addr dout, addr qkv, addr out, f32 lse, i32 segments, addr dqkv, f32 partial, int64_t B, int64_t T, \
          int64_t H, int64_t D, double scale, int64_t qkv_dtype, Drop dropout))
