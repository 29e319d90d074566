"""GELU and its derivative, for the MLP's kernels.

gelu(u) = u * gate(u)
by erf:   gate(u) = (1 + erf(u / sqrt(2))) / 2
by tanh:  gate(u) = sigmoid(2 z),    z = sqrt(2 / pi) * (u + 0.044715 u^3)      [= (1 + tanh z) / 2]
"""

import triton
import triton.language as tl


@triton.jit
def gelu_gate(u, ERF: tl.constexpr):
    """What GELU multiplies u by."""
    if ERF:
        gate = 0.5 + 0.5 * tl.erf(0.7071067811865476 * u)
    else:
        gate = tl.sigmoid(1.5957691216057308 * u * (1.0 + 0.044715 * u * u))
    return gate


@triton.jit
def gelu_derivative(u, ERF: tl.constexpr):
    gate = gelu_gate(u, ERF)
    if ERF:
        slope = 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:
        slope = gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * u * u)
    return gate + u * slope
