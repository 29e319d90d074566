// Kernels of block.cpp, for kernels.h: one block of GPT-2, forward and backward, each as one call.
//
// m, h and every gradient of them [B, T, C], in m_dtype. h 0: the stream is m. dm 0 where the caller takes dh for it.
// scratch: as many bytes as block_scratch puts into the int64 at `bytes`, for the same sizes.
#pragma once

namespace gpt2 {

// product_dtype is what mlp.h has by that name. sgemm: the address of a BLAS's sgemm_, which then multiplies, in
// float32 whatever m_dtype is; 0: linear_product does.
#define GPT2_BLOCK_SIZES(M) \
  M(int64_t, B) M(int64_t, T) M(int64_t, C) M(int64_t, H) M(int64_t, F) M(int64_t, m_dtype) M(int64_t, product_dtype) \
  M(int64_t, sgemm) M(int64_t, threads)

// Dropout as in add_layernorm.h, at the site of `dropout` and two sites on; attention's, with the same key, between
// them; attn_threshold 0: none there. scale: of the scores.
#define GPT2_BLOCK_OPTIONS(M) \
  M(int64_t, transposed) M(int64_t, erf) M(double, scale) M(Drop, dropout) M(int64_t, attn_threshold) \
  M(double, attn_scale)

// All parameters are in m_dtype. Weights are [in, out], or, where `transposed`, [out, in], and so are their gradients.
// What backward reads of them, and what forward does besides; a bias of a linear layer may be 0, but for c_fc's.
#define GPT2_BLOCK_WEIGHTS(M) \
  M(addr, ln_1_weight) M(strided, c_attn_weight) M(strided, attn_proj_weight) M(addr, ln_2_weight) M(addr, ln_2_bias) \
  M(strided, c_fc_weight) M(strided, mlp_proj_weight)
#define GPT2_BLOCK_BIASES(M) \
  M(addr, ln_1_bias) M(addr, c_attn_bias) M(addr, attn_proj_bias) M(addr, c_fc_bias) M(addr, mlp_proj_bias)

// What forward makes and backward reads. kept, in m_dtype: y [N, C], qkv [N, 3 C], attended [N, C] and, where `save`,
// u [N, F]; statistics: lse [B, H, T], then mean and rstd of both LayerNorms, [N] each. h_mid [B, T, C] is
// h + dropout(m), or, where h is 0, m itself, which forward does not write.
#define GPT2_BLOCK_KEPT(M) M(addr, h_mid) M(addr, h_out) M(addr, kept) M(f32, statistics)

// A gradient that is 0 is not made, but for those of the LayerNorms and of c_fc's bias.
#define GPT2_BLOCK_VECTORS(M) M(addr, weight) M(addr, bias)
#define GPT2_BLOCK_LINEAR(M) M(strided, weight) M(addr, bias)
#define GPT2_BLOCK_GRADIENTS(M) \
  M(BlockVectors, dln_1) M(BlockLinear, dc_attn) M(BlockLinear, dattn_proj) M(BlockVectors, dln_2) \
  M(BlockLinear, dc_fc) M(BlockLinear, dmlp_proj)

#define GPT2_BLOCK_GROUPS(GROUP) \
  GROUP(BlockSizes, GPT2_BLOCK_SIZES) \
  GROUP(BlockOptions, GPT2_BLOCK_OPTIONS) \
  GROUP(BlockWeights, GPT2_BLOCK_WEIGHTS) \
  GROUP(BlockBiases, GPT2_BLOCK_BIASES) \
  GROUP(BlockKept, GPT2_BLOCK_KEPT) \
  GROUP(BlockVectors, GPT2_BLOCK_VECTORS) \
  GROUP(BlockLinear, GPT2_BLOCK_LINEAR) \
  GROUP(BlockGradients, GPT2_BLOCK_GRADIENTS)

GPT2_BLOCK_GROUPS(GPT2_STRUCT)

}  // namespace gpt2

#define GPT2_BLOCK_KERNELS(KERNEL) \
  KERNEL(block_scratch, (BlockSizes, bool backward, bool drops, i64 bytes)) \
  KERNEL(block_forward, (addr m, addr h, i32 segments, BlockWeights, BlockBiases, addr m_out, BlockKept, u8 scratch, \
                         BlockSizes, BlockOptions, bool save, double ln_1_eps, double ln_2_eps)) \
  KERNEL(block_backward, (addr dm_out, addr dh_out, i32 segments, BlockWeights, BlockKept, addr dm, addr dh, \
                          BlockGradients, u8 scratch, BlockSizes, BlockOptions))
