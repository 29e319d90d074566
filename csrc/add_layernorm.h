// Kernels of add_layernorm.cpp, for kernels.h.
#pragma once

#define GPT2_ADD_LAYERNORM_KERNELS(KERNEL)
