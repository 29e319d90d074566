// Kernels of linear.cpp, for kernels.h.
#pragma once

#include <stdint.h>

namespace gpt2 {

// What becomes of sum + bias: stored; added to what C holds; or stored in u, where there is one, and GELU of it in C.
enum Finish : int64_t { FINISH_STORE = 0, FINISH_ADD = 1, FINISH_TANH_GELU = 2, FINISH_ERF_GELU = 3 };

}  // namespace gpt2

// linear_product: C [M, N] = A [M, K] @ B [K, N] + bias, with M, N and K at least 1. Any number of threads gives the
// same bits.
//   A, B: of any dtype, by their strides in elements, of which one is 1.
//   bias: float32 [N], or null.
//   C, u: in c_dtype; rows of C are c_m elements apart, of u N (and of C too where there is a u).
//   pairs: both sides are bfloat16, and are multiplied as they are, two inputs at a time, where the instruction set has
//     that; otherwise everything is widened to float32.
//   workspace: as many bytes as linear_workspace puts into the int64 at `bytes`, aligned to 64.
// column_sum: sum [F] over the rows of x [N, F], in float32 and then rounded. partial [chunks, F] is scratch, with
// `chunks` a function of the shape alone.
#define GPT2_LINEAR_KERNELS(KERNEL) \
  KERNEL(linear_product, (strided a, int64_t a_dtype, int64_t a_m, int64_t a_k, strided b, int64_t b_dtype, \
                          int64_t b_k, int64_t b_n, f32 bias, strided c, int64_t c_m, addr u, int64_t c_dtype, \
                          int64_t finish, int64_t M, int64_t N, int64_t K, bool pairs, u8 workspace, int64_t threads)) \
  KERNEL(linear_workspace, (int64_t M, int64_t N, int64_t K, bool pairs, int64_t threads, i64 bytes)) \
  KERNEL(column_sum, (addr x, f32 partial, int64_t chunks, addr sum, int64_t N, int64_t F, int64_t x_dtype, \
                      int64_t sum_dtype))
