"""decode_step: the C++ step and its reference against float64, in every weight format."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from numerics import assert_as_exact, assert_same_bits

from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.generate.decoders import parameters_of
from gpt2_fast.ops.decode_step import cost, samples
from gpt2_fast.ops.packed_model import CHUNK, LayerParameters, PackedCache, PackedModel
from gpt2_fast.ops.packed_weights import HugePages, PackedMatrix
from gpt2_fast.ops.runtime import cpp

WEIGHTS = ["float32", "bfloat16", "int8", "int4"]


def _model(n_positions: int = 64, **sizes) -> GPT2LMHeadModel:
    """Weights large enough for attention to choose, but not one key alone; biases and LayerNorms are not trivial."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=n_positions, initializer_range=0.1, **sizes), impl="reference")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not model.config.scale_attn_weights and "c_attn" in name:
                p *= 0.3
            if name.endswith("bias") or "ln_" in name:
                p += 0.1 * torch.randn_like(p)
    return model.eval()


def _run(packed: PackedModel, tokens, starts=None, prompt: int | None = None) -> torch.Tensor:
    """Logits [steps, B, V] of a prefill of `prompt` tokens, by default two thirds, and of the steps after it."""
    B, T = tokens.shape
    prompt = prompt or 2 * T // 3
    cache = PackedCache(packed, B, T, starts)
    logits = [packed.prefill(tokens[:, :prompt], cache)]
    logits += [packed.step(tokens[:, t], cache) for t in range(prompt, T)]
    assert cache.length == T
    return torch.stack(logits)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_instruction_set(decode_isa, threads, weights):
    # Beside the sums' own rounding, keys and values may round to a neighbour; whole numbers have 13 to 15 bits.
    threads(1)
    whole = weights in ("int8", "int4") and decode_isa != "baseline"
    allowed = torch.float32 if weights == "float32" else torch.bfloat16 if whole else torch.float16
    for sizes, tokens, starts in samples():
        if weights == "int4" and sizes["n_embd"] % 32:
            continue
        model = _model(**sizes)
        actual = _run(PackedModel(parameters_of(model), weights, impl="cpp"), tokens, starts)
        eager = _run(PackedModel(parameters_of(model), weights, impl="reference"), tokens, starts)
        truth = _run(PackedModel(parameters_of(model), weights, impl="reference", dtype=torch.float64), tokens, starts)
        assert_as_exact(actual, eager, truth, f"{weights} {sizes}", allowed)


@torch.no_grad()
def test_float32_is_the_model(threads):
    threads(1)
    for sizes, tokens, starts in samples():
        model = _model(**sizes)
        index = torch.arange(tokens.shape[1])
        mask, positions = index >= starts.unsqueeze(1), (index - starts.unsqueeze(1)).clamp(min=0)
        actual = _run(PackedModel(parameters_of(model), "float32", impl="cpp"), tokens, starts)
        eager, truth = (
            m(tokens, attention_mask=mask.long(), position_ids=positions).logits.transpose(0, 1)[-len(actual) :]
            for m in (model, copy.deepcopy(model).double())
        )
        assert_as_exact(actual, eager, truth, str(sizes))


def test_a_layer_without_biases_and_one_that_stores_out_in():
    model = _model(n_layer=1, n_embd=48, n_head=3, vocab_size=50)
    tokens = torch.randint(50, (2, 9))
    for module in model.modules():
        if hasattr(module, "weight_io") or isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.zeros_(module.bias)
    expected = _run(PackedModel(parameters_of(model), "float32"), tokens)
    for module in model.modules():
        if hasattr(module, "weight_io") or isinstance(module, torch.nn.LayerNorm):
            module.bias = None
    for impl in ("cpp", "reference"):
        torch.testing.assert_close(_run(PackedModel(parameters_of(model), "float32", impl=impl), tokens), expected)


