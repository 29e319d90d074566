"""Which card takes which configurations, what is refused there and how: on cards that are not here."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpt2_fast.kernels import cards, tuning

from gpt2_fast.cli import main
from gpt2_fast.ops import rooms
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.dispatch import ImplementationUnavailable
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.processes import check_dtype

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
T4 = ("Tesla T4", 7, 5)
V100 = ("Tesla V100", 7, 0)
MI300 = ("AMD Instinct MI300X", 9, 4, "gfx942:sramecc+:xnack-")
RX7900 = ("AMD Radeon RX 7900 XTX", 11, 0, "gfx1100")
CACHES = (cards.of_device, dispatch.card_refusal, dispatch._warn_of_card, dispatch._choice, dispatch._cuda_missing)


def _forget() -> None:
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def insert(monkeypatch):
    """insert(*cards) makes this a machine with them: (name, major, minor[, gcnArchName: of ROCm])."""

    rooms()  # fills dispatch.TABLE

    def fake(*given):
        found = [
            SimpleNamespace(name=n, major=major, minor=minor, gcnArchName=gfx[0] if gfx else n, total_memory=16 << 30)
            for n, major, minor, *gfx in given
        ]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found[torch.device(device).index].name)
        monkeypatch.setattr(torch.version, "hip", "6.4" if len(given[0]) > 3 else None)
        monkeypatch.setattr(torch.version, "cuda", None if len(given[0]) > 3 else "13.0")
        _forget()

    _forget()
    yield fake
    monkeypatch.undo()
    _forget()


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((5, 0), None), ((7, 0), None), ((7, 2), None), ((7, 5), 75), ((8, 0), 80), ((8, 6), 86), ((8, 7), 86),
        ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((11, 0), 120), ((12, 0), 120), ((12, 1), 120),
        ((13, 0), 120),
    ],
)  # fmt: skip
def test_a_capability_takes_its_row(capability, row, insert):
    insert(("a card", *capability))
    assert cards.of_device(0)[0] == row
    if row is not None:
        from gpt2_fast.kernels import aot

        aot._card_arch.cache_clear()
        assert aot.config_arch(CUDA) == row
        aot._card_arch.cache_clear()


def test_a_row_that_stands_in_fits_what_it_stands_in_for():
    """A newer card takes sm_120's rows: no architecture since sm_80 has less shared memory."""
    since = [arch for name, arch in cards.ARCHS.items() if isinstance(name, int) and name >= 80]
    assert cards.ARCHS[cards.NEWEST].shared == min(arch.shared for arch in since)
    assert cards.ARCHS[80].base == 80
    assert {cards.lineage(name)[-1] for name in cards.ARCHS} == {80, 90, 100}


