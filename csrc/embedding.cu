// CUDA kernels of the embedding.
