// Kernels of decode_tokens.cpp, for kernels.h.
//
// tokens int64 [count + 1, B]: the newest of each sequence, after which the kernel writes further ones; made [1]: how
// many of them. `ends`, n_ends of them, are tokens after which nothing is made; nor is it where a largest logit,
// highest float32 [count, B], is no number. uniforms float64 [count, B] or null. logits float32 [B, V]: the last
// token's. `first` is how many positions the cache holds. The rest is as in decode_step.h and draw.h.
#pragma once

#define GPT2_DECODE_TOKENS_KERNELS(KERNEL) \
  KERNEL(decode_tokens, (i64 model, i64 cache, i32 sequences, int64_t B, int64_t V, int64_t first, i64 tokens, \
                         int64_t count, i64 ends, int64_t n_ends, f64 uniforms, double temperature, int64_t top_k, \
                         double top_p, f32 highest, f32 logits, f32 scratch, int64_t threads, int64_t draw_threads, \
                         i64 made))