@pytest.mark.parametrize(
    ("gfx", "row"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a:sramecc+:xnack-", "gfx90a"), ("gfx1100", None), ("gfx908", None)],
)
def test_amds_cards_go_by_their_gfx_name(gfx, row, insert):
    """ROCm says capability 9.x of both: never sm_90's rows, and no maxnreg, which Triton has for NVIDIA alone."""
    insert(("AMD Instinct", 9, 0, gfx))
    assert cards.of_device(0)[0] == row
    if row is not None:
        assert 90 not in cards.lineage(row)
        assert "maxnreg" in tuning.config("add_layernorm", "forward", 80, 4, width=1024, dropout=False)
        assert "maxnreg" not in tuning.config("add_layernorm", "forward", row, 4, width=1024, dropout=False)


@pytest.mark.parametrize(
    ("card", "dtype", "said"),
    [
        (T4, torch.bfloat16, r"Tesla T4 \(sm_75\) has no bfloat16: use float16 or float32, or plain PyTorch"),
        (V100, torch.float32, r"Tesla V100 \(sm_70\) is not supported: the kernels are for sm_75, "),
        (RX7900, torch.float16, r"AMD Radeon RX 7900 XTX \(gfx1100\) is not supported: the kernels are for sm_75, "),
    ],
)
def test_what_a_card_cannot_run_is_the_reference_with_one_line_or_raises_by_name(card, dtype, said, insert):
    insert(card)
    ops = ("attention", "add_layernorm", "mlp", "linear_cross_entropy", "adamw")
    with pytest.warns(RuntimeWarning, match=said) as warned:
        assert {dispatch.choose(op, "auto", CUDA, dtype) for op in ops} == {"reference"}
    assert dispatch.choose("attention", "reference", CUDA, dtype) == "reference"
    (line,) = (str(w.message) for w in warned if str(w.message).startswith("gpt2_fast: "))
    assert "\n" not in line
    with pytest.raises(ImplementationUnavailable, match=f"^attention: impl='triton' cannot run: {said}"):
        dispatch.choose("attention", "triton", CUDA, dtype)


def test_what_a_t4_runs(insert):
    insert(T4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="gpt2_fast: ")
        for dtype in (torch.float16, torch.float32):
            assert dispatch.choose("attention", "auto", CUDA, dtype) == "triton"
        for dtype in dispatch.KERNEL_DTYPES:  # embedding.cu rounds to bfloat16 in integer code there
            assert dispatch.choose("embedding", "auto", CUDA, dtype) == "cuda"


def test_two_cards_of_one_machine_are_asked_each(insert):
    insert(("NVIDIA A100", 8, 0), T4)
    assert dispatch.choose("attention", "auto", CUDA, torch.bfloat16) == "triton"
    with pytest.warns(RuntimeWarning, match="Tesla T4"):
        assert dispatch.choose("attention", "auto", torch.device("cuda", 1), torch.bfloat16) == "reference"


def test_on_rocm_the_embedding_is_the_references(insert):
    insert(MI300)
    assert dispatch.choose("attention", "auto", CUDA, torch.bfloat16) == "triton"
    chosen, passed = dispatch.explain("embedding", CUDA, torch.bfloat16)
    assert chosen == "reference"
    assert passed == [("cuda", "cuda kernels are for NVIDIA's cards, and this torch is built for ROCm 6.4")]
    with pytest.raises(ImplementationUnavailable, match="^embedding: impl='cuda' cannot run: .* ROCm 6.4"):
        dispatch.choose("embedding", "cuda", CUDA, torch.bfloat16)


def test_embedding_cu_is_not_asked_of_a_card_before_sm_75(insert):
    insert(V100)
    with pytest.raises(ImplementationUnavailable, match="Tesla V100"):
        dispatch.choose("embedding", "cuda", CUDA, torch.float32)


def test_training_in_bfloat16_on_a_card_without_it_is_one_line(insert):
    insert(T4)
    with pytest.raises(ValueError, match="^--dtype is 'bfloat16' and Tesla T4 has no bfloat16; use --dtype float32"):
        check_dtype(TrainConfig(dtype="bfloat16"), CUDA)
    check_dtype(TrainConfig(dtype="bfloat16", impl="reference"), CUDA)
    check_dtype(TrainConfig(dtype="float32"), CUDA)
    check_dtype(TrainConfig(dtype="bfloat16"), torch.device("cpu"))
    insert(("NVIDIA L4", 8, 9))
    check_dtype(TrainConfig(dtype="bfloat16"), CUDA)


@pytest.mark.parametrize(
    ("card", "line"),
    [
        (T4, "those of sm_75; float32 and float16, no bfloat16; compiled, and never run on this card"),
        (("NVIDIA L4", 8, 9), "those of sm_89; compiled, and never run on this card"),
        (("NVIDIA H200", 9, 0), "those of sm_90; have run on NVIDIA H200, 2026-11-26"),
        (MI300, "those of gfx942; compiled, and never run on this card"),
        (V100, "Tesla V100 (sm_70) is not supported: the kernels are for"),
    ],
)
def test_doctor_says_which_row_a_card_takes_and_whether_it_has_run(card, line, insert, capsys):
    insert(card)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    (found,) = re.findall(r"^  Triton kernels +(.*)$", printed, re.MULTILINE)
    assert found.startswith(line)
    assert re.search(r"^  attention +(triton|reference)$", printed, re.MULTILINE)
    if len(card) > 3:
        assert "not cuda: cuda kernels are for NVIDIA's cards" in printed


def test_the_documents_have_the_table_of_the_code():
    lines = (ROOT / "docs/install.md").read_text().splitlines()
    for arch, row in cards.ARCHS.items():
        (line,) = [line for line in lines if line.startswith(f"| {row.cards} | {cards.label(arch)} |")]
        assert line.endswith("| never |") == (not row.ran)
        assert ("bfloat16" in line or "float32 and float16" not in line) == row.bfloat16


@pytest.mark.parametrize("given", ["70", "sm_91", "gfx1100", "90,x"])
def test_doctor_names_the_architectures_there_are(given, capsys):
    assert main(["doctor", "--kernels", "--arch", given]) != 0
    assert "choose of 75, 80, 86, 89, 90, 100, 120, gfx90a, gfx942" in capsys.readouterr().err
