"""Triton kernels, one file per op, each kernel beside its launcher.

A file here is imported only when a Triton implementation is chosen, so the package works without Triton.
Launchers take contiguous tensors and allocate their outputs; autograd, validation and dispatch are in
``gpt2_fast.ops``, which these files never import.
"""