def test_logits_go_where_the_caller_says():
    packed = PackedModel(parameters_of(_model(n_layer=1, n_embd=48, n_head=3, vocab_size=50)), "float32")
    caches = [PackedCache(packed, 2, 9) for _ in range(2)]
    for cache in caches:
        packed.prefill(torch.arange(6).view(2, 3), cache)
    held, token = torch.empty(2, 50), torch.tensor([7, 8, 9, 9])[::2]
    assert packed.step(token, caches[0], held) is held
    assert torch.equal(held, packed.step(token.contiguous(), caches[1]))
    for wrong in (
        torch.empty(1, 50),
        torch.empty(2, 51),
        torch.empty(2, 50, dtype=torch.bfloat16),
        held.clone().requires_grad_(),
    ):
        with pytest.raises(ValueError, match=r"^decode_step: out is .*; it must be float32 \(2, 50\)"):
            packed.step(token, caches[0], wrong)
    with pytest.raises(TypeError, match="decode_step: logits must be a contiguous tensor"):
        packed.step(token, caches[0], torch.empty(50, 2).t())
    assert caches[0].length == 4  # what was refused was not added
    weight = torch.ones(2, 50, requires_grad=True)
    kept = (weight * held).sum()
    packed.step(token, caches[0], held)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_same_bits_on_any_number_of_threads(decode_isa, threads, weights):
    packed, tokens = (
        PackedModel(parameters_of(_model(n_layer=2, n_embd=96, n_head=3, vocab_size=301)), weights),
        torch.randint(301, (3, 9)),
    )
    runs = []
    for n in (1, 2, 3):
        threads(n)
        runs.append(_run(packed, tokens))
    for run in runs[1:]:
        assert_same_bits(runs[:1], [run], weights)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_same_bits_alone_in_a_batch_and_however_the_prompt_is_cut(decode_isa, weights):
    """Rows of a padded batch whose prefill takes more than one chunk, and the same tokens one by one."""
    B, T, start = CHUNK // 24 + 2, 25, 7
    packed, tokens = (
        PackedModel(parameters_of(_model(n_layer=2, n_embd=96, n_head=3, vocab_size=301)), weights),
        torch.randint(301, (B, T)),
    )
    assert B * (T - 1) - start > CHUNK
    starts = torch.zeros(B, dtype=torch.int32)
    starts[1] = start
    batch = _run(packed, tokens, starts, T - 1)
    for row in (1, CHUNK // 24, B - 1):  # the padded one, the one that two chunks share, the last
        alone = _run(packed, tokens[row : row + 1, starts[row] :], prompt=1)
        assert_same_bits([batch[:, row]], [alone[-2:, 0]], f"{weights}, row {row}")


def test_memory_on_huge_pages(monkeypatch):
    """Zeros that share no element, aligned, across parts, and alive as long as one of them is."""
    monkeypatch.setattr(HugePages, "PART", 4096)
    memory = HugePages()
    shapes = [((3, 5), torch.float32), ((7,), torch.bfloat16), ((1 << 21, 2), torch.uint8), ((2, 2), torch.float32)]
    taken = [memory.zeros(shape, dtype) for shape, dtype in shapes]
    del memory
    for i, (t, (shape, dtype)) in enumerate(zip(taken, shapes, strict=True)):
        assert (tuple(t.shape), t.dtype, t.data_ptr() % 64) == (shape, dtype, 0)
        assert not t.any()
        t.fill_(i + 1)
    for i, t in enumerate(taken):
        assert (t == i + 1).all()


def test_int8_rounds_each_row_by_its_own_scale():
    matrix = torch.randn(21, 10) * torch.logspace(-3, 3, 21).unsqueeze(1)
    matrix[4] = 0
    meant = PackedMatrix(matrix, "int8", memory=HugePages()).dequantised(torch.float64)
    step = matrix.abs().amax(1, keepdim=True).double() / 127
    assert ((meant - matrix).abs() <= 0.5001 * step).all()
    assert (meant.abs().amax(1) - matrix.abs().amax(1)).abs().max() <= 1e-6 * matrix.abs().max()


def test_sizes():
    model = _model(n_layer=1, n_embd=64, n_head=2, vocab_size=320)
    packed = {weights: PackedModel(parameters_of(model), weights) for weights in WEIGHTS}
    assert packed["float32"].nbytes == 4 * model.num_parameters()
    matrices = 320 * 64 + 64 * (3 * 64 + 64 + 8 * 64)
    assert packed["float32"].nbytes - packed["bfloat16"].nbytes == 2 * matrices
    assert packed["float32"].nbytes - packed["int8"].nbytes == 3 * matrices - 4 * (320 + 3 * 64 + 64 + 4 * 64 + 64)
    weight_bytes = sum(p.nbytes for name, p in model.named_parameters() if "ln_" not in name and "wpe" not in name)
    step = cost(packed["float32"], 3, 10)["forward"]
    assert step["bytes"] == weight_bytes + 3 * 10 * 2 * 64 * 4
    assert step["flops"] == 2 * 3 * (64 * (3 * 64 + 64 + 8 * 64) + 320 * 64 + 2 * 64 * 10)


@pytest.mark.parametrize("field", ["wte", "wpe", "lm_head", "ln_f", *LayerParameters._fields[:-1]])
def test_a_tensor_of_another_size_than_the_configs_is_refused(field):
    """C++ would read beyond it."""
    parameters = parameters_of(_model(n_layer=2, n_embd=16, n_head=2, vocab_size=50))
    holder = parameters.layers[1] if field in LayerParameters._fields else parameters
    held = getattr(holder, field)
    short = (held[0][:-1], held[1]) if isinstance(held, tuple) else held[:-1]
    first, second = parameters.layers
    if holder is parameters:
        wrong = parameters._replace(**{field: short})
    else:
        wrong = parameters._replace(layers=[first, second._replace(**{field: short})])
    with pytest.raises(ValueError, match=r"decode_step: \S+ is \(\d+,.*\) and the config says \(\d+,.*\); change the"):
        PackedModel(wrong, "float32")
    wrong = parameters._replace(layers=[first._replace(c_fc=(first.c_fc[0], torch.ones(3))), second])
    with pytest.raises(ValueError, match=r"decode_step: h.0.mlp.c_fc's bias is \(3,\) and the config says \(64,\)"):
        PackedModel(wrong, "int8")


def test_what_is_refused():
    model = _model(n_layer=1, n_embd=16, n_head=2, vocab_size=50)
    with pytest.raises(ValueError, match="weights is 'int3'; choose float32, bfloat16, int8, int4"):
        PackedModel(parameters_of(model), "int3")
    with pytest.raises(ValueError, match="model is on meta; move it to the CPU"):
        PackedModel(parameters_of(copy.deepcopy(model).to("meta")), "int8")
    packed = PackedModel(parameters_of(model), "int8")
    with pytest.raises(ValueError, match="cache is for 65 positions and the model has 64"):
        PackedCache(packed, 1, 65)
    with pytest.raises(ValueError, match="batch_size is 0"):
        PackedCache(packed, 0, 4)
    with pytest.raises(ValueError, match=r"starts is torch.int64 \(2,\) on cpu; it must be int32 \[2\]"):
        PackedCache(packed, 2, 4, torch.tensor([0, 1]))
    cache = PackedCache(packed, 2, 3, torch.tensor([0, 1], dtype=torch.int32))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="starts at 1 and has no token among 1 positions"):
        packed.prefill(tokens[:, :1], cache)
    with pytest.raises(IndexError, match="token 50 is outside the vocabulary of 50"):
        packed.prefill(tokens + 50, cache)
    with pytest.raises(ValueError, match=r"tokens is torch.int32 \(2, 3\) on cpu; it must be int64 on the CPU, 2 rows"):
        packed.prefill(tokens.int(), cache)
    packed.prefill(tokens, cache)
    with pytest.raises(ValueError, match="cache already holds 3 positions"):
        packed.prefill(tokens, cache)
    with pytest.raises(ValueError, match="cache is for 3 positions and 4 are needed"):
        packed.step(tokens[:, 0], cache)
    with pytest.raises(ValueError, match=r"a step takes one token a row, \[B\]"):
        packed.step(tokens, cache)
    assert cache.length == 3


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_a_cache_of_another_model_is_refused(impl):
    """A smaller one's memory would be written beyond its end."""
    small = PackedModel(parameters_of(_model(n_layer=1, n_embd=16, n_head=2, vocab_size=50)), "float32", impl=impl)
    large = PackedModel(parameters_of(_model(n_layer=3, n_embd=96, n_head=3, vocab_size=50)), "float32", impl=impl)
    cache = PackedCache(small, 2, 8)
    for packed in (large, PackedModel(parameters_of(_model(n_layer=1, n_embd=16, n_head=2, vocab_size=50)), "int8")):
        with pytest.raises(ValueError, match="the cache was made for another PackedModel"):
            packed.prefill(torch.zeros(2, 3, dtype=torch.int64), cache)
    assert cache.length == 0


