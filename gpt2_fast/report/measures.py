"""What a weight is like, in numbers: mean, spread, norms and singular values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class WeightMeasures(NamedTuple):
    """Of a matrix or a vector; of a vector, whose only singular value is its length, the norms are one."""

    shape: tuple[int, ...]
    mean: float
    std: float
    frobenius: float
    singular_values: np.ndarray  # float64, from the largest to the smallest

    @property
    def spectral(self) -> float:
        """The largest singular value: how far the matrix can stretch a vector."""
        return float(self.singular_values[0])

    def line(self) -> str:
        """All of it in a line. The stable rank, (Frobenius / spectral)^2, is how many directions carry the matrix."""
        shape = " × ".join(map(str, self.shape))
        text = f"{shape}, mean {self.mean:.3g}, std {self.std:.3g}, Frobenius norm {self.frobenius:.4g}"
        if len(self.shape) == 1:
            return text
        rank = (self.frobenius / self.spectral) ** 2 if self.spectral > 0 else 0.0
        return f"{text}, spectral norm {self.spectral:.4g}, stable rank {rank:.1f}"


def weight_measures(weight: Tensor) -> WeightMeasures:
    """Measures of a weight of one or two dimensions, in float64.

    Singular values are square roots of the eigenvalues of the smaller of W W^T and W^T W, exact to some 1e-8 of the
    largest, which float32 weights are not: a table of 50,257 rows takes a second so.

    Raises ValueError for a weight that holds what is not finite.
    """
    w = weight.detach().double().cpu()
    if not torch.isfinite(w).all():
        raise ValueError("the weight holds values that are not finite; there is nothing to measure")
    frobenius = w.norm().item()
    if w.ndim == 1:
        values = np.array([frobenius])
    else:
        gram = w @ w.t() if w.shape[0] <= w.shape[1] else w.t() @ w
        values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).numpy()
    return WeightMeasures(tuple(w.shape), w.mean().item(), w.std(correction=0).item(), frobenius, values)
