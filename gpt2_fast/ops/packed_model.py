"""What `decode_step` reads and writes: a whole model's weights, packed, and the keys and values of a batch.

A PackedModel is made once from a model's tensors (`Parameters`), which are not needed afterwards. A PackedCache is made
for a batch, and has the scratch of its calls too. C++ takes each as a table of addresses (csrc/decode_step.h).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2_fast.ops.decode_step import OP, decode_step
from gpt2_fast.ops.packed_int4 import GROUP, LEVELS, check_inputs
from gpt2_fast.ops.packed_weights import CODES, GROUPS, PANEL, HugePages, PackedMatrix, padded
from gpt2_fast.ops.runtime import cpp, dispatch
from gpt2_fast.ops.runtime.contract import check_dense
from gpt2_fast.ops.runtime.gelu import ACTIVATIONS
from gpt2_fast.ops.runtime.memory import round_up

CHUNK = 256  # rows at a time in a prefill; of 96 to 384 the fastest in float32, and as fast as any in int8
SPARE = 16  # rows that a tile may go beyond them
TILE_ROWS = 12  # the most rows of a tile, in csrc/decode_panels.h
CACHE_DTYPES = {weights: torch.float32 if weights == "float32" else torch.bfloat16 for weights in CODES}

Affine = tuple[Tensor, Tensor | None]  # weight and bias: of a LayerNorm [C] both, of a product [out, in] and [out]


class LayerParameters(NamedTuple):
    """One block of a GPT-2: what it computes with, in the order of csrc/decode_step.h.

    scale: what its attention multiplies scores by.
    """

    ln_1: Affine
    c_attn: Affine
    attn_proj: Affine
    ln_2: Affine
    c_fc: Affine
    mlp_proj: Affine
    scale: float


class Parameters(NamedTuple):
    """A GPT-2 as plain tensors, of any floating dtype and strides.

    config: a GPT2Config. wte [V, C]; wpe [n_positions, C]; lm_head [V, C], wte itself where they are tied.
    """

    config: Any
    wte: Tensor
    wpe: Tensor
    layers: Sequence[LayerParameters]
    ln_f: Affine
    lm_head: Tensor


def misfit(model: Parameters) -> str | None:
    """Which tensor has not the size that the config says, and what to do; None: all have it.

    C++ reads them by those sizes alone. How many layers there are is counted.
    """
    c = model.config
    C, F_, V = c.n_embd, c.n_inner_, c.vocab_size
    shapes = {"wte": (model.wte, (V, C)), "wpe": (model.wpe, (c.n_positions, C)), "lm_head": (model.lm_head, (V, C))}
    affine = {"ln_f": (model.ln_f, (C,))}
    for i, layer in enumerate(model.layers):
        affine |= {
            f"h.{i}.ln_1": (layer.ln_1, (C,)), f"h.{i}.ln_2": (layer.ln_2, (C,)),
            f"h.{i}.attn.c_attn": (layer.c_attn, (3 * C, C)), f"h.{i}.attn.c_proj": (layer.attn_proj, (C, C)),
            f"h.{i}.mlp.c_fc": (layer.c_fc, (F_, C)), f"h.{i}.mlp.c_proj": (layer.mlp_proj, (C, F_)),
        }  # fmt: skip
    for name, ((weight, bias), shape) in affine.items():
        shapes[name] = weight, shape
        shapes[f"{name}'s bias"] = bias, shape[:1]
    for name, (t, shape) in shapes.items():
        if t is not None and tuple(t.shape) != shape:
            return f"{name} is {tuple(t.shape)} and the config says {shape}; change the config with the weights"
    return None


class PackedModel:
    """A GPT-2's weights, packed for `step` and `prefill`; the model itself is not needed afterwards.

    Args:
        model: its tensors on the CPU, which are copied; `gpt2_fast.generate.decoders.parameters_of` has them.
        weights: "float32" keeps them, "bfloat16" rounds them, "int8" rounds to 127 steps each way with one scale an
            output, "int4" to 16 levels with one scale for 32 inputs. Sums are float32. Activations too, but where int8
            or int4 meets AVX2 or more: there a row's are multiples of its largest magnitude / 16256 (of K inputs of
            int8, without VNNI: / min(16256, 2^24 / K)); sums of int8's products are exact, of int4's those of a group.
            Biases, LayerNorms and positions stay float32.
        impl: see `gpt2_fast.ops.runtime.dispatch`.
        dtype: what impl="reference" computes in.

    Attributes:
        nbytes: of the packed weights.

    Raises ValueError for a model that is not on the CPU or not of its config's sizes, unknown `weights`, or int4 and a
    width that is no multiple of 32.
    """

    def __init__(self, model: Parameters, weights: str, *, impl: str = "auto", dtype: torch.dtype = torch.float32):
        if weights not in CODES:
            raise ValueError(f"{OP}: weights is {weights!r}; choose {', '.join(CODES)}")
        device = model.wte.device
        if device.type != "cpu":
            raise ValueError(f"{OP}: the model is on {device}; move it to the CPU")
        if reason := misfit(model):
            raise ValueError(f"{OP}: {reason}")
        if weights == "int4":
            check_inputs(f"{OP}: n_embd", model.config.n_embd)
            check_inputs(f"{OP}: n_inner", model.config.n_inner_)
        self.impl = dispatch.choose(OP, impl, device, torch.float32)
        self.config, self.weights, self.dtype = model.config, weights, dtype
        self.cache_dtype = CACHE_DTYPES[weights]
        where = {"memory": HugePages(), "impl": self.impl}
        self.layers = [_PackedLayer(layer, weights, **where) for layer in model.layers]
        self.wte = PackedMatrix(model.wte, weights, **where)
        tied = model.lm_head is model.wte
        self.lm_head = self.wte if tied else PackedMatrix(model.lm_head, weights, **where)
        self.wpe = model.wpe.detach().to(torch.float32, copy=True).contiguous()
        self.ln_f = _padded(*model.ln_f)
        constants = [*(layer.scale for layer in self.layers), self.config.layer_norm_epsilon]
        self._constants = torch.tensor(constants, dtype=torch.float32, device="cpu")
        self._table = None if self.impl == "reference" else torch.tensor(self._entries(), device="cpu")

    def _entries(self) -> list[int]:
        c, (ln_f_weight, ln_f_bias) = self.config, self.ln_f
        model = cpp.struct(
            "DecodeModel", weights=CODES[self.weights], erf=ACTIVATIONS[c.activation_function], L=len(self.layers),
            C=c.n_embd, H=c.n_head, D=c.head_dim, F=c.n_inner_, V=c.vocab_size, constants=self._constants,
            levels=LEVELS, wte=self.wte.table(), lm_head=self.lm_head.table(), wpe=self.wpe, ln_f_weight=ln_f_weight,
            ln_f_bias=ln_f_bias,
        )  # fmt: skip
        return [*model, *(entry for layer in self.layers for entry in layer.table())]

    @property
    def nbytes(self) -> int:
        head = () if self.lm_head is self.wte else (self.lm_head,)
        matrices = [self.wte, *head, *(m for layer in self.layers for m in layer.matrices)]
        vectors = [self.wpe, *self.ln_f, *(v for layer in self.layers for v in (*layer.ln_1, *layer.ln_2))]
        return sum(t.nbytes for t in (*matrices, *vectors))

    def prefill(self, tokens: Tensor, cache: PackedCache) -> Tensor:
        """Logits [B, V], float32, after the prompts: tokens int64 [B, T], left-padded as cache.starts says.

        Raises ValueError when the cache is not empty or too short.
        """
        if cache.length:
            raise ValueError(f"{OP}: the cache already holds {cache.length} positions; prefill takes a new PackedCache")
        return decode_step(self, tokens, cache)

    def step(self, tokens: Tensor, cache: PackedCache, out: Tensor | None = None) -> Tensor:
        """Logits [B, V], float32, after one more token a row: tokens int64 [B].

        out: what the logits are written to, float32 [B, V], contiguous, on the CPU; None: a new tensor.

        Raises ValueError when the cache is full.
        """
        if isinstance(tokens, Tensor) and tokens.ndim != 1:
            raise ValueError(f"{OP}: tokens is {tuple(tokens.shape)}; a step takes one token a row, [B]")
        return decode_step(self, tokens, cache, out)


class _PackedLayer:
    def __init__(self, layer: LayerParameters, weights: str, *, memory: HugePages, impl: str):
        self.scale = layer.scale
        self.ln_1, self.ln_2 = _padded(*layer.ln_1), _padded(*layer.ln_2)
        products = (layer.c_attn, layer.attn_proj, layer.c_fc, layer.mlp_proj)
        self.matrices = [PackedMatrix(weight, weights, bias, memory=memory, impl=impl) for weight, bias in products]

    def table(self) -> list[int]:
        c_attn, attn_proj, c_fc, mlp_proj = (matrix.table() for matrix in self.matrices)
        return cpp.struct(
            "DecodeLayer", ln_1_weight=self.ln_1[0], ln_1_bias=self.ln_1[1], c_attn=c_attn, attn_proj=attn_proj,
            ln_2_weight=self.ln_2[0], ln_2_bias=self.ln_2[1], c_fc=c_fc, mlp_proj=mlp_proj,
        )  # fmt: skip


def _padded(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return padded(weight), padded(torch.zeros_like(weight) if bias is None else bias)


class PackedCache:
    """Keys and values of every layer for `PackedModel`, float32 where its weights are, otherwise bfloat16.

    Args:
        packed: the model, the only one that this cache can be used with.
        batch_size: B.
        n_positions: S, prompt with its padding and new tokens together; at most the model's n_positions.
        starts: int32 [B], how many padding positions each row begins with; None: none.

    Attributes:
        length: positions held, padding included.

    Raises ValueError for sizes the model does not have.
    """

    def __init__(self, packed: PackedModel, batch_size: int, n_positions: int, starts: Tensor | None = None):
        config, self._of = packed.config, weakref.ref(packed)
        if not 1 <= n_positions <= config.n_positions:
            raise ValueError(
                f"{OP}: the cache is for {n_positions} positions and the model has {config.n_positions}; "
                "generate fewer tokens or shorten the prompt"
            )
        if batch_size < 1:
            raise ValueError(f"{OP}: batch_size is {batch_size}; it must be at least 1")
        if starts is not None:
            check_dense(OP, "starts", starts)
        if starts is not None and (
            starts.shape != (batch_size,) or starts.dtype != torch.int32 or not starts.is_cpu or starts.min() < 0
        ):
            raise ValueError(
                f"{OP}: starts is {starts.dtype} {tuple(starts.shape)} on {starts.device}; "
                f"it must be int32 [{batch_size}] on the CPU, >= 0"
            )
        self.starts = (
            torch.zeros(batch_size, dtype=torch.int32, device="cpu") if starts is None else starts.clone().contiguous()
        )
        self.sequences = torch.arange(batch_size, dtype=torch.int32, device="cpu")
        self.batch_size, self.n_positions, self.length = batch_size, n_positions, 0
        self.threads = torch.get_num_threads()
        self.last_start = int(self.starts.max())
        heads, D = (len(packed.layers), batch_size, config.n_head), config.head_dim
        if packed.impl == "reference":
            self.keys, self.values = (
                torch.zeros(*heads, n_positions, D, dtype=packed.dtype, device="cpu") for _ in range(2)
            )
            return
        S, group = round_up(n_positions, PANEL), GROUPS["float32" if packed.weights == "float32" else "bfloat16"]
        memory = HugePages()
        self.keys = memory.zeros((*heads, S, round_up(D, group)), packed.cache_dtype)
        self.values = memory.zeros((*heads, S, round_up(D, PANEL)), packed.cache_dtype)
        self._allocate(config, S)

    def _allocate(self, config, S: int) -> None:
        """The scratch of a call, and all of it as csrc's DecodeCache."""
        rows, C16, F16 = CHUNK + SPARE, round_up(config.n_embd, PANEL), round_up(config.n_inner_, PANEL)
        floats = functools.partial(torch.empty, dtype=torch.float32, device="cpu")
        self._scratch = {
            "h": floats(rows, C16), "y": floats(rows, C16), "f": floats(rows, F16),
            "qkv": floats(rows, round_up(3 * config.n_embd, PANEL)),
            "newest": floats(self.batch_size, C16),
            "starts": self.starts, "positions": torch.empty(self.batch_size, dtype=torch.int32, device="cpu"),
            "scores": floats(self.threads, TILE_ROWS, S),
            "split": torch.empty(2 * rows, max(C16, F16), dtype=torch.int8, device="cpu"),
            "split_offsets": torch.empty(
                rows * max(2, round_up(max(C16, F16), GROUP) // GROUP), dtype=torch.int32, device="cpu"
            ),
            "split_scales": floats(rows),
        }  # fmt: skip
        sizes = {"B": self.batch_size, "S": self.n_positions, "chunk": CHUNK}
        held = {"keys": self.keys, "values": self.values}
        self._table = torch.tensor(cpp.struct("DecodeCache", **held, **sizes, **self._scratch), device="cpu")
