// Kernels of attention.cpp, for kernels.h.
#pragma once

#define GPT2_ATTENTION_KERNELS(KERNEL)
