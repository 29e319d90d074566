// Kernels of mlp.cpp, for kernels.h. product and du are product_dtype: float32 or, where
// dtype is that too, bfloat16. u, y and dy are dtype. So a float32 product can feed low-precision tensors, and they
// a float32 product, with no pass between.
//
// forward: product [N, F] -> u = product + bias (0: not stored; may be `product` itself), y = gelu(u) (may be
// `product` too). backward: du = dy * gelu'(u) (may be dy or u), dbias [F] float32, the sum of du over rows as
// float32 numbers; partial [chunks, F] float32 is scratch, with `chunks` a function of the shape alone.
// gelu: y = gelu(u) [N, F], both dtype: the bits that forward gave for that u.
// erf: GELU itself; otherwise its approximation by tanh.
#pragma once

#define GPT2_MLP_KERNELS(KERNEL) \
  KERNEL(bias_gelu_forward, \
         (addr product, f32 bias, addr u, addr y, int64_t N, int64_t F, int64_t product_dtype, \
          int64_t y_dtype, bool erf)) \
  KERNEL(bias_gelu_backward, \
         (addr dy, addr u, addr du, f32 partial, int64_t chunks, f32 dbias, int64_t N, int64_t F, \
          int64_t du_dtype, int64_t u_dtype, bool erf)) \
  KERNEL(gelu, (addr u, addr y, int64_t N, int64_t F, int64_t u_dtype, bool erf))
