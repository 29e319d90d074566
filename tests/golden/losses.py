"""Golden training runs: 20 steps of two tiny models, exact to the bit, for each instruction set.

They protect what every op's own tests leave room for: that a move of code changes no bit of training. A run goes
through the public API alone, so it stays as it is while what is behind the API moves. `losses.json` has for each run
the loss and the gradient norm of every step, and SHA-256 of the weights as initialised and of the weights, averages
and masters after the last step.

Bits depend on nothing but the instruction set and, in bfloat16, on whether the processor multiplies it natively, both
of which are in a run's name: all products are this package's own (GPT2_FAST_GEMM=cpp), torch's few kernels (initial
weights, sums of biases) are those of AVX2 (ATEN_CPU_CAPABILITY), and the number of threads does not matter: the file is
made with one thread and compared with two. What else they depend on, an entry records: the compiler's major version,
torch's version and the platform. Where one of these differs, runs are compared within TOLERANCE instead.

`python -m tests.golden losses` remakes the entries of those instruction sets that this processor has, and leaves the
others. Run as a program, this file prints them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).with_name("losses.json")
COMMAND = "python -m tests.golden losses"
ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
STEPS, MICRO_BATCHES, B, T, V = 20, 2, 4, 65, 301
DTYPES = ("float32", "bfloat16")

# Sizes that no tile divides: each kernel meets its tails. No product has fewer rows than cpu_policy.MIN_ROWS, below
# which the vendor multiplies.
CASES = {
    "tied": {"n_layer": 2, "n_embd": 96, "n_head": 4, "n_positions": 65},
    "untied_erf_packed_recomputed": {
        "n_layer": 2, "n_embd": 80, "n_head": 2, "n_positions": 70, "n_inner": 202, "activation_function": "gelu",
        "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False,
    },
}  # fmt: skip

ENVIRONMENT = ("compiler", "torch", "platform")  # of an entry: where all agree, bits do
# By dtype, the largest relative difference of a step's loss and of its gradient norm between two environments: several
# times what baseline and AVX2 differ by (4.5e-8 and 2.7e-7 in float32), or native and widened bfloat16 (7e-5, 3.4e-3).
TOLERANCE = {"float32": {"losses": 1e-6, "grad_norms": 1e-5}, "bfloat16": {"losses": 5e-4, "grad_norms": 2e-2}}


def _batch(case: str, generator) -> tuple[dict, int]:
    """(arguments of the model, how many positions they score). Ids are skewed, so that there is something to learn."""
    import torch

    u, v = torch.randint(V, (2, B, T + 1), generator=generator)
    ids = u * v // V
    if case == "tied":
        return {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}, B * T
    ids = ids[:2, :-1]
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[0, :9], mask[1, -17:] = 0, 0  # padding on either side
    documents = (torch.arange(T) >= torch.tensor([[32], [7]])).long()
    labels = ids.masked_fill(mask == 0, -100)
    arguments = {"input_ids": ids, "labels": labels, "attention_mask": mask, "document_ids": documents}
    return arguments, int((labels[:, 1:] != -100).sum())


def _digest(tensors: dict) -> str:
    """SHA-256 of names and bytes, in order of the names."""
    import torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def train(case: str, dtype_name: str) -> dict:
    """One run: {"losses", "grad_norms": hexadecimal floats of each step; "initial", "weights", ...: SHA-256}."""
    import torch

    from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1234)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, **CASES[case])).train()
    weights = dict(model.named_parameters())
    entry = {"initial": _digest(weights)}
    if case != "tied":
        model.gradient_checkpointing_enable()
    groups = [
        {"params": [p for p in weights.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in weights.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, betas=(0.9, 0.95), clip_grad_norm=0.5)
    if dtype_name != "float32":
        optimizer.cast(model, getattr(torch, dtype_name))
    generator = torch.Generator().manual_seed(5)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 5)
        batches = [_batch(case, generator) for _ in range(MICRO_BATCHES)]
        scored = sum(count for _, count in batches)
        loss = 0.0
        for arguments, _ in batches:
            part = model(**arguments, num_items_in_batch=scored).loss
            part.backward()
            loss += float(part.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.hex())
        norms.append(float(optimizer.last_grad_norm).hex())
    entry |= {"losses": losses, "grad_norms": norms, "weights": _digest(weights)}
    states = {name: optimizer.state[p] for name, p in weights.items()}
    for key in ("exp_avg", "exp_avg_sq", "master"):
        if all(key in state for state in states.values()):
            entry[key] = _digest({name: state[key] for name, state in states.items()})
    return entry


def run_here() -> dict[str, dict]:
    """The entries of every instruction set that this processor and this build have."""
    import torch

    from gpt2_fast import _C
    from gpt2_fast.ops.runtime.cpu_policy import cpu_policy

    environment = {
        "compiler": _C.COMPILER.split(".")[0],
        "torch": torch.__version__.split("+")[0],
        "platform": f"{platform.system()} {platform.machine()} {platform.libc_ver()[0]}, "
        f"torch's kernels {torch.backends.cpu.get_cpu_capability()}",
    }
    native = "native" if cpu_policy().native_bfloat16 else "widened"
    entries = {}
    for isa in ISAS:
        try:
            _C.set_isa(isa)
        except ValueError:
            continue
        for case in CASES:
            for dtype_name in DTYPES:
                name = f"{case}/{dtype_name}{'' if dtype_name == 'float32' else ' ' + native}/{isa}"
                entries[name] = environment | train(case, dtype_name)
        assert _C.isa() == isa, f"the runs of {isa} ended on {_C.isa()}"
    return entries


def run(threads: int) -> dict[str, dict]:
    """`run_here` in a process of its own: what it depends on is read from the environment once."""
    environment = os.environ | {
        "GPT2_FAST_GEMM": "cpp",
        "ATEN_CPU_CAPABILITY": "avx2",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # a thread that spins takes the processor from whoever else is on it
    }
    environment.pop("GPT2_FAST_ISA", None)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the golden runs failed:\n{done.stderr}")
    return json.loads(done.stdout)


def read() -> dict[str, dict]:
    return json.loads(FILE.read_text())


def remake() -> str:
    """Writes the entries of every instruction set that is here, leaves the others; says which."""
    entries = read() if FILE.exists() else {}
    made = run(threads=1)
    entries |= made
    lines = [f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    kept = sorted(entries.keys() - made.keys())
    return f"{FILE.name}: made {', '.join(sorted(made))}; kept {', '.join(kept) or 'none'}"


def nearest(name: str, golden: dict[str, dict]) -> str:
    """The entry to compare a run with: its own, else that of the widest instruction set of the same model and dtype."""
    if name in golden:
        return name
    case, dtype_name, _ = name.replace(" native", "").replace(" widened", "").split("/")
    same = [n for n in golden if n.startswith(f"{case}/{dtype_name}")]
    return max(same, key=lambda n: ISAS.index(n.split("/")[2]))


def _first_difference(found: dict, wanted: dict, tolerance: dict[str, float]) -> str | None:
    """Of two runs, the first step whose loss or norm differs by more than the tolerance (0: at all)."""
    for step in range(STEPS):
        for key in ("losses", "grad_norms"):
            a, b = float.fromhex(found[key][step]), float.fromhex(wanted[key][step])
            if not (a == b or abs(a - b) <= tolerance.get(key, 0.0) * abs(b)) or math.isnan(a):
                return f"{key}[{step}] is {a!r}, in the file {b!r} (relative difference {abs(a - b) / abs(b):.1e})"
    return None


def compare(name: str, found: dict, golden: dict[str, dict]) -> tuple[str | None, str | None]:
    """(what is wrong, or None; why bits were not compared, or None)."""
    of = nearest(name, golden)
    wanted = golden[of]
    differing = [f"{k} {found[k]}, in the file {wanted[k]}" for k in ENVIRONMENT if found[k] != wanted[k]]
    if of != name:
        differing.insert(0, f"it has no entry in the file ({COMMAND} makes it); compared with {of}")
    if differing:
        tolerance = TOLERANCE[name.split("/")[1].split()[0]]
        return _first_difference(found, wanted, tolerance), "; ".join(differing)
    problems = [f"{key} differ" for key in wanted if key not in ENVIRONMENT and found.get(key) != wanted[key]]
    first = _first_difference(found, wanted, {})
    return ", ".join(([first] if first else []) + problems) or None, None


if __name__ == "__main__":
    json.dump(run_here(), sys.stdout)
