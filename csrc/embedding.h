// Kernels of embedding.cpp, for kernels.h.
#pragma once

#define GPT2_EMBEDDING_KERNELS(KERNEL)
