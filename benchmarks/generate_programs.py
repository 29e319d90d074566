"""The programs that `benchmarks generate` compares: each loads the same weights and continues prompts greedily.

Run as a module this is the worker: one program in a process of its own. It prints one JSON line. With --prepare it
only writes what a program loads, so that the conversion counts for nobody's memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import clock, peak_bytes
from benchmarks.programs import SIZES

MIN_STEPS = 4
WIDTH = 1.5  # standard deviation of the weights, times the root of n_embd


class Ticks:
    """The times at which the steps of one generation ended; called after each, it says whether to stop there.

    seconds: after so many since the first step no further one is made, MIN_STEPS apart; then rates are of fewer.
    """

    def __init__(self, device: str, seconds: float):
        self.device, self.seconds, self.times = device, seconds, [clock(device)]

    def __call__(self) -> bool:
        self.times.append(clock(self.device))
        return len(self.times) > MIN_STEPS + 1 and self.times[-1] - self.times[1] > self.seconds

    @property
    def first(self) -> float:
        """Seconds to the first token: the prefill."""
        return self.times[1] - self.times[0]

    @property
    def steps(self) -> list[float]:
        """Seconds of each further token."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


# (prompts int64 [B, T], most new tokens, ticks) -> the new tokens [B, n]
Generate = Callable[[Tensor, int, Ticks], list[list[int]]]


def _gpt2_fast(folder: Path, dtype: str, device: str) -> Generate:
    from gpt2_fast import GPT2LMHeadModel

    weights = None if dtype in PLAIN else dtype
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    model = model.to(device)

    def generate(ids: Tensor, n: int, ticks: Ticks) -> list[list[int]]:
        from gpt2_fast.generate import generate as run

        on_token = lambda token: torch.full(token.shape, ticks())
        return run(model, ids.tolist(), n, temperature=0, on_token=on_token, weights=weights)

    return generate


def _transformers(folder: Path, dtype: str, device: str) -> Generate:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()

    def generate(ids: Tensor, n: int, ticks: Ticks) -> list[list[int]]:
        stop = lambda ids, scores, **_: torch.full((ids.shape[0],), ticks(), device=ids.device)
        ids = ids.to(device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
                             pad_token_id=0, eos_token_id=None, stopping_criteria=[stop])  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    return generate


def _ctranslate2(folder: Path, dtype: str, device: str) -> Generate:
    import ctranslate2

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    words = sorted(vocabulary, key=vocabulary.get)
    model = ctranslate2.Generator(str(folder / "ctranslate2"), device=device, compute_type=dtype,
                                  intra_threads=torch.get_num_threads())  # fmt: skip

    def generate(ids: Tensor, n: int, ticks: Ticks) -> list[list[int]]:
        state = {"step": -1, "stop": False}

        def callback(result) -> bool:
            if result.step > state["step"]:
                state.update(step=result.step, stop=ticks())
            return state["stop"]

        prompts = [[words[i] for i in row] for row in ids.tolist()]
        results = model.generate_batch(prompts, max_length=n, min_length=n, sampling_topk=1, callback=callback,
                                       include_prompt_in_result=False)  # fmt: skip
        return [result.sequences_ids[0] for result in results]

    return generate


def _llama(folder: Path, dtype: str, device: str) -> Generate:
    import ctypes

    import llama_cpp
    import numpy as np

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0 if device == "cpu" else 1000
    model = llama_cpp.llama_model_load_from_file(str(folder / f"{dtype}.gguf").encode(), options)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def decode(context, ids: np.ndarray, first: int) -> np.ndarray:
        """The likeliest next token of every row after ids [B, T] at positions first, first + 1 ..."""
        B, T = ids.shape
        batch = llama_cpp.llama_batch_init(B * T, 0, 1)
        batch.n_tokens = B * T
        for row in range(B):
            for t in range(T):
                i = row * T + t
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(ids[row, t]), first + t, 1
                batch.seq_id[i][0], batch.logits[i] = row, t == T - 1
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = [llama_cpp.llama_get_logits_ith(context, row * T + T - 1) for row in range(B)]
        return np.array([np.ctypeslib.as_array(row, (n_vocab,)).argmax() for row in rows])

    def generate(ids: Tensor, n: int, ticks: Ticks) -> list[list[int]]:
        B, T = ids.shape
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = B * (T + n), B
        options.n_batch = max(512, B * T)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.no_perf = True
        if dtype == "float32":  # by default its cache is float16
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, options)
        ticks.times[0] = time.perf_counter()  # nobody else allocates a cache in its prefill's time
        found = [decode(context, ids.numpy(), 0)]
        while not ticks() and len(found) < n:
            found.append(decode(context, found[-1][:, None], T + len(found) - 1))
        llama_cpp.llama_free(context)
        return np.stack(found, 1).tolist()

    generate.log = silent  # called as long as the model lives
    return generate


