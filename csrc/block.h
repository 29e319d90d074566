// Kernels of block.cpp, for kernels.h: one block of GPT-2, forward and backward, each as one call.
//
// m, h and every gradient of them [B, T, C], and all parameters, in m_dtype; product_dtype is what mlp.h has by that
// name. h 0: the stream is m. Weights are [in, out], or, where `transposed`, [out, in], and so are their gradients; a
// gradient or bias that is 0 is not made or not there. kept, in m_dtype: y [N, C], qkv [N, 3 C], attended [N, C] and,
// where `save`, u [N, F]; statistics, float32: lse [B, H, T], then mean and rstd of both LayerNorms, [N] each. h_mid
// [B, T, C] is h + dropout(m), or, where h is 0, m itself, which forward does not write. Dropout as in add_layernorm.h,
// at `dropout_site` and two sites on; attention's, with the same key, between them; attn_threshold 0: none there.
//
// sgemm: the address of a BLAS's sgemm_, which then multiplies, in float32 whatever m_dtype is; 0: linear_product does.
// scratch: as many bytes as block_scratch puts into the int64 at `bytes`, for the same sizes. dm 0 where the caller
// takes dh for it.
#pragma once

#define GPT2_BLOCK_KERNELS(KERNEL) \
  KERNEL(block_scratch, \
         (int64_t B, int64_t T, int64_t C, int64_t H, int64_t F, int64_t m_dtype, int64_t product_dtype, \
          int64_t sgemm, bool backward, bool drops, int64_t threads, i64 bytes)) \
  KERNEL(block_forward, \
         (addr m, addr h, i32 segments, addr ln_1_weight, addr ln_1_bias, strided c_attn_weight, addr c_attn_bias, \
          strided attn_proj_weight, addr attn_proj_bias, addr ln_2_weight, addr ln_2_bias, strided c_fc_weight, \
          addr c_fc_bias, strided mlp_proj_weight, addr mlp_proj_bias, addr m_out, addr h_out, addr h_mid, addr kept, \
          f32 statistics, u8 scratch, int64_t B, int64_t T, int64_t C, int64_t H, int64_t F, int64_t m_dtype, \
          int64_t product_dtype, bool transposed, bool save, bool erf, double scale, double ln_1_eps, double ln_2_eps, \
          i64 dropout_key, int64_t dropout_threshold, double dropout_scale, int64_t dropout_site, \
          int64_t attn_threshold, double attn_scale, int64_t sgemm, int64_t threads)) \
  KERNEL(block_backward, \
         (addr dm_out, addr dh_out, addr h_mid, addr h_out, addr kept, f32 statistics, i32 segments, addr ln_1_weight, \
          strided c_attn_weight, strided attn_proj_weight, addr ln_2_weight, addr ln_2_bias, strided c_fc_weight, \
          strided mlp_proj_weight, addr dm, addr dh, addr dln_1_weight, addr dln_1_bias, strided dc_attn_weight, \
          addr dc_attn_bias, strided dattn_proj_weight, addr dattn_proj_bias, addr dln_2_weight, addr dln_2_bias, \
          strided dc_fc_weight, addr dc_fc_bias, strided dmlp_proj_weight, addr dmlp_proj_bias, u8 scratch, int64_t B, \
          int64_t T, int64_t C, int64_t H, int64_t F, int64_t dm_out_dtype, int64_t product_dtype, bool transposed, \
          bool erf, double scale, i64 dropout_key, int64_t dropout_threshold, double dropout_scale, \
          int64_t dropout_site, int64_t attn_threshold, double attn_scale, int64_t sgemm, int64_t threads))
