// Kernels of linear_cross_entropy.cpp, for kernels.h.
#pragma once

#define GPT2_LINEAR_CROSS_ENTROPY_KERNELS(KERNEL)
