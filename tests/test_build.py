"""The build: what it includes, what it ships, CUDA source through nvcc and NVRTC, one OpenMP runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from sanitize import NEEDS

from gpt2_fast import sources
from gpt2_fast.ops.runtime import cuda, dispatch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


def _run(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def _python(code: str, **environment) -> str:
    done = _run(sys.executable, "-W", "error::RuntimeWarning", "-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else None
    return str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")


def _no_nvrtc() -> str:
    try:
        cuda.find_nvrtc()
    except RuntimeError as error:
        return str(error)
    return ""


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
needs_nvrtc = pytest.mark.skipif(bool(_no_nvrtc()), reason=_no_nvrtc())


def test_no_torch_header():
    for path in CSRC.iterdir():
        included = re.findall(r'#\s*include\s*[<"]([^">]+)', path.read_text())
        assert not [name for name in included if re.match(r"(torch|ATen|c10)/", name)], path.name


def test_extension_is_of_these_sources(tmp_path):
    extension = dispatch.extension()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sources.warn_if_stale(extension)
    shutil.copytree(CSRC, tmp_path / "csrc")
    (tmp_path / "csrc" / "isa.h").write_text("// changed\n")
    with pytest.warns(RuntimeWarning, match=r"other sources than .*build it again: pip install -e \."):
        sources.warn_if_stale(extension, tmp_path / "csrc")


def test_extension_is_on_the_stable_abi():
    """One build for every Python: setup.py compiles it so, and make wheels has abi3audit look at the symbols."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("a free-threaded Python has no stable ABI")
    assert Path(dispatch.extension().__file__).suffixes == [".abi3", ".so"]


def test_one_openmp_runtime_and_torchs_thread_count():
    out = _python("""
import os, torch
torch.set_num_threads(1)
from gpt2_fast.ops.embedding import embedding
maps = open("/proc/self/maps").read()
print(len({line.split()[-1] for line in maps.splitlines() if "gomp" in line or "iomp" in line or "libomp" in line}))
ids, wte, wpe = torch.zeros(4, 512, dtype=torch.int64), torch.zeros(8, 256), torch.zeros(512, 256)
counts = []
for threads in (1, 3):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    embedding(ids, wte, wpe, impl="cpp")
    counts.append(len(os.listdir("/proc/self/task")) - before)
print(counts)
""")
    assert out.split("\n")[:2] == ["1", "[0, 2]"], out


# ---- CUDA ----


@needs_nvcc
@pytest.mark.parametrize("arch", [75, 90])
def test_nvcc_compiles_with_no_spills(arch, tmp_path):
    done = _run("nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings",
                CSRC / "embedding.cu", "-o", tmp_path / "embedding.cubin")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == done.stderr.count("Compiling entry") == 34


@needs_nvcc
def test_fatbin_lies_beside_the_extension():
    fatbin = Path(dispatch.extension().__file__).with_name("embedding.fatbin")
    tool = _cuobjdump()
    assert fatbin.exists()
    if tool:
        listed = _run(tool, "-lelf", "-lptx", fatbin).stdout
        assert set(re.findall(r"sm_\d+(?=\.cubin)", listed)) == {"sm_75", "sm_80", "sm_90", "sm_100", "sm_120"}, listed
        assert re.findall(r"sm_\d+(?=\.ptx)", listed) == ["sm_80"], "later GPUs have sm_80's conversion"


def test_a_failing_nvcc_does_not_fail_the_build(tmp_path, monkeypatch):
    ninja = pytest.importorskip("ninja", reason="ninja is a build dependency, not installed here")
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    fatbin = tmp_path / "embedding.fatbin"
    text = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["ninja_file"](tmp_path, tmp_path / "_C.so", fatbin)
    (tmp_path / "build.ninja").write_text(text)
    done = _run(Path(ninja.BIN_DIR) / "ninja", "-C", tmp_path, fatbin)
    assert done.returncode == 0, done.stdout
    assert "NVRTC will compile" in done.stdout
    assert not fatbin.exists()


