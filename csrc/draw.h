// Kernels of draw.cpp, for kernels.h.
//
// logits float32 [B, V]; uniforms float64 [B] in [0, 1), null: the most likely token. temperature > 0 where there are
// uniforms. top_k 0 and top_p 1: all tokens are kept. tokens int64 [B], highest float32 [B]: NaN where a logit of the
// row is. scratch float32 [threads, what draw_scratch says]; one thread is enough for one row.
#pragma once

#include <stdint.h>

namespace gpt2 {
constexpr int64_t DRAW_BLOCK = 64;  // logits whose largest and whose sum are kept

// Units of 4 bytes: a value and an id of V tokens, of each block the largest logit and the sum in float64, and a line.
inline int64_t draw_scratch_size(int64_t V) {
  const int64_t blocks = (V + DRAW_BLOCK - 1) / DRAW_BLOCK;
  return 2 * V + 3 * blocks + 16;
}
}  // namespace gpt2

#define GPT2_DRAW_KERNELS(KERNEL) \
  KERNEL(draw_scratch, (int64_t V, i64 units)) \
  KERNEL(draw, (f32 logits, f64 uniforms, int64_t B, int64_t V, double temperature, int64_t top_k, double top_p, \
                i64 tokens, f32 highest, f32 scratch, int64_t threads))
