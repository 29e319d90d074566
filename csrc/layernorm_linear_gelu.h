// Kernels of layernorm_linear_gelu.cpp, for kernels.h.
#pragma once

#define GPT2_LAYERNORM_LINEAR_GELU_KERNELS(KERNEL)
