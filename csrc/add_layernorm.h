// Kernels of add_layernorm.cpp, for kernels.h.
//
// x [N, C] x_dtype, residual and h [N, C] h_dtype, y [N, C] y_dtype, weight and bias [C] float32,
// mean and rstd [N] float32. Dtypes: h float32 and each of x, y float32 or the one
// low-precision type; or x and h that type, and y that type or float32.
// residual 0: h is x itself (x_dtype == h_dtype), h and dx are not written and nothing is dropped.
// normalize: y again, from what forward saved, to the bit.
// Backward: dh 0 for none; dx 0 where the caller reuses dresidual. partial [chunks, 2, C] float32 is scratch:
// `chunks` is a function of the shape alone, so the sums do not depend on the number of threads.
#pragma once

#define GPT2_ADD_LAYERNORM_KERNELS(KERNEL) \
  KERNEL(add_layernorm_forward, \
         (addr x, addr residual, f32 weight, f32 bias, addr y, addr h, f32 mean, f32 rstd, int64_t N, \
          int64_t C, double eps, int64_t x_dtype, int64_t h_dtype, int64_t y_dtype, Drop dropout)) \
  KERNEL(add_layernorm_backward, \
         (addr dy, addr dh, addr h, f32 weight, f32 mean, f32 rstd, addr dx, addr dresidual, f32 partial, \
          int64_t chunks, f32 dweight, f32 dbias, int64_t N, int64_t C, int64_t x_dtype, int64_t h_dtype, \
          int64_t dy_dtype, Drop dropout)) \
  KERNEL(add_layernorm_normalize, \
         (addr h, f32 weight, f32 bias, f32 mean, f32 rstd, addr y, int64_t N, int64_t C, int64_t h_dtype, \
          int64_t y_dtype))
