// Kernels of decode_step.cpp, for kernels.h, and the tables that gpt2_fast/ops/decode_step.py hands them.
#pragma once

#include <stdint.h>

namespace gpt2 {

// Every member is 8 bytes: Python writes these as int64 tensors. Vectors are float32, zero up to a multiple of 16.
struct DecodeMatrix {
  const char* panels;
  const float *scale, *bias;  // [N]; null where there is none
};

struct DecodeLayer {
  const float *ln_1_weight, *ln_1_bias;
  DecodeMatrix c_attn, attn_proj;
  const float *ln_2_weight, *ln_2_bias;
  DecodeMatrix c_fc, mlp_proj;
};

enum DecodeWeights : int64_t { DECODE_F32 = 0, DECODE_BF16 = 1, DECODE_INT8 = 2 };

struct DecodeModel {
  int64_t weights, erf, L, C, H, D, F, V;  // erf: GELU by erf, not tanh
  const float* constants;  // [L + 1]: what each layer multiplies its scores by, and the LayerNorms' epsilon
  DecodeMatrix wte, lm_head;
  const float *wpe, *ln_f_weight, *ln_f_bias;  // wpe: [n_positions, C]
  DecodeLayer layers[1];                       // [L]
};

// A cache and the scratch of a call. Widths C16, F16, S16, D16: rounded up to 16; R: `chunk` rows and 16 to spare.
struct DecodeCache {
  // keys [L, B, H, S16 / 16, ceil(D / G), 16, G], values [L, B, H, D16 / 16, S16 / G, 16, G]: float32, G = 1, or
  // bfloat16, G = 2; zero before their first use.
  char *keys, *values;
  int64_t B, S, chunk;
  float *h, *y, *qkv, *f;  // [R, C16], [R, C16], [R, 3 C rounded up], [R, F16]
  float *newest, *scores;  // [B, C16], [threads, 12, S16]
  int8_t* split;           // [2 R, max(C16, F16)], with int32 [2 R] and float32 [R]: see Split in decode_panels.h
  int32_t* split_offsets;
  float* split_scales;
};

}  // namespace gpt2

// tokens int64, sequences and positions int32 [rows]: new tokens, those of a sequence together and in order, and where
// in the batch and in their sequence they are. logits float32 [B, V], of the newest token of each sequence; every
// sequence has at least one. Any number of threads gives the same bits.
#define GPT2_DECODE_STEP_KERNELS(KERNEL) \
  KERNEL(decode_step, (i64 model, i64 cache, i64 tokens, i32 sequences, i32 positions, int64_t rows, \
                       f32 logits, int64_t threads))
