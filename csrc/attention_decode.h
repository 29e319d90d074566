// Kernels of attention_decode.cpp, for kernels.h.
#pragma once

#define GPT2_ATTENTION_DECODE_KERNELS(KERNEL)