def test_a_compiler_without_avx512bf16_builds_the_rest(tmp_path, monkeypatch):
    """g++ 9, for one. Where the set is built, only the sources that gain from it are, and the table knows which."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("other processors have one instruction set")
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    text = setup["ninja_file"](tmp_path, tmp_path / "_C.so", tmp_path / "embedding.fatbin")
    for isa, (base, own, _) in setup["PARTIAL"].items():
        assert {Path(o).stem for o in re.findall(rf"build (\S+\.{isa})\.o:", text)} == {*own, "table"}
        assert re.search(rf"{base} .*'-DGPT2_OWN_KERNELS\(KERNEL\)=GPT2_{own[0].upper()}_KERNELS\(KERNEL\)", text)
    compiler = tmp_path / "old"
    compiler.write_text('#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    text = setup["ninja_file"](tmp_path, tmp_path / "_C.so", tmp_path / "embedding.fatbin")
    assert "avx512bf16" not in text.lower()
    assert "amx" not in text.lower(), "its table needs the kernels of a set that is not there"
    assert "attention.avx512.o" in text
    compiler.write_text("#!/bin/sh\n! grep -q tdpbf16ps\n")  # it compiles, and its assembler is older than it
    text = setup["ninja_file"](tmp_path, tmp_path / "_C.so", tmp_path / "embedding.fatbin")
    assert "attention.avx512bf16.o" in text
    assert "amx" not in text.lower()


def test_the_sets_in_use_are_those_that_the_processor_has():
    """As the system lists them; AMX's tile registers it may keep to itself."""
    if platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").exists():
        pytest.skip("nothing lists them here")
    flags = Path("/proc/cpuinfo").read_text().split()
    extension, before = dispatch.extension(), dispatch.extension().isa()
    built = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["known_isas"](os.environ.get("CXX", "g++"))
    taken = {}
    for isa in built:
        with contextlib.suppress(ValueError):
            extension.set_isa(isa)
            taken[isa] = extension.isa()
    extension.set_isa(before)
    expected = {isa for isa in built if isa == "baseline" or NEEDS[isa] in flags}
    assert set(taken) - {"amx"} == expected - {"amx"}
    assert all(isa == name for isa, name in taken.items())


def test_kernels_check_their_arguments():
    """They are read by name, the first source that has one counts, and no kernel reads what it was not given."""
    kernel, name = dispatch.extension().embedding_first_outside, "embedding_first_outside"
    ids, result = torch.tensor([[0, 5], [2, 7]]), torch.zeros(1, dtype=torch.int64)
    given = {"n": 4, "limit": 5, "result": result}
    kernel({"ids": ids}, given)
    assert result.item() == 1
    kernel({"limit": 6}, {"ids": ids}, given)
    assert result.item() == 3
    for changed, said in (
        ({"ids": ids.t()}, "ids must be a contiguous tensor"),
        ({"ids": ids.int()}, "ids must be of dtype i64"),
        ({"ids": ids.to("meta")}, "ids must be on the CPU"),
        ({"ids": ids, "result": 3}, "result must be a contiguous tensor"),
        ({"ids": ids, "limit": 1.5}, "limit is a float; it must be an int$"),
        ({"ids": ids, "limit": torch.int64}, r"limit is a torch\.dtype; it must be an int$"),
        ({}, "ids is not given"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: {said}"):
            kernel(changed, given)
    update = {"table": torch.zeros(1, 10, dtype=torch.int64), "tensors": 0, "chunk": 1, "chunks": 0, "max_norm": "1"}
    with pytest.raises(TypeError, match="^adamw_update: max_norm is a str; it must be a float$"):
        dispatch.extension().adamw_update(update, {"hyper": torch.zeros(1, 6).double(), "norm": None})
    for passed in ((), (1,), ({"ids": ids},)):
        with pytest.raises(TypeError, match=rf"^{name}: \w+ is not given"):
            kernel(*passed)


def test_kernels_check_the_members_of_structs():
    """Of a struct among the parameters each member is read, and held to its type, as a parameter of its own."""
    kernel, last = dispatch.extension().block_backward, "attn_scale"
    tensor = torch.zeros(4, 4)
    given = {last: "1"}  # refused, so that no kernel runs

    def said(**changed: object) -> str:
        with pytest.raises(TypeError, match="^block_backward: ") as error:
            kernel(changed, given)
        return str(error.value).removeprefix("block_backward: ")

    while not (why := said()).startswith(last):
        name = why.partition(" ")[0]
        assert name not in given or given[name] is None, why
        given[name] = None if name not in given else 1  # None does for tensors
    assert why == "attn_scale is a str; it must be a float"
    own = {"dm_out", "dh_out", "segments", "dm", "dh", "scratch"}
    sizes = {"B", "T", "C", "H", "F", "m_dtype", "product_dtype", "sgemm", "threads"}
    options = {"transposed", "erf", "scale", "attn_threshold", "attn_scale"}
    dropout = {"dropout_key", "dropout_threshold", "dropout_scale", "dropout_site"}
    weights = {f"{name}_weight" for name in ("ln_1", "c_attn", "attn_proj", "ln_2", "c_fc", "mlp_proj")}
    gradients = {f"d{name}" for name in weights} | {f"d{name}".replace("weight", "bias") for name in weights}
    kept = {"h_mid", "h_out", "kept", "statistics"}
    assert given.keys() == own | sizes | options | dropout | weights | {"ln_2_bias"} | gradients | kept
    assert said(c_attn_weight=tensor.t(), dc_attn_weight=tensor.t()) == why, "of any strides"
    for name, value, wrong in (
        ("dc_attn_bias", tensor.t(), "must be a contiguous tensor"),
        ("dln_1_weight", tensor.t(), "must be a contiguous tensor"),
        ("c_attn_weight", tensor.to("meta"), "must be on the CPU"),
        ("dc_attn_weight", tensor.to("meta"), "must be on the CPU"),
        ("statistics", tensor.bfloat16(), "must be of dtype f32"),
        ("segments", tensor, "must be of dtype i32"),
        ("scratch", tensor, "must be of dtype u8"),
        ("dropout_key", tensor, "must be of dtype i64"),
        ("dropout_scale", "1", "is a str; it must be a float"),
        ("dropout_site", 1.0, "is a float; it must be an int"),
        ("m_dtype", torch.complex64, "is of a dtype that no kernel takes"),
        ("erf", None, "is a NoneType; it must be an int"),
    ):
        assert said(**{name: value}) == f"{name} {wrong}"


@needs_nvrtc
@pytest.mark.parametrize("arch", [100])
def test_nvrtc_compiles_with_no_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path / "cache"))
    image = cuda.compiled(arch)
    assert image.startswith(b"\x7fELF")
    kept, _ = sorted((tmp_path / "cache" / "code").iterdir())  # and its SHA-256
    assert kept.read_bytes() == image
    assert re.fullmatch(rf"embedding-[0-9a-f]{{16}}-sm_{arch}-nvrtc_\d+\.\d+\.bin", kept.name)
    monkeypatch.setattr(cuda.Nvrtc, "compile", None)
    assert cuda.compiled(arch) == image, "the second time it comes from the cache"
    if tool := _cuobjdump():
        usage = _run(tool, "-res-usage", kept).stdout
        assert usage.count("Function embedding_") == 34
        assert set(re.findall(r"STACK:(\d+)", usage)) == set(re.findall(r"LOCAL:(\d+)", usage)) == {"0"}


