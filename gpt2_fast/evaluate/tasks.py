"""`gpt2-fast eval`: texts, token shards, HellaSwag and LAMBADA from local files in their published formats."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gpt2_fast.checkpoint import load, source_format
from gpt2_fast.data import jsonl, load_tokens
from gpt2_fast.data.text import read_text
from gpt2_fast.data.tokenizer import EOT, Tokenizer, get_tokenizer, split_text
from gpt2_fast.evaluate.losses import Measures, dataset_loss, exp, loglikelihoods, perplexity, window_sizes
from gpt2_fast.files import atomic_write
from gpt2_fast.model import GPT2LMHeadModel

_TEXT_PIECE = 1 << 20  # characters of a text tokenised at a time


def hellaswag(
    model: GPT2LMHeadModel,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = False,
) -> Measures:
    """HellaSwag (Zellers et al., 2019, arXiv:1905.07830) from its jsonl, by the two conventions in use.

    llm.c and build-nanogpt: the text is ctx and the ending as they are. acc takes the ending of the lowest loss,
    acc_norm that of the lowest loss a token.
    lm-evaluation-harness: the text is "activity_label: ctx_a Ctx_b" with WikiHow's brackets taken out. acc takes the
    most likely ending, acc_norm the most likely a character. Left out where a line lacks these fields.

    Returns:
        llmc_acc, llmc_acc_norm, lm_eval_acc, lm_eval_acc_norm (shares of 1) and examples.
    """
    examples = [_hellaswag_example(record, where) for where, record in _take(path, limit)]
    tokenizer, found = _tokenizer(model), {}
    conventions = {"llmc": [example.plain for example in examples]}
    if all(example.cleaned for example in examples):
        conventions["lm_eval"] = [example.cleaned for example in examples]
    names = [example.where for example in examples for _ in example.plain[1]]
    for convention, texts in conventions.items():
        pairs = [_pair(tokenizer, context, " " + ending) for context, endings in texts for ending in endings]
        title = f"HellaSwag, {convention.replace('_', '-')}"
        sums, _ = loglikelihoods(model, pairs, batch_size=batch_size, progress=progress, name=title, names=names)
        if convention == "llmc":
            lengths = [len(continuation) for _, continuation in pairs]
        else:
            lengths = [len(ending) for _, endings in texts for ending in endings]
        for measure, values in (("acc", sums), ("acc_norm", sums / torch.tensor(lengths, device="cpu").clamp(min=1))):
            best = [choice.argmax().item() for choice in values.split([len(endings) for _, endings in texts])]
            hits = sum(b == example.label for b, example in zip(best, examples, strict=True))
            found[f"{convention}_{measure}"] = hits / len(examples)
    return {**found, "examples": len(examples)}


def lambada(
    model: GPT2LMHeadModel,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = False,
) -> Measures:
    """LAMBADA (Paperno et al., 2016, arXiv:1606.06031) from OpenAI's jsonl, as lm-evaluation-harness's lambada_openai.

    The last word, all that follows the last space, is predicted from what precedes it.

    Returns:
        acc (the share of last words whose every token is the most likely one), perplexity (of the last word, all its
        tokens together) and examples.
    """
    tokenizer, pairs, names = _tokenizer(model), [], []
    for where, record in _take(path, limit):
        context, _, word = jsonl.field(record, "text", str, where).rpartition(" ")
        if not context.strip() or not word:
            raise ValueError(f"{where}: 'text' has no last word after a context, {record['text']!r:.60}")
        pairs.append(_pair(tokenizer, context, " " + word))
        names.append(where)
    sums, matches = loglikelihoods(
        model, pairs, batch_size=batch_size, greedy=True, progress=progress, name="LAMBADA", names=names
    )
    return {
        "acc": matches.double().mean().item(),
        "perplexity": exp(-sums.mean().item()),
        "examples": len(pairs),
    }


def load_model(
    source: str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, impl: str = "auto"
) -> GPT2LMHeadModel:
    """A model in eval mode from a Hugging Face folder or hub name, a nanoGPT ckpt.pt or an llm.c .bin.

    dtype: of the weights; None keeps what is stored. Raises what `checkpoint.load` does.
    """
    if source_format(source) == "hf":
        return GPT2LMHeadModel.from_pretrained(source, dtype=dtype, device=device, impl=impl)
    loaded = load(source)
    with torch.device("cpu"):
        model = GPT2LMHeadModel(loaded.config, impl=impl)
    model.load_state_dict(loaded.state)
    return model.to(device, dtype or next(iter(loaded.state.values())).dtype).eval()


def check_options(files: dict[str, str], batch_size: int, limit: int | None) -> None:
    """Raises FileNotFoundError or ValueError, one line, for what can be told before a model is loaded."""
    for path in files.values():
        if not Path(path).exists() and not any(c in path for c in "*?["):
            raise FileNotFoundError(f"{path} does not exist")
    for flag, value in (("--batch-size", batch_size), ("--limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")


def evaluate_files(
    model: GPT2LMHeadModel,
    files: dict[str, str],
    *,
    stride: int | None = None,
    context: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Runs the tasks "text", "shard", "hellaswag" and "lambada" on their files, and yields a record of each.

    A record has task, file, the settings that matter to its values, and "measures". What is wrong with any of the
    files' names or settings is said before the first task runs.
    """
    context, stride = window_sizes(model, context, stride)
    check_options(files, batch_size, limit)
    options = {"batch_size": batch_size, "limit": limit, "progress": progress}
    for task, path in files.items():
        settings: dict[str, Any] = {}
        if task == "text":
            settings = {"context": context, "stride": stride}
            measures = perplexity(model, encode_text(_tokenizer(model), path), **settings, **options)
        elif task == "shard":
            settings = {"context": context}
            data = load_tokens(path, vocab_size=model.config.vocab_size, progress=progress, **settings)
            measures = dataset_loss(model, data, **options)
        else:
            measures = {"hellaswag": hellaswag, "lambada": lambada}[task](model, path, **options)
        yield {"task": task, "file": str(path), **settings, "limit": limit, "measures": measures}


