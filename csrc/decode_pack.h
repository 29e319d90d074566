// Kernels of decode_pack.cpp, for kernels.h.
#pragma once

// matrix [N, K] of N outputs, one of whose strides, by_output and by_input, is 1. weights: a DecodeWeights
// (decode_step.h). levels [16], rising: what the codes of int4 mean; K is then a multiple of 32. panels: zero, as
// gpt2_fast/ops/packed_weights.py and packed_int4.py say. scale [N]: of int8, otherwise null.
#define GPT2_DECODE_PACK_KERNELS(KERNEL) \
  KERNEL(decode_pack, (strided matrix, int64_t N, int64_t K, int64_t by_output, int64_t by_input, int64_t weights, \
                       i8 levels, addr panels, f32 scale, int64_t matrix_dtype))
