"""The command: runs the checkout's tests once for each way, and prints what differs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
WAYS = ("plain", "patched", "classes")
FILES = {
    "gpt2": ("tests/models/gpt2/test_modeling_gpt2.py", None),
    "encoder_decoder": ("tests/models/encoder_decoder/test_modeling_encoder_decoder.py", "GPT2"),
    "vision_encoder_decoder": ("tests/models/vision_encoder_decoder/test_modeling_vision_encoder_decoder.py", "GPT2"),
}


def run(suite: Path, way: str, file: str, only: str | None, workers: int, helpers: Path | None, log: Path) -> dict:
    """{test: outcome} of one file of the checkout, an outcome being passed, failed or skipped."""
    with tempfile.TemporaryDirectory() as folder:
        results, ini = Path(folder) / "results.xml", Path(folder) / "pytest.ini"
        ini.write_text("[pytest]\n")
        # The checkout's own conftest.py is of its continuous integration; confcutdir leaves it out.
        command = [sys.executable, "-m", "pytest", file, "-q", "-n", str(workers), "-p", "no:cacheprovider"]
        command += ["-c", str(ini), "--rootdir", str(suite), "--confcutdir", str(suite / "tests")]
        command += ["-p", "exchange", "--gpt2-fast", way, "--checkout", str(suite), "--junitxml", str(results)]
        command += ["-k", only] if only else []
        command += ["--helpers", str(helpers)] if helpers else []
        paths = [str(HERE), str(HERE.parents[1]), str(suite), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in paths if p), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with log.open("a") as out:
            subprocess.run(command, cwd=suite, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False)
        if not results.exists():
            raise SystemExit(f"{file} did not run ({way}); {log} says why")
        return _outcomes(ElementTree.parse(results).getroot())


def _outcomes(root: ElementTree.Element) -> dict[str, str]:
    """By test. One with subtests is reported several times: a failure counts before a pass, a pass before a skip."""
    worst, found = ("skipped", "passed", "failed"), {}
    for case in root.iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        test = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found[test] = max(outcome, found.get(test, "skipped"), key=worst.index)
    return found


def table(name: str, results: dict[str, dict]) -> list[str]:
    """One file's lines: counts a way, then each test whose outcome is not that of every other way."""
    lines = [f"| {name} | passed | failed | skipped |", "| --- | --- | --- | --- |"]
    for way, outcomes in results.items():
        counts = Counter(outcomes.values())
        lines.append(f"| {way} | {counts['passed']} | {counts['failed']} | {counts['skipped']} |")
    tests = sorted(set().union(*results.values()))
    ways = list(results)
    differing = [t for t in tests if len({results[way].get(t) for way in ways}) > 1]
    lines += [f"- {t}: " + ", ".join(f"{way} {results[way].get(t)}" for way in ways) for t in differing]
    everywhere = [t for t in tests if {results[way].get(t) for way in ways} == {"failed"}]
    return lines + [f"- {t}: failed in each" for t in everywhere]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.transformers_suite", description=__doc__)
    parser.add_argument("--suite", type=Path, required=True, help="a checkout of transformers")
    parser.add_argument("--with", dest="ways", action="append", choices=WAYS, help="default: each of them")
    parser.add_argument("--files", action="append", choices=FILES, help="default: each of them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", help="tests, as pytest's -k")
    parser.add_argument("--helpers", type=Path, help="a testing_utils.py, in the place of the installed one")
    parser.add_argument("--log", type=Path, default=Path("transformers_suite.log"), help="pytest's own output")
    options = parser.parse_args()
    suite, helpers = options.suite.resolve(), options.helpers and options.helpers.resolve()
    if not (suite / "tests/models/gpt2").is_dir():
        parser.error(f"--suite: {suite} has no tests/models/gpt2; give a checkout of transformers")
    options.log.unlink(missing_ok=True)
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}; tests of {suite}")
    differs = False
    for name in options.files or FILES:
        file, only = FILES[name]
        only = " and ".join(f"({k})" for k in (only, options.only) if k) or None
        results = {
            way: run(suite, way, file, only, options.workers, helpers, options.log.resolve())
            for way in options.ways or WAYS
        }
        print("", *table(name, results), sep="\n", flush=True)
        differs |= len({tuple(sorted(outcomes.items())) for outcomes in results.values()}) > 1
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
