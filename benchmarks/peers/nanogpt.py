"""A GPT-2 as nanoGPT and its descendants write it: nn.Linear, scaled_dot_product_attention, F.cross_entropy.

No dropout, no cache, no masks: what a training script needs and nothing besides, so it is the plain PyTorch to beat.
GELU is the tanh form that OpenAI's weights were trained with (nanoGPT's is erf), so that losses can be compared.
B batch, T time, C n_embd, H heads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden [N, C], head [V, C], targets [N]) -> scalar


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The logits whole, then their loss."""
    return F.cross_entropy(F.linear(hidden, head), targets)


def torch_linear_cross_entropy() -> Loss:
    """torch's own fused head and loss, by chunks (torch >= 2.13)."""
    options = nn.LinearCrossEntropyOptions()
    return lambda hidden, head, targets: F.linear_cross_entropy(hidden, head, targets, options=options)


def torch_linear_cross_entropy_missing(device: str) -> str | None:
    return (
        None
        if hasattr(F, "linear_cross_entropy")
        else f"F.linear_cross_entropy needs torch 2.13, not {torch.__version__}"
    )


def liger_missing(device: str) -> str | None:
    """Why Liger-Kernel's kernels cannot run, or None."""
    if device != "cuda":
        return "Liger-Kernel's kernels need a GPU"
    return (
        None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed; pip install liger-kernel"
    )


def liger_parts() -> dict[str, Callable]:
    """Liger-Kernel's LayerNorm and fused linear cross-entropy, in the places of torch's."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerLayerNorm

    fused = LigerFusedLinearCrossEntropyLoss()
    return {
        "layer_norm": lambda n: LigerLayerNorm(n, eps=1e-5, bias=True),
        "loss": lambda hidden, head, targets: fused(head, hidden, targets),
    }


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP: [B, T, C] -> [B, T, C]."""

    def __init__(self, n_embd: int, n_head: int, layer_norm: Callable[[int], nn.Module]):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = layer_norm(n_embd), layer_norm(n_embd)
        self.c_attn, self.attn_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.c_fc, self.mlp_proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(a.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class NanoGPT(nn.Module):
    """Ids and targets [B, T] -> mean loss, scalar."""

    def __init__(
        self,
        *,
        n_layer: int,
        n_head: int,
        n_embd: int,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        layer_norm: Callable[[int], nn.Module] = nn.LayerNorm,
        loss: Loss = cross_entropy,
    ):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(n_positions, n_embd)
        self.h = nn.ModuleList([Block(n_embd, n_head, layer_norm) for _ in range(n_layer)])
        self.ln_f = layer_norm(n_embd)
        self.loss = loss

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.loss(self.ln_f(x).flatten(0, 1), self.wte.weight, targets.flatten())

    def load_gpt2(self, state: Mapping[str, Tensor]) -> NanoGPT:
        """Takes the state dict of transformers' GPT2LMHeadModel, whose products are stored transposed."""
        renamed = {}
        for name, tensor in state.items():
            name = name.removeprefix("transformer.")
            name = name.replace("attn.c_proj", "attn_proj").replace("mlp.c_proj", "mlp_proj")
            name = name.replace("attn.c_attn", "c_attn").replace("mlp.c_fc", "c_fc")
            if name != "lm_head.weight":
                product = name.startswith("h.") and tensor.ndim == 2
                renamed[name] = tensor.t() if product else tensor
        self.load_state_dict(renamed)
        return self
