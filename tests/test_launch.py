"""Every Triton launch goes through kernels/launch.py: on its tensors' device, with the options that were compiled."""

from __future__ import annotations

import ast
import contextlib
import importlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from gpt2_fast.kernels import (
    adamw,
    add_layernorm,
    aot,
    attention,
    attention_decode,
    bias,
    linear_cross_entropy,
    linear_gelu,
    mlp,
    shipped,
    tuning,
)
from gpt2_fast.kernels.launch import launch

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
N, C, F, V, P = 128, 96, 384, 130, 0.1


class Recorder:
    """Stands in for a kernel: notes on which device and with which arguments it was launched."""

    def __init__(self, kernel, launches: list, current):
        self.fn, self.arg_names, self.launches, self.current = kernel.fn, kernel.arg_names, launches, current

    def __getitem__(self, grid):
        def run(*arguments, **keywords):
            given = {**dict(zip(self.arg_names, arguments, strict=False)), **keywords}
            self.launches.append((self.fn.__name__, self.current(), grid, given))

        return run


@pytest.fixture
def launches(monkeypatch):
    """The launches of all kernels, which do not run: (kernel, current device, grid, arguments). Of two GPUs that are
    not there cuda:0 is current."""
    noted, devices = [], [0]

    @contextlib.contextmanager
    def device(index):
        devices.append(index)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(aot, "_card_arch", lambda index: 90)
    monkeypatch.setattr(linear_gelu, "_multiprocessors", lambda index: 132)
    recorders = {}
    for stem in shipped.stems():
        module = importlib.import_module(f"gpt2_fast.kernels.{stem}")
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                recorder = recorders.setdefault(value.fn, Recorder(value, noted, torch.cuda.current_device))
                monkeypatch.setattr(module, name, recorder)
    table = {name: (recorders[kernel.fn], owned) for name, (kernel, owned) in attention.KERNELS.items()}
    monkeypatch.setattr(attention, "KERNELS", table)
    return noted


def _every_launcher(device: str) -> None:
    """Calls each launcher of kernels/ once with tensors on `device`."""
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device=device)
    float32 = lambda *shape: empty(*shape, dtype=torch.float32)
    key, rows, row = empty(1, dtype=torch.int64), empty(N, C), empty(C)
    add_layernorm.forward(rows, rows, row, row, 1e-5, P, key, 16, torch.bfloat16)
    add_layernorm.statistics(rows, rows, 1e-5, P, key, 16)
    add_layernorm.normalize(rows, row, row, float32(N), float32(N), torch.bfloat16)
    add_layernorm.backward(rows, rows, rows, row, float32(N), float32(N), P, key, 16, torch.bfloat16, True)
    for n in (2, N):  # one kernel for few rows, others for many
        x, weight = empty(n, C), empty(C, F)
        saved = mlp.forward(
            x, x, row, row, weight, empty(F), 1e-5, P, key, 16, False, torch.bfloat16
        )  # fmt: skip
        _, kept, h, u, mean, rstd = saved
        du, _ = mlp.product_gelu_backward(empty(n, C), empty(F, C), u, False)
        mlp.backward(du, None, kept, h, mean, rstd, row, row, weight, P, key, 16, torch.bfloat16, True)
    for kernel, *others in ((linear_gelu.forward, empty(C, F), empty(F)), (linear_gelu.backward, empty(F, C), u)):
        kernel(rows, *others, False, tuning.config("linear_gelu", kernel.__name__, 90, 2))
    mlp.gelu_backward(mlp.gelu_forward(u, False), u, False)
    bias.column_sum(rows)
    qkv, segments = empty(2, 40, 3, 2, 64), empty(2, 40, dtype=torch.int32)
    out, lse = attention.forward(qkv, 0.125, segments, P, key, 16)
    attention.backward(out, qkv, out, lse, 0.125, segments, P, key, 16)
    cache, at = empty(2, 2, 300, 64), empty(2, dtype=torch.int32)
    attention_decode.decode(empty(2, 2, 64), cache, cache, at, at, 0.125)
    logits, labels = empty(N, V + 6).narrow(1, 0, V), empty(N, dtype=torch.int64)
    linear_cross_entropy.softmax_xent_(logits, labels, float32(N), -100, float32(1), True)
    linear_cross_entropy.scale_(rows, float32(1))
    table, chunks, norm = empty(3, 10, dtype=torch.int64), empty(7, dtype=torch.int32), float32(1)
    adamw.grad_norm(table, chunks, norm, True, adamw.CHUNK)
    adamw.step(table, chunks, empty(1, 6, dtype=torch.float64), norm, 1.0, True, adamw.CHUNK)


def test_every_launcher_launches_on_its_tensors_device_with_the_options_that_were_compiled(launches):
    with FakeTensorMode():
        _every_launcher("cuda:1")
    assert torch.cuda.current_device() == 0  # as it was
    kernels = {
        node.name for path in KERNELS.glob("*.py") for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }  # fmt: skip
    assert {name for name, *_ in launches} == kernels  # forward_kernel and backward_kernel each stand for two
    for name, current, _, given in launches:
        assert current == 1, name
        assert given.items() >= aot.LAUNCH_OPTIONS.items(), name
        assert given["num_warps"] > 0, name


