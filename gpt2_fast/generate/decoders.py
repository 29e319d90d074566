"""What generation asks of a model: the prompts at once, then a token a row at a time.

A decoder has `n_positions` (how many it can hold), `length` (how many it holds), `calls` (modules that it calls), and

    prefill(tokens int64 [B, T], starts int32 [B]) -> logits float32 [B, V]    forgets what it held
    step(tokens int64 [B])                         -> logits float32 [B, V]    appends a token to every row

A PackedDecoder also chooses tokens, where nothing but the logits and numbers made beforehand decide (`Sampler.draws`):

    tokens(tokens int64 [B], count, ends, draws) -> tokens int64 [n, B], highest float32 [n, B]    `ops.decode_tokens`

starts says how many positions of padding each row begins with. Logits are of the token after the newest, and may be
overwritten by the next call. `make_decoder` chooses one of three:

    PackedDecoder    CPU: one call into C++ a token, on weights packed in float32, bfloat16, int8 or int4
    GraphDecoder     GPU: the model, its step replayed as one CUDA graph
    ModelDecoder     the model, op by op, on any device

Packed weights stand for this package's own modules alone. Of a model with hooks, adapters or other modules of its own
each is called: by ModelDecoder, or on a GPU, where none has hooks, by GraphDecoder.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Collection
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gpt2_fast.generate.cache import KVCache, StaticCache
from gpt2_fast.generate.protocol import Model
from gpt2_fast.modules import check_not_sharded, foreign, foreign_part, has_hooks, is_plain_head
from gpt2_fast.ops import decode_step
from gpt2_fast.ops.decode_tokens import decode_tokens
from gpt2_fast.ops.draw import Scratch
from gpt2_fast.ops.packed_model import LayerParameters, PackedCache, PackedModel, Parameters, misfit
from gpt2_fast.ops.runtime import dispatch

WARMUP_STEPS = 3  # eager ones before a capture, so that lazy set-up is not recorded


class Decoder(Protocol):
    """See the top of this file."""

    n_positions: int
    calls: tuple[nn.Module, ...]

    @property
    def length(self) -> int: ...

    def prefill(self, tokens: Tensor, starts: Tensor) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...


class ModelDecoder:
    """The model's own forward pass and a KVCache."""

    def __init__(self, model: Model, batch_size: int, n_positions: int, cache_type: type[KVCache] = KVCache):
        self.model, self.n_positions, self.calls = model, n_positions, (model.transformer, model.lm_head)
        self.cache = cache_type(model, batch_size, n_positions)

    @property
    def length(self) -> int:
        return self.cache.length

    def prefill(self, tokens: Tensor, starts: Tensor) -> Tensor:
        self.cache.reset(starts)
        mask = None
        if starts.any():
            mask = torch.arange(tokens.shape[1], device=tokens.device) >= starts.unsqueeze(1)
        return self._advance(tokens, mask)

    def step(self, tokens: Tensor) -> Tensor:
        return self._advance(tokens.unsqueeze(1), None)

    def _advance(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        first = self.cache.advance(tokens.shape[1])
        positions = torch.arange(first, self.cache.length, device=tokens.device)
        return self._logits(tokens, (positions - self.cache.starts.long().unsqueeze(1)).clamp_(min=0), mask)

    def _logits(self, tokens: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.model.transformer(tokens, mask, position_ids, cache=self.cache)
        head = self.model.lm_head
        return (hidden[:, -1] @ head.weight.t() if is_plain_head(head) else head(hidden[:, -1])).float()


class GraphDecoder(ModelDecoder):
    """A step over fixed buffers that depends on nothing on the host; on a GPU it is captured once and replayed.

    Where it cannot be captured, and on a CPU, the same step runs eagerly; a warning says why.
    """

    def __init__(self, model: Model, batch_size: int, n_positions: int):
        super().__init__(model, batch_size, n_positions, StaticCache)
        device = model.transformer.wte.weight.device
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch_size, model.lm_head.weight.shape[0], dtype=torch.float32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._to_capture = device.type == "cuda"

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens.unsqueeze(1))
        if self._to_capture:
            self._to_capture = False
            self.graph = self._capture()
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        self.cache.length += 1
        return self.logits

    def _step(self) -> None:
        positions = self.cache.begin_step()
        self.logits.copy_(self._logits(self.tokens, positions, None))
        self.cache.index.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        index, lengths = self.cache.index.clone(), self.cache.lengths.clone()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_STEPS):
                    self._step()  # writes the keys and values that the replay writes again
                    self.cache.index.copy_(index)
                    self.cache.lengths.copy_(lengths)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            return graph
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"decoding goes on without a CUDA graph: {reason}", RuntimeWarning, stacklevel=3)
            self.cache.index.copy_(index)
            self.cache.lengths.copy_(lengths)
            return None


