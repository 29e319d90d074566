"""Keys and values of the tokens so far: an object that the caller passes in, allocated once at its final size.

Prompts of unequal length are padded on the left, so that every row's next token has the same index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_fast.generate.protocol import Model


class KVCache:
    """Keys and values of every layer, [L, B, H, S, D], for S positions.

    Args:
        model: its sizes, device and dtype are the cache's (inside `torch.autocast`, autocast's dtype).
        batch_size: B.
        n_positions: S, prompt and new tokens together; at most the model's n_positions.
        starts: int32 [B], how many padding positions each row begins with.
    """

    def __init__(self, model: Model, batch_size: int, n_positions: int, starts: Tensor | None = None):
        config, weight = model.config, model.transformer.wte.weight
        if n_positions > config.n_positions:
            raise ValueError(
                f"the cache needs {n_positions} positions and the model has {config.n_positions}; generate fewer "
                "tokens or shorten the prompt"
            )
        layers, heads = len(model.transformer.h), {(b.attn.n_head, b.attn.head_dim) for b in model.transformer.h}
        if len(heads) != 1:
            raise ValueError(f"the layers have {sorted(heads)} heads and head sizes; a cache takes those of one kind")
        ((n_head, head_dim),) = heads
        shape = (layers, batch_size, n_head, n_positions, head_dim)
        device_type = weight.device.type
        autocast = torch.is_autocast_enabled(device_type)  # keys and values are then of its dtype
        dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        self.keys = torch.zeros(shape, dtype=dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.starts = torch.zeros(batch_size, dtype=torch.int32, device=weight.device)
        self.lengths = torch.zeros_like(self.starts)
        self.reset(starts)

    def reset(self, starts: Tensor | None = None) -> None:
        """Forgets everything; rows now begin with `starts` positions of padding, or none."""
        self.starts.zero_() if starts is None else self.starts.copy_(starts)
        self.lengths.zero_()
        self.length = 0
        self.prefilling = True

    def advance(self, n_new: int) -> int:
        """Makes room for n_new tokens of every row before a forward pass; returns the first one's index."""
        first, self.length = self.length, self.length + n_new
        self.prefilling = first == 0
        self.lengths.fill_(self.length)
        return first

    def write(self, layer: int, qkv: Tensor) -> None:
        """Stores the keys and values of qkv [B, T, 3, H, D], the newest T positions, for one layer."""
        first = self.length - qkv.shape[1]
        self.keys[layer, :, :, first : self.length] = qkv[:, :, 1].transpose(1, 2)
        self.values[layer, :, :, first : self.length] = qkv[:, :, 2].transpose(1, 2)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of one layer."""
        return self.keys[index], self.values[index]


class StaticCache(KVCache):
    """A cache whose position is read from the device, so that one recorded step serves every position.

    index: int64 [1], where the next token goes.
    """

    def __init__(self, model: Model, batch_size: int, n_positions: int):
        self.index = torch.zeros(1, dtype=torch.int64, device=model.transformer.wte.weight.device)
        super().__init__(model, batch_size, n_positions)

    def advance(self, n_new: int) -> int:
        first = super().advance(n_new)
        self.index.fill_(self.length)
        return first

    def begin_step(self) -> Tensor:
        """Device work only: each row sees one key more. Returns the new tokens' positions, int64 [B, 1]."""
        self.prefilling = False
        self.lengths.add_(1)
        return (self.index - self.starts.unsqueeze(1)).clamp_(min=0)

    def write(self, layer: int, qkv: Tensor) -> None:
        if self.prefilling:
            return super().write(layer, qkv)
        self.keys[layer].index_copy_(2, self.index, qkv[:, :, 1].transpose(1, 2))
        self.values[layer].index_copy_(2, self.index, qkv[:, :, 2].transpose(1, 2))
