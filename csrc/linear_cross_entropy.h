// Kernels of linear_cross_entropy.cpp, for kernels.h.
//
// logits [n, V], rows `stride` elements apart, labels [n] int64 (each ignore_index or in [0, V): the caller has
// checked), losses [n] float32. dlogits 0: losses alone, logits untouched. Otherwise dlogits, laid out as it and of its
// dtype, receives (softmax - onehot) * row_scale, 0 in ignored rows; it may be `logits`, and float32 logits are
// overwritten in any case. row_scale float32, row i's at i * scale_stride.
// An ignored row is not read: its loss is 0.
#pragma once

#define GPT2_LINEAR_CROSS_ENTROPY_KERNELS(KERNEL) \
  KERNEL(softmax_xent, \
         (strided logits, int64_t stride, i64 labels, f32 losses, strided dlogits, f32 row_scale, \
          int64_t scale_stride, int64_t n, int64_t V, int64_t ignore_index, int64_t logits_dtype))