class PackedDecoder:
    """`ops.decode_step` on packed weights. CPU only."""

    def __init__(self, packed: PackedModel, batch_size: int, n_positions: int):
        self.packed, self.batch_size, self.n_positions, self.calls = packed, batch_size, n_positions, ()
        self.cache: PackedCache | None = None
        self.logits = torch.empty(batch_size, packed.config.vocab_size, dtype=torch.float32, device="cpu")
        self.scratch = Scratch()

    @property
    def length(self) -> int:
        return 0 if self.cache is None else self.cache.length

    def prefill(self, tokens: Tensor, starts: Tensor) -> Tensor:
        self.cache = PackedCache(self.packed, self.batch_size, self.n_positions, starts)
        return self.packed.prefill(tokens, self.cache)

    def step(self, tokens: Tensor) -> Tensor:
        return self.packed.step(tokens, self.cache, self.logits)

    def tokens(self, tokens: Tensor, count: int, ends: Collection[int], draws: dict) -> tuple[Tensor, Tensor]:
        kept = {"scratch": self.scratch, "out": self.logits}
        return decode_tokens(self.packed, tokens, self.cache, count, ends=ends, **draws, **kept)


PACKED: WeakKeyDictionary[Model, tuple[tuple, Tensor, PackedModel]] = WeakKeyDictionary()
PACKING = threading.Lock()  # of PACKED: threads that want one model wait for the one that packs it


def _forked() -> None:
    """A child must not wait for a thread that packs in its parent."""
    global PACKING
    PACKING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _foreign(model: Model) -> str | None:
    """Which module of a model packed weights do not stand for, and why; None: they stand for all."""
    if reason := foreign_part(model.transformer):
        return reason
    if not is_plain_head(model.lm_head):
        return f"lm_head {foreign(model.lm_head, nn.Linear) or 'has a bias'}"
    return _unlike_config(model.transformer, model.config) or misfit(_tensors_of(model))


def _unlike_config(transformer: nn.Module, config: Any) -> str | None:
    """What a module was told to compute after it was made; packed weights go by the config."""
    said = {"ln_1": ("eps", config.layer_norm_epsilon), "ln_2": ("eps", config.layer_norm_epsilon),
            "mlp": ("activation", config.activation_function), "attn": ("n_head", config.n_head)}  # fmt: skip
    for i, block in enumerate(transformer.h):
        for name, (attribute, value) in said.items():
            if (found := getattr(getattr(block, name), attribute)) != value:
                return f"transformer.h.{i}.{name} has {attribute} {found!r} and the config {value!r}"
    eps = transformer.ln_f.eps
    return None if eps == config.layer_norm_epsilon else f"transformer.ln_f has eps {eps!r}"


def parameters_of(model: Model) -> Parameters:
    """The tensors that a model computes with, for `PackedModel`.

    Raises ValueError, one line that names the module, where they are not all that it computes with.
    """
    if reason := _foreign(model):
        raise ValueError(f"{reason}, which packed weights would leave out; do not ask for `weights`: it is called then")
    return _tensors_of(model)


def _tensors_of(model: Model) -> Parameters:
    affine = lambda product: (product.weight_io.t(), product.bias)
    norm = lambda layernorm: (layernorm.weight, layernorm.bias)
    layers = [
        LayerParameters(
            norm(block.ln_1), affine(block.attn.c_attn), affine(block.attn.c_proj),
            norm(block.ln_2), affine(block.mlp.c_fc), affine(block.mlp.c_proj), block.attn.scale,
        )
        for block in model.transformer.h
    ]  # fmt: skip
    transformer = model.transformer
    tables = transformer.wte.weight, transformer.wpe.weight
    return Parameters(model.config, *tables, layers, norm(transformer.ln_f), model.lm_head.weight)


