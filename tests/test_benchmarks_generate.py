"""`python -m benchmarks generate` runs and its numbers parse; no test asserts a speed."""

from __future__ import annotations

import json

import pytest

from benchmarks import generate


def test_smoke_size(tmp_path, capsys):
    programs = "transformers:float32,gpt2_fast:float32"
    assert generate.main(["--smoke", "--device", "cpu", "--programs", programs, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    rows = {row["program"]: row for row in record["rows"]}
    assert set(rows) == {"transformers float32", "gpt2_fast float32"}
    for row in rows.values():
        for measured in (row["prefill"], row["decode"]["1"], row["decode"]["3"]):
            assert 0 < measured["p20"] <= measured["median"] <= measured["p80"]
            assert measured["ratio"] > 0
        assert row["compared_tokens"] == 1 * 8 + 3 * 8 + 1
        assert row["peak_bytes"] > 1e7
    assert rows["transformers float32"]["decode"]["1"]["ratio"] == 1.0
    assert rows["gpt2_fast float32"]["same_tokens"] == 33
    assert record["command"] == f"python -m benchmarks generate --smoke --device cpu --programs {programs}"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "33 of 33" in capsys.readouterr().out
    generate.main(["--show", str(path)])
    assert capsys.readouterr().out.splitlines()[2].startswith("| transformers float32 | ")


def test_tokens_that_differ_are_counted_and_named():
    """The comparison that withholds a speed: up to each row's first difference, over the length both have."""
    reference = {"1": [[1, 2, 3, 4, 5]], "8": [[5, 6, 7], [8, 9, 10]]}
    other = {"1": [[1, 2, 3, 4, 0]], "8": [[5, 6], [8, 0, 10]]}
    assert list(generate._same(reference, reference).values()) == [11, 11, 3, 3]
    assert list(generate._same(other, reference).values()) == [7, 10, 2, 3]
    measured = {"rounds": [1.0]}
    make = lambda name, tokens: {
        "program": name, "tokens": tokens, "decode": {"1": dict(measured)}, "prefill": dict(measured)
    }  # fmt: skip
    wrong = {"1": [[1, 2, 3, 0, 5]], "8": [[5, 6, 7], [0, 9, 10]]}
    rows = [
        make("transformers float32", reference),
        make("a float32", other),
        make("b int8", wrong),
        make("c int4", wrong),
    ]
    generate._compare(rows)
    assert [row["wrong"] for row in rows] == [False, False, True, False]
    rows = [make("a float32", reference), make("b int8", other), make("c int4", wrong)]
    generate._compare(rows)  # without transformers: never beside 4 bits
    assert {row["base"] for row in rows} == {"b int8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--programs", "llama"), "--programs has 'llama'; choose of gpt2_fast, transformers"),
        (("--device", "cpu", "--programs", "transformers:int8"), "on cpu transformers has float32, bfloat16"),
        (("--show", "no-such.json"), "no-such.json is no record of a benchmark"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        generate.main(arguments)
    assert "\n" not in str(error.value)