@dataclass(frozen=True)
class Program:
    """load: folder, dtype, device -> Generate. dtypes: that it has, by device. module: that must be installed."""

    load: Callable[[Path, str, str], Generate]
    dtypes: dict[str, tuple[str, ...]]
    module: str

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if device not in self.dtypes:
            return f"not compared on {device}"
        return None if importlib.util.find_spec(self.module) else f"{self.module} is not installed"


PLAIN = ("float32", "bfloat16")
PROGRAMS = {
    "gpt2_fast": Program(_gpt2_fast, {"cpu": (*PLAIN, "int8", "int4"), "cuda": PLAIN}, "gpt2_fast"),
    "transformers": Program(_transformers, {"cpu": PLAIN, "cuda": PLAIN}, "transformers"),
    "ctranslate2": Program(_ctranslate2, {"cpu": ("float32", "int8"), "cuda": ("float32", "bfloat16")}, "ctranslate2"),
    "llama.cpp": Program(_llama, {"cpu": (*PLAIN, "q8_0", "q4_0")}, "llama_cpp"),
}


def write_weights(folder: Path, size: str) -> None:
    """A Hugging Face folder of a random model of the size; biases and LayerNorms are moved too.

    Its weights are wider than GPT-2's own at initialisation, with which a model only repeats its last token and no
    attention that was wrong would be seen in the text.
    """
    from gpt2_fast import GPT2Config, GPT2LMHeadModel, get_tokenizer

    sizes = {**SIZES[size], "vocab_size": 50257, "n_positions": 1024}
    spread = WIDTH * sizes["n_embd"] ** -0.5
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=spread, eos_token_id=None, bos_token_id=None))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.02)
    model.save_pretrained(folder)
    get_tokenizer().save_pretrained(folder)


def prepare(what: str, folder: Path, size: str) -> None:
    """Writes the weights, or what a peer loads of them."""
    if what == "weights":
        write_weights(folder, size)
    elif what == "ctranslate2":
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder)).convert(str(folder / "ctranslate2"))
    else:
        from benchmarks.peers import gguf_file
        from gpt2_fast.checkpoint import load_pretrained

        gguf_file.write(folder / f"{what}.gguf", *load_pretrained(folder), folder, what)


def prompts(batch_size: int, length: int) -> Tensor:
    """int64 [B, T], the same for every program."""
    return torch.randint(0, 50256, (batch_size, length), generator=torch.Generator().manual_seed(batch_size))


def measure(options: argparse.Namespace) -> dict:
    """Seconds of every step by batch size and of every prefill, the tokens, seconds to load, peak memory."""
    started = time.perf_counter()
    generate = PROGRAMS[options.name].load(Path(options.folder), options.dtype, options.device)
    steps, tokens, prefills = {}, {}, []
    warm = Ticks(options.device, 0.0)
    generate(prompts(1, options.prompt), 2, warm)
    loaded = time.perf_counter() - started
    for batch_size in map(int, options.batch_sizes.split(",")):
        ticks = Ticks(options.device, options.seconds)
        tokens[batch_size] = generate(prompts(batch_size, options.prompt), options.new, ticks)
        steps[batch_size] = ticks.steps
    for _ in range(options.prefills + 1):  # the first is not counted: memory of this length is taken there
        ticks = Ticks(options.device, 0.0)
        tokens["prefill"] = generate(prompts(1, options.prefill), 1, ticks)
        prefills.append(ticks.first)
    return {
        "load_seconds": loaded,
        "steps": steps,
        "prefills": prefills[1:],
        "tokens": tokens,
        "peak_bytes": peak_bytes(options.device),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--folder", "--model", "--name", "--dtype", "--device", "--batch-sizes", "--prepare"):
        parser.add_argument(flag)
    for flag in ("--prompt", "--new", "--prefill", "--prefills"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args(argv)
    if options.prepare:
        prepare(options.prepare, Path(options.folder), options.model)
        print("{}")
    else:
        print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
