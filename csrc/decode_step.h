// Kernels of decode_step.cpp, for kernels.h, and the tables that gpt2_fast/ops/decode_step.py hands them.
#pragma once

#include <stdint.h>

namespace gpt2 {

// Python writes these as int64 tensors by the names of their members (gpt2_fast.ops.runtime.cpp.struct), which it reads
// from the extension, and their types.

// Vectors are float32, zero up to a multiple of 16; scale and bias [N], null where there is none.
#define GPT2_DECODE_MATRIX(M) M(char*, panels) M(float*, scale) M(float*, bias)

#define GPT2_DECODE_LAYER(M) \
  M(float*, ln_1_weight) M(float*, ln_1_bias) M(DecodeMatrix, c_attn) M(DecodeMatrix, attn_proj) \
  M(float*, ln_2_weight) M(float*, ln_2_bias) M(DecodeMatrix, c_fc) M(DecodeMatrix, mlp_proj)

// erf: GELU by erf, not tanh. constants [L + 1]: what each layer multiplies its scores by, and the LayerNorms' epsilon.
// wpe [n_positions, C]. levels [16]: what the codes of int4 mean.
#define GPT2_DECODE_MODEL(M) \
  M(int64_t, weights) M(int64_t, erf) M(int64_t, L) M(int64_t, C) M(int64_t, H) M(int64_t, D) M(int64_t, F) \
  M(int64_t, V) M(float*, constants) M(int8_t*, levels) M(DecodeMatrix, wte) M(DecodeMatrix, lm_head) \
  M(float*, wpe) M(float*, ln_f_weight) M(float*, ln_f_bias)

// A cache and the scratch of a call. Widths C16, F16, S16, D16: rounded up to 16; R: `chunk` rows and 16 to spare.
// keys [L, B, H, S16 / 16, ceil(D / G), 16, G], values [L, B, H, S16 / G, D16, G]: float32, G = 1, or
// bfloat16, G = 2; zero before their first use. h and y [R, C16], qkv [R, 3 C rounded up], f [R, F16],
// starts [B], of which a step makes the positions [B] of its rows. newest [B, C16], scores [threads, 12, S16]; split
// [2 R, max(C16, F16)], with float32 [R] and int32 [R, max(2, groups of max(C16, F16))]: see Split in
// decode_integers.h and SplitGroups in decode_int4.h.
#define GPT2_DECODE_CACHE(M) \
  M(char*, keys) M(char*, values) M(int64_t, B) M(int64_t, S) M(int64_t, chunk) M(float*, h) M(float*, y) \
  M(int32_t*, starts) M(int32_t*, positions) M(float*, qkv) M(float*, f) M(float*, newest) M(float*, scores) \
  M(int8_t*, split) M(int32_t*, split_offsets) M(float*, split_scales)

enum DecodeWeights : int64_t { DECODE_F32 = 0, DECODE_BF16 = 1, DECODE_INT8 = 2, DECODE_INT4 = 3 };

#define GPT2_DECODE_TABLES(TABLE) \
  TABLE(DecodeMatrix, GPT2_DECODE_MATRIX) \
  TABLE(DecodeLayer, GPT2_DECODE_LAYER) \
  TABLE(DecodeModel, GPT2_DECODE_MODEL) \
  TABLE(DecodeCache, GPT2_DECODE_CACHE)

GPT2_STRUCT(DecodeMatrix, GPT2_DECODE_MATRIX)
GPT2_STRUCT(DecodeLayer, GPT2_DECODE_LAYER)

struct DecodeModel {
  GPT2_DECODE_MODEL(GPT2_MEMBER)
  DecodeLayer layers[1];  // [L], which Python writes after the rest
};

GPT2_STRUCT(DecodeCache, GPT2_DECODE_CACHE)

}  // namespace gpt2

// tokens int64, sequences and positions int32 [rows]: new tokens, those of a sequence together and in order, and where
// in the batch and in their sequence they are; positions null: one of each sequence, at `first`. logits float32 [B, V],
// of the newest token of each sequence; every sequence has at least one. Any number of threads gives the same bits.
#define GPT2_DECODE_STEP_KERNELS(KERNEL) \
  KERNEL(decode_step, (i64 model, i64 cache, i64 tokens, i32 sequences, i32 positions, int64_t rows, int64_t first, \
                       f32 logits, int64_t threads))
