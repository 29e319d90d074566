"""What all operations share: which implementation runs, dropout keys and masks, memory, CUDA launches.

declare     an operation declared once: schema, fake, autograd, checks and choice follow
contract    what an operation takes
values      what a backend reads and writes, by name
kinds       what is worked out of a call at the first of its kind
autograd    the autograd.Functions of a declared operation
library     the torch.library namespace
tracing     whether a call goes through torch's dispatcher
dispatch    which implementation runs, and why
cpu_policy  who multiplies matrices on this CPU
products    matrix products
blas        the BLAS of torch, for C++
cpp         the C++ kernels by name
cuda        the CUDA kernels: found or compiled, loaded, launched
philox      dropout keys and masks
gelu        the two kinds of GELU
memory      where large tensors lie on a CPU
buffers     activations and gradients kept from step to step
"""
