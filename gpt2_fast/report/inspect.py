"""What a GPT-2 is made of: its tensors, parameters, memory and arithmetic by table, and its attention patterns.

Everything but the attention pattern follows from the config alone, so a preset needs no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_fast.checkpoint import expected_shapes
from gpt2_fast.config import GPT2Config
from gpt2_fast.ops.runtime.gelu import ACTIVATIONS

# Bytes a parameter in training: weight, gradient, AdamW's two averages in float32, and its float32 master copy.
TRAINING_BYTES = {
    "float32": {"weights": 4, "gradients": 4, "AdamW averages": 8, "master weights": 0},
    "bfloat16": {"weights": 2, "gradients": 2, "AdamW averages": 8, "master weights": 4},
}
INFERENCE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def parameter_counts(config: GPT2Config) -> dict[str, int]:
    """Parameters by part. A tied head counts 0, for it is the token embedding; the sum is `config.num_params`."""
    counts = dict.fromkeys(("token embedding", "position embedding", "attention", "MLP", "LayerNorm", "head"), 0)
    for name, shape in expected_shapes(config).items():
        counts[_part(name)] += math.prod(shape) if not _tied(name, config) else 0
    return counts


def training_memory(config: GPT2Config) -> dict[str, dict[str, int]]:
    """Bytes by dtype and by what they hold, activations apart: those depend on batch and context."""
    n = sum(parameter_counts(config).values())
    return {dtype: {part: n * size for part, size in parts.items()} for dtype, parts in TRAINING_BYTES.items()}


def inference_memory(config: GPT2Config) -> dict[str, dict[str, int]]:
    """Bytes by dtype: the weights, and the keys and values of one sequence of n_positions."""
    n = sum(parameter_counts(config).values())
    cached = 2 * config.n_layer * config.n_positions * config.n_embd
    return {dtype: {"weights": n * size, "KV cache": cached * size} for dtype, size in INFERENCE_BYTES.items()}


def flops_per_token(config: GPT2Config, context: int | None = None) -> dict[str, int]:
    """Floating-point operations a token at a context of T tokens, n_positions unless given.

    forward: 2 N + 2 L C T, training: three times that, N all parameters, L layers, C n_embd: llm.c's convention
    (gpt2_estimate_mfu), which counts causal attention's half of the square. training (PaLM): 6 (N - positions) +
    12 L C T, the whole square (Chowdhery et al., 2022, arXiv:2204.02311, appendix B, as nanoGPT's estimate_mfu).
    """
    counts = parameter_counts(config)
    n, lct = sum(counts.values()), config.n_layer * config.n_embd * (context or config.n_positions)
    return {
        "forward": 2 * n + 2 * lct,
        "training": 6 * n + 6 * lct,
        "training (PaLM)": 6 * (n - counts["position embedding"]) + 12 * lct,
    }


def report(config: GPT2Config, weights: Mapping[str, Tensor] | None = None, title: str = "GPT-2") -> str:
    """The whole table, as text. weights: a state dict, whose dtypes it then names."""
    counts, context = parameter_counts(config), config.n_positions
    total, flops = sum(counts.values()), flops_per_token(config)
    lines = [
        f"{title}: {config.n_layer} layers, {config.n_head} heads of {config.head_dim}, n_embd {config.n_embd}, "
        f"context {context}, vocabulary {config.vocab_size}",
        "",
        "Tensors",
    ]
    shapes = expected_shapes(config)
    width = max(map(len, shapes))
    for name, shape in shapes.items():
        dtype = "" if weights is None else str(weights[name].dtype).removeprefix("torch.")
        note = "= transformer.wte.weight" if _tied(name, config) else dtype
        lines.append(f"  {name:<{width}}  {list(shape)!s:<15} {note}".rstrip())
    lines += ["", "Parameters"]
    for part, count in counts.items():
        share = "tied to the token embedding" if part == "head" and not count else f"{count / total:6.1%}"
        lines.append(f"  {part:<20}{count:>16,}  {share}")
    lines.append(f"  {'total':<20}{total:>16,}")
    lines += ["", "Memory in training, MB (activations apart)"]
    lines += _memory_rows(training_memory(config))
    lines += ["", f"Memory in inference, MB (KV cache: one sequence of {context})"]
    lines += _memory_rows(inference_memory(config))
    lines += ["", f"FLOPs a token at context {context}, in millions (N parameters, L layers, C n_embd, T context)"]
    for (kind, value), formula in zip(
        flops.items(), ("2N + 2LCT", "6N + 6LCT, as llm.c", "6(N - positions) + 12LCT, as nanoGPT"), strict=True
    ):
        lines.append(f"  {kind:<20}{value / 1e6:>16,.1f}  {formula}")
    return "\n".join(lines)


def attention_pattern(
    config: GPT2Config, weights: Mapping[str, Tensor], input_ids: Sequence[int], layer: int
) -> Tensor:
    """What every query of one layer attends to: probabilities [H, T, T], float32, rows queries, columns keys.

    A plain forward pass over the state dict up to that layer, in float32 on the weights' device, without dropout:
    the fused kernels never write these probabilities.

    Raises ValueError for a layer that is not there, no tokens, more than n_positions, or an id beyond vocab_size.
    """
    if not 0 <= layer < config.n_layer:
        raise ValueError(f"layer is {layer}; the model has layers 0 to {config.n_layer - 1}")
    if not 1 <= len(input_ids) <= config.n_positions:
        raise ValueError(f"the text has {len(input_ids)} tokens; this model takes 1 to {config.n_positions}")
    if max(input_ids) >= config.vocab_size:
        raise ValueError(f"token id {max(input_ids)} is outside the model's 0..{config.vocab_size - 1}")
    get = lambda name: weights[f"transformer.{name}"].detach().float()
    ids = torch.tensor(list(input_ids), device=weights["transformer.wte.weight"].device)
    hidden = get("wte.weight")[ids] + get("wpe.weight")[: len(ids)]  # [T, C]
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).tril()
    for i in range(layer + 1):
        linear = lambda x, name, i=i: x @ get(f"h.{i}.{name}.weight") + get(f"h.{i}.{name}.bias")
        norm = lambda x, name, i=i: F.layer_norm(
            x, x.shape[-1:], get(f"h.{i}.{name}.weight"), get(f"h.{i}.{name}.bias"), config.layer_norm_epsilon
        )
        qkv = linear(norm(hidden, "ln_1"), "attn.c_attn").view(len(ids), 3, config.n_head, config.head_dim)
        query, key, value = qkv.permute(1, 2, 0, 3)  # each [H, T, D]
        scale = 1 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
        scale /= i + 1 if config.scale_attn_by_inverse_layer_idx else 1
        pattern = (query @ key.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1)
        if i == layer:
            return pattern
        hidden = hidden + linear((pattern @ value).transpose(0, 1).flatten(1), "attn.c_proj")
        kind = ACTIVATIONS[config.activation_function]
        inner = F.gelu(linear(norm(hidden, "ln_2"), "mlp.c_fc"), approximate=kind.approximate)
        hidden = hidden + linear(inner, "mlp.c_proj")


def token_labels(tokenizer, input_ids: Sequence[int]) -> list[str]:
    """Each token as a label: a space as ␣, a newline as ⏎, bytes that are no whole character as \\x.."""
    labels = []
    for i in input_ids:
        data = tokenizer.token_bytes(i)
        text = data.decode("utf-8", errors="backslashreplace")
        labels.append(text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "→").replace("\r", "←"))
    return labels


def _memory_rows(table: Mapping[str, Mapping[str, int]]) -> list[str]:
    parts = list(next(iter(table.values())))
    rows = ["  " + f"{'':<12}" + "".join(f"{part:>16}" for part in [*parts, "total"])]
    for dtype, sizes in table.items():
        values = [*sizes.values(), sum(sizes.values())]
        rows.append(f"  {dtype:<12}" + "".join(f"{value / 1e6:>16,.1f}" for value in values))
    return rows


def _tied(name: str, config: GPT2Config) -> bool:
    return name == "lm_head.weight" and config.tie_word_embeddings


def _part(name: str) -> str:
    """Which part of `parameter_counts` a tensor belongs to."""
    if ".ln_" in name:
        return "LayerNorm"
    whole = {"transformer.wte.weight": "token embedding", "transformer.wpe.weight": "position embedding"}
    return whole.get(name) or ("head" if name.startswith("lm_head") else "attention" if ".attn." in name else "MLP")
