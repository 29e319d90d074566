// Kernels of attention_decode.cpp, for kernels.h.
#pragma once

// q and out [B, H, D], k and v [B, H, S, D], contiguous, of one dtype; starts and lengths int32 [B]; D at most 128.
// partial: float32 [B, H, ceil(S / ATTENTION_KEY_GROUP), round_up(D, 16) + 16], scratch.
#define GPT2_ATTENTION_DECODE_KERNELS(KERNEL) \
  KERNEL(attention_decode, (addr q, addr k_cache, addr v_cache, addr out, i32 starts, i32 lengths, f32 partial, \
                            int64_t B, int64_t H, int64_t S, int64_t D, double scale, int64_t q_dtype))