@needs_nvrtc
def test_nvrtc_of_a_newer_gpu_and_of_a_broken_source(tmp_path, monkeypatch):
    nvrtc = cuda.Nvrtc(cuda.find_nvrtc())
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "embedding.cu").write_text('extern "C" __global__ void f(int* p) { *p = 1; }')
    newest = nvrtc.architectures()[-1]
    assert f".target sm_{newest}".encode() in nvrtc.compile(folder, newest + 1)
    with pytest.raises(RuntimeError, match="compute capability 1.0"):
        nvrtc.compile(folder, 10)
    (folder / "embedding.cu").write_text("void f( {")
    with pytest.raises(RuntimeError, match=r"nvrtcCompileProgram: NVRTC_ERROR_COMPILATION embedding.cu\(1\): error"):
        nvrtc.compile(folder, newest)


def test_driver_errors_are_exceptions():
    if not Path("/dev/nvidiactl").exists():
        with pytest.raises(RuntimeError, match=r"libcuda\.so\.1|cuInit|cuDevicePrimaryCtxRetain"):
            dispatch.extension().cuda_load(0, b"")
    with pytest.raises(RuntimeError, match=r"libcuda\.so\.1|no CUDA device|cuDevicePrimaryCtxRetain|cuInit"):
        dispatch.extension().cuda_launch(63, 0, (1, 1, 1), (1, 1, 1), 0, b"")


# ---- what is shipped, and the source tree ----


def test_sdist_has_all_sources(tmp_path):
    setuptools = pytest.importorskip("setuptools", reason="setuptools is a build dependency, not installed here")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is here; the build uses 77 or newer, in its own environment")
    done = _run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    expected = [*CSRC.iterdir(), *ROOT.glob("kernels/*.py"), *ROOT.glob("gpt2_fast/**/*.py"), ROOT / "setup.py"]
    assert not {str(path.relative_to(ROOT)) for path in expected} - names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".fatbin"))]


def test_source_tree_beside_an_installed_package(tmp_path):
    """After `pip install .`, python started in the repository root: the folder here shadows the installed one."""
    tree, installed = tmp_path / "tree", tmp_path / "site" / "gpt2_fast"
    shutil.copytree(ROOT / "gpt2_fast", tree / "gpt2_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels", tree / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    installed.mkdir(parents=True)
    extension = Path(dispatch.extension().__file__)
    shutil.copy(extension, installed)
    code = f"""
import sys
sys.path[:] = [{str(tree)!r}, {str(installed.parent)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]
import gpt2_fast
from gpt2_fast import sources
path = [p for p in gpt2_fast.__path__[:1]]
sources.extend_path(path)
gpt2_fast.__path__[:] = path
import importlib.util
import torch
for name in ("gpt2_fast.kernels", "gpt2_fast._C"):
    print(importlib.util.find_spec(name).origin)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(tree / "kernels" / "__init__.py"), str(installed / extension.name)]
