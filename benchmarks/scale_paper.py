"""What a shared step would take on 8 and on 64 H100, by arithmetic: `python -m benchmarks scale --document`.

Nothing here was measured on several GPUs. What a number rests on stands in `ASSUMPTIONS`, which stands below the
table in SCALE.md. A step is `gpt2_fast.parallel`'s: micro-batches, their sum in float32, one exchange of partial sums
in float32, AdamW of a shard, one gathering of bfloat16 weights, nothing at the same time as anything else. Beside it
stand two forms that would have the same bits: partial sums added up inside a node before they leave it (a node's
micro-batches are a branch of the tree), and communication that hides behind the last micro-batch's backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measure import ROOT, markdown_table
from benchmarks.mfu import conventions
from benchmarks.programs import SIZES
from gpt2_fast.config import GPT2Config, num_params
from gpt2_fast.report.machine import card_peak

DOCUMENT = ROOT / "benchmarks" / "SCALE.md"
NODE = 8  # GPUs
MEASURED = 566e3  # tokens a second of a step, see ASSUMPTIONS
MEMORY = 3.35e12  # bytes a second of an H100 SXM's memory, by its data sheet
NVLINK = 450e9  # bytes a second each way of a GPU's links within a node, by the data sheet (900 GB/s for both)
NETWORK = 50e9  # bytes a second each way of a GPU's own 400 Gb/s adapter, as in a DGX H100
REACHED = 0.75  # the part of memory, links and network that is reached
BACKWARD = 2 / 3  # of a micro-batch

ASSUMPTIONS = (
    "A micro-batch: the rate of one H200, 566 thousand tokens/s at 124M, B = 32, T = 1024, bfloat16 "
    "(benchmarks/NOTES.md, 2026-11-26), as a part of the card's peak. The H100 has the same peak and is assumed to "
    "reach the same part of it, at 1.5B and at smaller micro-batches too.",
    f"Memory {MEMORY / 1e12:.2f} TB/s, links within a node {NVLINK / 1e9:.0f} GB/s each way, an adapter of "
    f"{NETWORK / 1e9:.0f} GB/s each way for each GPU (data sheets of H100 SXM and DGX H100); {REACHED:.0%} of each is "
    "reached.",
    "Latency of a call, and waiting for the slowest process, are left out.",
    "An exchange between nodes sends each GPU's bytes through its own adapter. A gathering lets each byte into a node "
    "once, through all its adapters.",
    f"Hidden: at most the last micro-batch's backward, {BACKWARD:.0%} of it, hides the exchange.",
)
# Model, GPUs, micro-batches of a step, sequences of one: half a million tokens a step for 124M, one million for 1.5B.
CASES = (("gpt2", 8, 16, 32), ("gpt2", 64, 64, 8), ("gpt2-xl", 8, 128, 8), ("gpt2-xl", 64, 128, 8))
CONTEXT = 1024
HEADER = (
    "model", "GPUs", "micro-batches a GPU", "compute", "adding", "exchange", "AdamW", "gathering", "step ms",
    "thousand tokens/s", "of 1 GPU's", "by node first", "and hidden",
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of one step. by_node: of an exchange that adds inside a node first."""

    compute: float
    adding: float
    exchange: float
    by_node: float
    update: float
    gathering: float
    backward: float  # of the last micro-batch

    @property
    def step(self) -> float:
        return self.compute + self.adding + self.exchange + self.update + self.gathering

    @property
    def step_by_node(self) -> float:
        return self.step - self.exchange + min(self.by_node, self.exchange)

    @property
    def step_hidden(self) -> float:
        left = max(min(self.by_node, self.exchange) - self.backward, 0.0)
        return self.step - self.exchange + left


def parts(model: str, gpus: int, micro_batches: int, sequences: int) -> Parts:
    """The seconds of one step's parts on `gpus` H100."""
    config, base = GPT2Config(**SIZES[model]), GPT2Config(**SIZES["gpt2"])
    P, own, nodes = num_params(config), micro_batches // gpus, max(gpus // NODE, 1)
    rate = MEASURED * conventions(base, CONTEXT)["llm.c"]  # FLOPs a second
    assert rate < card_peak("NVIDIA H100 SXM", "bfloat16")
    micro = sequences * CONTEXT * conventions(config, CONTEXT)["llm.c"] / rate
    memory, link, network = (speed * REACHED for speed in (MEMORY, NVLINK, NETWORK))
    # Half of the gradients are copied into a sum (2 bytes read, 4 written), half added to one; then sums to sums.
    adding = P * (own / 2 * 6 + own / 2 * 10 + max(own / 2 - 1, 0) * 12) / memory if own > 1 else P * 6 / memory
    within, beyond = (min(gpus, NODE) - 1) / gpus, (nodes - 1) / nodes
    exchange = max(4 * P * within / link, 4 * P * beyond / network)
    in_node = 4 * P * (NODE - 1) / NODE / link
    by_node = in_node + 4 * P / NODE * beyond / network if nodes > 1 else exchange
    summing = P * 4 / memory + P / gpus * 4 / memory
    update = P / gpus * (4 + 3 * 8 + 2) / memory + summing
    gathering = max(2 * P * (gpus - 1) / gpus / link, 2 * P * beyond / (NODE * network))
    return Parts(own * micro, adding, exchange, by_node, update, gathering, micro * BACKWARD)


def rows() -> list[list[str]]:
    """The table, one row a case."""
    found = []
    for model, gpus, micro_batches, sequences in CASES:
        p = parts(model, gpus, micro_batches, sequences)
        tokens, alone = micro_batches * sequences * CONTEXT, p.compute  # what one GPU needs for its share
        ms = lambda seconds: f"{seconds * 1e3:.1f}"
        each = (p.compute, p.adding, p.exchange, p.update, p.gathering, p.step)
        forms = (p.step, p.step_by_node, p.step_hidden)
        found.append([
            f"{num_params(GPT2Config(**SIZES[model])) / 1e6:,.0f}M", str(gpus), str(micro_batches // gpus),
            *map(ms, each), f"{tokens / p.step / 1e3:,.0f}", *(f"{alone / step:.1%}" for step in forms),
        ])  # fmt: skip
    return found


def document() -> str:
    """The table and what it assumes, as Markdown."""
    return "\n".join([markdown_table(HEADER, rows()), "", *(f"- {line}" for line in ASSUMPTIONS)])