def _probe(parameter: Tensor) -> Tensor:
    """Values that show a change of any row or column of a matrix, and of anything in a vector; float64."""
    p = parameter.detach()
    if p.ndim != 2:
        return p.flatten().double()
    i = torch.arange(max(p.shape), device="cpu")
    return p[i % p.shape[0], (i + 1) % p.shape[1]].double()  # not the diagonal, which a transposition leaves


def _flat(tensors: Parameters) -> list[Tensor | None]:
    """All that is packed, in order, a tensor as often as it is packed; None for a bias that is not there."""
    affines = [affine for layer in tensors.layers for affine in layer[:-1]]
    return [tensors.wte, tensors.wpe, tensors.lm_head, *(t for affine in (*affines, tensors.ln_f) for t in affine)]


def _place(t: Tensor) -> tuple:
    return t.data_ptr(), t.shape, t.stride(), t.dtype, 0 if t.is_inference() else t._version


@torch.no_grad()
def packed_model(model: Model, weights: str) -> PackedModel:
    """The model's weights packed for `ops.decode_step`, kept beside the model until they change.

    A model has one packing at a time. Its size in bytes is 4, 2, 1 or 0.5625 a weight, beside the model's own. Changed
    weights, parameters or not, are known by their addresses and version counters, and by `_probe` of each, since a
    write through `.data` moves no counter: one to a few numbers inside a matrix is not seen. Raises as `parameters_of`
    does.
    """
    tensors, config = parameters_of(model), model.config
    numbers = (*(layer.scale for layer in tensors.layers), config.n_head, config.layer_norm_epsilon)
    places = [None if t is None else (t, _place(t)) for t in _flat(tensors)]
    versions = (weights, config.activation_function, *numbers, *(at and at[1] for at in places))
    once = {at[1]: at[0] for at in places if at}  # a tied head, and modules that layers share
    probes = torch.cat([_probe(t) for t in once.values()]).view(torch.int64)  # whole numbers: a NaN is equal to itself
    with PACKING:
        held = PACKED.pop(model, None)
        if held is None or held[0] != versions or not torch.equal(held[1], probes):
            del held  # before the new one is made: two would be in memory
            held = (versions, probes, PackedModel(tensors, weights))
        PACKED[model] = held
        return held[2]


def make_decoder(
    model: Model, batch_size: int, n_positions: int, weights: str | None = None
) -> ModelDecoder | GraphDecoder | PackedDecoder:
    """The decoder for a model where it is.

    weights: "float32", "bfloat16", "int8" or "int4" packs them so, on a CPU. None packs a float32 or bfloat16 model as
        it is where C++ can run it, unless it is in training mode, whose weights are about to change.

    Raises ValueError for weights that are unknown, asked for on a GPU or of a model with modules that are not this
    package's; for int4 of a model whose widths are no multiples of 32; and for hooks on the model itself, which
    generation does not call.
    """
    check_not_sharded(model, "generate")
    if has_hooks(model):
        raise ValueError("the model has hooks, and generation calls its transformer and lm_head: register them there")
    weight = model.transformer.wte.weight
    if weight.device.type == "cuda":
        if weights not in (None, str(weight.dtype).removeprefix("torch.")):
            raise ValueError(
                f"weights={weights!r} packs a model on the CPU and this one is {weight.dtype} on {weight.device}; "
                "convert it with model.to(dtype), or move it"
            )
        called = any(has_hooks(module) for module in model.modules())  # a replayed graph calls none
        return (ModelDecoder if called else GraphDecoder)(model, batch_size, n_positions)
    if weights is None:
        weights = _packed_dtype(model)
    if weights is None:
        return ModelDecoder(model, batch_size, n_positions)
    return PackedDecoder(packed_model(model, weights), batch_size, n_positions)


def _packed_dtype(model: Model) -> str | None:
    """What a model is packed in where nobody asks; None: it is not."""
    dtype, impl = model.transformer.wte.weight.dtype, model.transformer.impl
    if model.training or impl not in ("auto", "cpp") or dtype not in (torch.float32, torch.bfloat16):
        return None
    if _foreign(model):
        return None
    device = model.transformer.wte.weight.device
    chosen = dispatch.choose(decode_step.OP, "auto", device, dtype)
    return str(dtype).removeprefix("torch.") if chosen == "cpp" else None