def test_on_the_current_device_nothing_is_switched(launches, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda index: pytest.fail(f"switched to cuda:{index}"))
    with FakeTensorMode():
        _every_launcher("cuda:0")
    assert {current for _, current, *_ in launches} == {0}


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_kernel_is_launched_elsewhere():
    """kernel[grid](...) stands in launch.py alone, and nothing else sets the device."""
    paths = sorted(KERNELS.glob("*.py"))
    assert len(paths) > 10
    for path in paths:
        tree = ast.parse(path.read_text())
        launched = [call.lineno for call in _calls(tree) if isinstance(call.func, ast.Subscript)]
        guards = [
            n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("device_of", "set_device")
        ]
        if path.name == "launch.py":
            assert len(launched) == 2
        else:
            assert not launched, f"{path.name}, lines {launched}: launch it by launch.launch"
            assert not guards, f"{path.name}, lines {guards}: launch.launch sets the device"


def test_what_changes_from_call_to_call_compiles_nothing_anew():
    """Triton compiles once more for an argument that is 1 and for one that is a multiple of 16, unless told not to."""
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                changing = {a.arg for a in node.args.args} & {"threshold", "site"}
                options = [o for d in node.decorator_list for o in getattr(d, "keywords", ())]
                kept = [ast.literal_eval(o.value) for o in options if o.arg == "do_not_specialize"]
                assert changing <= set().union(*kept), f"{path.name}: {node.name}"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("add_layernorm.forward_kernel: weight_ptr", lambda x, c: _norm(x, c[:, 0], c[:, 1])),
        ("add_layernorm.forward_kernel: bias_ptr", lambda x, c: _norm(x, c[0], c[:1, 0].expand(x.shape[1]))),
        ("add_layernorm.forward_kernel: x_ptr", lambda x, c: _norm(c[:, :4], c[0, :4], c[0, :4])),
        ("bias.column_sum_kernel: x_ptr", lambda x, c: bias.column_sum(x.t())),
        ("mlp.gelu_backward_kernel: dy_ptr",
         lambda x, c: mlp.gelu_backward(c.t(), c, False)),
        ("linear_cross_entropy.softmax_xent_kernel: losses_ptr",
         lambda x, c: linear_cross_entropy.softmax_xent_(
             c, torch.zeros(32, dtype=torch.int64), c[:, 0], -100, torch.ones(1), False)),
    ],
)  # fmt: skip
def test_a_strided_tensor_is_refused_by_name(name, call, launches):
    """Kernels read from the first address on: a strided vector gave the numbers that lie between its own."""
    x, square = torch.randn(3, 32), torch.randn(32, 32)
    with pytest.raises(ValueError, match=f"^{name} must be contiguous, and has shape .* and strides .*$"):
        call(x, square)
    assert not launches


def _norm(x, weight, bias_):
    return add_layernorm.forward(x, None, weight, bias_, 1e-5, 0.0, None, 0, torch.float32)


def test_a_tensor_on_another_device_is_named(launches):
    with FakeTensorMode():
        x, weight = torch.empty(4, 32, device="cuda:1"), torch.empty(32, device="cuda:0")
        with pytest.raises(ValueError, match=r"^add_layernorm.forward_kernel: weight_ptr is on cuda:0; its other"):
            _norm(x, weight, weight)
    assert not launches


def test_a_grid_that_no_gpu_launches_is_refused(launches):
    with FakeTensorMode():
        qkv = torch.empty(65536, 1, 3, 1, 16, device="cuda:1")
        with pytest.raises(ValueError, match="^a batch of 65536 sequences is above 65535, the most in one launch"):
            attention.forward(qkv, 0.25)
        cache, at = (
            torch.empty(65536, 1, 2, 16, device="cuda:1"),
            torch.empty(65536, dtype=torch.int32, device="cuda:1"),
        )
        with pytest.raises(ValueError, match="^a batch of 65536 sequences is above 65535"):
            attention_decode.decode(cache.select(2, 0), cache, cache, at, at, 0.25)
        partials = torch.empty(65536, 1, 1, device="cuda:1")
        with pytest.raises(ValueError, match=r"^bias.reduce_partials_kernel: a grid of \(1, 65536\) is above"):
            bias.reduce_partials(partials)
        assert not launches
        attention.forward(qkv.narrow(0, 0, 65535), 0.25)
    assert [grid for _, _, grid, _ in launches] == [(1, 1, 65535)]


def test_a_launch_that_fails_names_kernel_and_configuration(monkeypatch):
    def __getitem__(self, grid):
        def run(*_, **__):
            raise TypeError("out of resource: shared memory\nRequired: 300000")

        return run

    monkeypatch.setattr(Recorder, "__getitem__", __getitem__)
    kernel = Recorder(bias.column_sum_kernel, [], None)
    with pytest.raises(RuntimeError) as caught:
        launch(kernel, (3, 2), torch.zeros(4), torch.zeros(4), 1, 4, BLOCK_N=32, num_warps=4)
    assert str(caught.value) == (
        "bias.column_sum_kernel[(3, 2)](BLOCK_N=32, num_warps=4): TypeError: out of resource: shared memory"
    )
    assert isinstance(caught.value.__cause__, TypeError)
