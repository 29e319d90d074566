// Kernels of adamw.cpp, for kernels.h.
//
// table [tensors, 10] int64, one row a parameter tensor, none empty:
//   param, grad, exp_avg, exp_avg_sq, master (0: none), step: addresses; numel; group; dtype of param and grad;
//   first_chunk: how many chunks of CHUNK (gpt2_fast/ops/adamw_table.py) elements the rows before it fill.
// exp_avg, exp_avg_sq and master are float32, step is one float32; a bfloat16 or float16 param needs a master. A step
//   begins from the master where param is its rounding, bit for bit, and from param where it is not.
// hyper [groups, 6] float64: lr, beta1, beta2, eps, weight_decay, maximize (0 or 1).
// norm: one float32, the 2-norm of all gradients; partial [chunks] float64 is scratch.
// max_norm < 0: no clipping, and norm may be 0.
// grad_scale: one float32 that every gradient is divided by, and norm is divided by already; 0: none.
// found_inf: one float32; unless it is 0, nothing changes. 0: only a norm that is not finite says so, beside a
// grad_scale.
#pragma once

#define GPT2_ADAMW_KERNELS(KERNEL) \
  KERNEL(adamw_grad_norm, (i64 table, int64_t tensors, int64_t chunks, int64_t chunk, f64 partial, f32 norm)) \
  KERNEL(adamw_update, \
         (i64 table, int64_t tensors, int64_t chunks, int64_t chunk, f64 hyper, f32 norm, double max_norm, \
          f32 grad_scale, f32 found_inf))
