// Kernels of attention.cpp, for kernels.h.
#pragma once

// qkv [B, T, 3, H, D], out and dout [B, T, H, D], dqkv as qkv, all contiguous and of `dtype`; lse [B, H, T] float32;
// segments [B, T] int32 or 0; D at most 128. rng 0: no dropout; keep_scale is the inverse of what is kept.
// partial: 0, or float32 [B, H, ceil(T / 256), T, round_up(D, 16)] when the keys of a head go to several threads.
#define GPT2_ATTENTION_KERNELS(KERNEL) \
  KERNEL(attention_forward, \
         (addr qkv, addr out, addr lse, addr segments, int64_t B, int64_t T, int64_t H, int64_t D, double scale, \
          int64_t dtype, addr rng, int64_t threshold, double keep_scale, int64_t site)) \
  KERNEL(attention_backward, \
         (addr dout, addr qkv, addr out, addr lse, addr segments, addr dqkv, addr partial, int64_t B, int64_t T, \
          int64_t H, int64_t D, double scale, int64_t dtype, addr rng, int64_t threshold, double keep_scale, \
          int64_t site))
