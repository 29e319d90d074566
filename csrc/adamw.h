// Kernels of adamw.cpp, for kernels.h.
#pragma once

#define GPT2_ADAMW_KERNELS(KERNEL)