# What a measure means, in the table.
MEANINGS = {
    "llmc_acc": "llm.c: ending of the lowest loss",
    "llmc_acc_norm": "llm.c: ending of the lowest loss a token",
    "lm_eval_acc": "lm-eval: most likely ending",
    "lm_eval_acc_norm": "lm-eval: most likely ending a character",
    ("lambada", "acc"): "last word predicted by greedy decoding",
    ("lambada", "perplexity"): "of the last word",
    ("text", "loss"): "natural logarithm of the perplexity",
    ("shard", "loss"): "mean of all tokens, nats",
}


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records of `evaluate_files` as text, a line a measure. Shares have their standard error after ±."""
    lines = []
    for record in records:
        task, measures = record["task"], dict(record["measures"])
        unit = "tokens" if "tokens" in measures else "examples"
        count = measures.pop(unit)
        settings = "".join(f", {key} {record[key]}" for key in ("context", "stride") if key in record)
        lines.append(f"{task}: {record['file']} ({count:,} {unit}{settings})")
        for measure, value in measures.items():
            text = f"{value:.4f}"
            if "acc" in measure:
                text += f" ± {math.sqrt(value * (1 - value) / max(count - 1, 1)):.4f}"
            elif not 1e-3 < value < 1e6:
                text = f"{value:.4g}"
            meaning = MEANINGS.get(measure) or MEANINGS.get((task, measure), "")
            lines.append(f"  {measure:<18}{text:<18}{meaning}".rstrip())
        if task == "hellaswag" and "lm_eval_acc" not in measures:
            lines.append("  lm-eval's two need activity_label, ctx_a and ctx_b in every line")
    return "\n".join(lines)


def as_json(results: dict[str, Any]) -> str:
    """Results as JSON; what is not finite becomes null."""
    finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
    clean = lambda record: {**record, "measures": {name: finite(v) for name, v in record["measures"].items()}}
    return json.dumps({**results, "results": [clean(record) for record in results["results"]]}, indent=2)


def write_json(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Writes results as JSON, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(as_json(results) + "\n")


def encode_text(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> np.ndarray:
    """The ids of a UTF-8 file, uint16 [n]; <|endoftext|> in it is that token, as in transformers' tokenizer.

    A byte order mark is left out, and what is not text refused, as in training data.
    """
    text = "".join(read_text(path))
    pieces = [tokenizer.encode_to_numpy(piece, allowed_special={EOT}) for piece in split_text(text, _TEXT_PIECE)]
    if sum(map(len, pieces)) < 2:
        raise ValueError(f"{path} has {sum(map(len, pieces))} tokens; perplexity needs at least 2")
    return np.concatenate(pieces)


class _Example(NamedTuple):
    """A HellaSwag example as (context, endings) in each convention; cleaned is None where fields lack."""

    plain: tuple[str, list[str]]
    cleaned: tuple[str, list[str]] | None
    label: int
    where: str


def _hellaswag_example(record: dict[str, Any], where: str) -> _Example:
    endings = jsonl.field(record, "endings", list, where)
    if len(endings) < 2 or not all(isinstance(ending, str) for ending in endings):
        raise ValueError(f"{where}: 'endings' must be two or more strings")
    if record.get("label", "") == "":
        raise ValueError(f"{where} has no 'label'; HellaSwag's test split is published without: use validation")
    label = str(record["label"])
    if not label.isdecimal() or int(label) >= len(endings):
        raise ValueError(f"{where}: 'label' is {record['label']!r}; it must be 0 to {len(endings) - 1}")
    parts = ("activity_label", "ctx_a", "ctx_b")
    if "ctx" in record or not {"ctx_a", "ctx_b"} <= record.keys():
        context = jsonl.field(record, "ctx", str, where)
    else:
        context = " ".join(jsonl.field(record, part, str, where) for part in parts[1:])
    cleaned = None
    if record.keys() >= set(parts):
        activity, a, b = (jsonl.field(record, part, str, where) for part in parts)
        cleaned = _clean(f"{activity}: {a} {b.capitalize()}"), [_clean(ending) for ending in endings]
    return _Example((context, endings), cleaned, int(label), where)


def _clean(text: str) -> str:
    """WikiHow's marks taken out, as lm-evaluation-harness's hellaswag task does, step by step."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, tokenised as one text and parted where the context ends, its last spaces left to the other."""
    whole, length = tokenizer.encode(context + continuation), len(tokenizer.encode(context.rstrip()))
    return whole[:length], whole[length:]


def _take(path: str | os.PathLike[str], limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a jsonl, at most `limit`, at least one."""
    count = 0
    for count, line in enumerate(jsonl.read(path), start=1):
        yield line
        if count == limit:
            return
    if not count:
        raise ValueError(f"{path} is empty")


def _tokenizer(model: GPT2LMHeadModel) -> Tokenizer:
    tokenizer = get_tokenizer()
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"the model has vocab_size {model.config.vocab_size} and GPT-2's tokenizer {tokenizer.n_vocab} ids; "
            "this model is of another tokenizer, give it token ids"
        )
    return tokenizer