def test_tensors_of_any_strides_are_packed():
    """The same bits whatever the strides, and from a head that is no longer the table itself."""
    model, tokens = _model(n_layer=1, n_embd=48, n_head=3, vocab_size=50), torch.randint(50, (2, 9))
    parameters = parameters_of(model)
    expected = _run(PackedModel(parameters, "int8"), tokens)
    strided = lambda t: torch.stack([t, t + 1.0], -1)[..., 0]
    *affines, scale = parameters.layers[0]
    layer = type(parameters.layers[0])(*((strided(w), strided(b)) for w, b in affines), scale)
    tables = {"wte": strided(parameters.wte), "wpe": strided(parameters.wpe), "lm_head": strided(parameters.wte)}
    ln_f = tuple(map(strided, parameters.ln_f))
    again = parameters._replace(**tables, layers=[layer], ln_f=ln_f)
    assert_same_bits([_run(PackedModel(again, "int8"), tokens)], [expected])


def test_a_struct_takes_what_its_members_are():
    """Names and types are csrc's own, so neither an order nor a dtype can be mistaken."""
    whole = {"panels": torch.zeros(4), "scale": None, "bias": torch.ones(3)}
    assert cpp.struct("DecodeMatrix", **whole) == [whole["panels"].data_ptr(), 0, whole["bias"].data_ptr()]
    for wrong, message in [
        ({**whole, "bias": torch.ones(3, dtype=torch.float64)}, "DecodeMatrix: bias must be .* of torch.float32"),
        ({**whole, "bias": torch.ones(6)[::2]}, "DecodeMatrix: bias must be contiguous"),
        ({"panels": None, "scale": None}, "DecodeMatrix: bias is missing"),
        ({**whole, "zero": None}, "DecodeMatrix: zero is missing or no member"),
    ]:
        with pytest.raises(TypeError, match=message):
            cpp.struct("DecodeMatrix", **wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_int8_row_that_is_not_finite_stays_so(bad):
    """Rounded to whole numbers it would be weights that nobody had."""
    matrix = torch.randn(18, 24)
    matrix[3, 5] = bad
    matrix[7] = 0.0
    meant = PackedMatrix(matrix, "int8", memory=HugePages()).dequantised(torch.float64)
    assert not meant[3].isfinite().any()
    others = [n for n in range(18) if n != 3]
    assert torch.equal(meant[7], torch.zeros(24, dtype=torch.float64))
    torch.testing.assert_close(meant[others].float(), matrix[others], rtol=0, atol=matrix[others].abs().max() / 253)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_number_that_is_none_reaches_the_logits(decode_isa, weights, bad):
    """Of one output among many, whose row is rounded to whole numbers for the next product of int8 and int4."""
    for name in ("mlp.c_fc.weight", "mlp.c_fc.bias", "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_proj.weight"):
        model = _model(n_layer=2, n_embd=64, n_head=4, vocab_size=301)
        with torch.no_grad():
            parameter = model.transformer.h[0].get_parameter(name)
            parameter.view(-1)[5 - (parameter.shape[-1] == 192) * 64] = bad  # of c_attn a value's
        packed = PackedModel(parameters_of(model), weights, impl="cpp")
        cache = PackedCache(packed, 1, 8)
        for logits in (packed.prefill(torch.tensor([[1, 2, 3]]), cache), packed.step(torch.tensor([4]), cache)):
            assert not logits.isfinite().all(), name


@pytest.mark.parametrize("n_inner", [1024, 1056, 3072, 6400])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_largest_sums_are_no_others(decode_isa, weights, n_inner):
    """Every input of mlp.c_proj has its row's largest magnitude and every weight its output's, with the same signs."""
    model = _model(n_layer=1, n_embd=32, n_head=2, n_inner=n_inner, vocab_size=64)
    mlp = model.transformer.h[0].mlp
    with torch.no_grad():
        mlp.c_fc.weight.zero_()
        mlp.c_fc.bias.fill_(3)
        mlp.c_proj.weight.copy_(torch.tensor([1e-3, -1e-3] * 16))
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6]])
    actual = _run(PackedModel(parameters_of(model), weights, impl="cpp"), tokens)
    truth = _run(PackedModel(parameters_of(model), weights, impl="reference", dtype=torch.float64), tokens)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-2, atol=1e-2 * truth.abs().max().item())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_row_of_tiny_numbers_is_one_of_zeros(decode_isa, weights):
    """What divides it would be infinite: whole numbers of that overflow, which python -m tests.sanitize reports."""
    model = _model(n_layer=1, n_embd=32, n_head=2, n_inner=160, vocab_size=64)
    mlp, tokens, logits = model.transformer.h[0].mlp, torch.tensor([[1, 2, 3], [4, 5, 6]]), []
    with torch.no_grad():
        mlp.c_fc.weight.zero_()
        mlp.c_fc.bias.zero_()
        mlp.c_fc.bias[:3] = 1e-36 if decode_isa != "baseline" else 0  # activations are floats there
        for factor in (1e34, 0):
            mlp.c_proj.weight.mul_(factor)
            logits.append(_run(PackedModel(parameters_of(model), weights, impl="cpp"), tokens))
    assert torch.equal(*logits)


@pytest.mark.parametrize("n_inner", [1024, 3072, 6400])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rows_are_rounded_to_as_many_steps_as_fit(decode_isa, weights, n_inner):
    """Logits without attention, whose keys and values are bfloat16. Were numbers cut, the error would be twice that."""
    torch.manual_seed(1)
    model = _model(n_layer=1, n_embd=64, n_head=2, n_inner=n_inner, vocab_size=301)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
    tokens = torch.randint(301, (4, 6))
    actual = _run(PackedModel(parameters_of(model), weights, impl="cpp"), tokens).double()
    truth = _run(PackedModel(parameters_of(model), weights, impl="reference", dtype=torch.float64), tokens)
    steps = min(16256, 2**24 / n_inner) if weights == "int8" and decode_isa in ("avx2", "avx512") else 16256
    # Of the other products' rows it is 7e-5, of mlp.c_proj's 1e-4 where it has as many steps as those.
    allowed = 1.5 * math.hypot(7e-5, 1e-4 * 16256 / steps)
    assert (actual - truth).norm() < allowed * truth.norm()
