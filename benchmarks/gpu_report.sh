#!/usr/bin/env bash
# The first ten minutes with any GPU: environment, build, checks, the configurations that this card wants, whole steps
# beside all peers, then tests, a profile and single ops, and all of it in one archive.
#
#   benchmarks/gpu_report.sh [STAGE ...]      all stages, or those named, again
#
# A stage that is done leaves STAGE.done in the folder and is not run again; one that fails does not stop the next.
# Nothing is downloaded: it works with the Python packages that are there, and says first what is missing.
# Without a GPU the same stages run on the CPU in a smoke size, which is how this script is tested.
#
# Environment: PYTHON (.venv's, else python3), OUT (out/gpu-report), LIMIT seconds a stage (540), TUNE seconds for
# configurations (240), TESTS (tests),
# JOBS files of tests at a time (1; 8 with a GPU).
# shellcheck disable=SC2329  # stages are called by name
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=$PWD/.venv/bin/python
fi
OUT=$(realpath -m "${OUT:-out/gpu-report}")
export PYTHON OUT LIMIT=${LIMIT:-540} TUNE=${TUNE:-240} TESTS=${TESTS:-tests}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
STAGES=(environment build check tune train products tests train-float32 profile ops generate sanitizer)

gpu() { [[ ${GPU:=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))' 2>/dev/null)} == 1 ]]; }
has() { "$PYTHON" -c "import $1" 2>/dev/null; }
skip() { echo "skipped: $*"; exit 75; } # 75: the stage cannot run here, which is no failure

stage_environment() {
  date -u
  git log -1 --format='commit %h %s' 2>/dev/null
  uname -a
  nvidia-smi 2>/dev/null || echo "no nvidia-smi"
  nvcc --version 2>/dev/null | tail -2 || true
  "${CXX:-g++}" --version 2>/dev/null | head -1 || echo "MISSING a C++ compiler: build"
  local module
  for module in torch numpy safetensors tiktoken huggingface_hub matplotlib tqdm triton transformers pytest \
    pytest_benchmark pytest_timeout ninja liger_kernel; do
    "$PYTHON" -c "
import importlib, importlib.metadata as m
importlib.import_module('$module')
names = m.packages_distributions().get('$module')
print('$module', m.version(names[0]) if names else '')" 2>/dev/null || echo "MISSING $module: $(needed_by "$module")"
  done
  "$PYTHON" -c "import torch; print('GPU', torch.cuda.get_device_name() if torch.cuda.is_available() else 'none')"
}

needed_by() {
  case $1 in
    torch | numpy) echo "everything" ;;
    ninja) echo "build; a ninja on PATH is taken instead" ;;
    triton) echo "the GPU kernels" ;;
    pytest) echo "tests, ops, sanitizer" ;;
    pytest_benchmark) echo "ops" ;;
    pytest_timeout) echo "a limit on each test" ;;
    transformers) echo "its rows in the tables, and the tests against it" ;;
    matplotlib) echo "charts" ;;
    liger_kernel) echo "its row in the table" ;;
    *) echo "import of gpt2_fast, or a part of it" ;;
  esac
}

# setup.py asks the package ninja for its program: where it is not, PATH may have it.
stage_build() {
  local stand_ins=$OUT/stand-ins
  if ! has ninja; then
    mkdir -p "$stand_ins/ninja"
    command -v ninja > /dev/null || { echo "no ninja, neither as a package nor on PATH"; return 1; }
    echo "BIN_DIR = '$(dirname "$(command -v ninja)")'" > "$stand_ins/ninja/__init__.py"
    export PYTHONPATH=$stand_ins:$PYTHONPATH
  fi
  GPT2_FAST_REQUIRE_EXTENSION=1 "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -c "
import torch
from gpt2_fast.ops.runtime import dispatch
extension = dispatch.extension()
print('built', extension.__file__, extension.COMPILER)"
}

# What runs where and why; then a tiny model's losses beside the reference's, before minutes go into anything else.
stage_check() {
  "$PYTHON" -m gpt2_fast.cli doctor || return 1
  "$PYTHON" -m benchmarks train --model smoke --batch-size 2 --context 32 --rounds 1 --warmup 2 --steps 3 \
    --programs gpt2_fast,gpt2_fast-graph,reference --dtype float32,bfloat16 --out "$OUT/check"
}

# Each candidate is held to float64, then timed; the winners become rows of kernels/configs/, which whole steps then run
# with. What was timed is kept in tune.json: cut off, or named again, the stage goes on with the rows that are left.
stage_tune() {
  gpu || skip "configurations are timed on a GPU"
  has triton || skip "triton is not installed"
  "$PYTHON" -m benchmarks tune --write --record "$OUT/tune.json" --seconds "$TUNE" --candidates "${CANDIDATES:-12}" || return 1
  rm -rf "$OUT/configs" && cp -r kernels/configs "$OUT/configs"
}

# By file, so that a run that is cut off goes on where it was; one process each, so that a crash stays its own.
stage_tests() {
  has pytest || skip "pytest is not installed"
  mkdir -p "$OUT/tests"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
  find "$TESTS" -name 'test_*.py' | sort | xargs -P "$JOBS" -I{} bash "$0" --run-tests {}
  grep -h '^FAILED\|^ERROR' "$OUT"/tests/*.log
  local log failed=0
  for log in "$OUT"/tests/*.log; do # a crash, which names no test, leaves no .done either
    [[ -e ${log%.log}.done ]] || failed=$((failed + 1))
  done
  echo "files of tests that failed: $failed"
  return $((failed > 0))
}

run_tests() { # one file
  local name
  name=$OUT/tests/$(basename "$1" .py)
  [[ -e $name.done ]] && return
  "$PYTHON" -m pytest -p no:cacheprovider "$1" > "$name.log" 2>&1
  case $? in
    0 | 5) touch "$name.done" ;;
  esac
  echo "$1: $(tail -1 "$name.log")"
}

whole_steps() {
  if gpu; then
    "$PYTHON" -m benchmarks train --rounds 2 --out "$OUT" "$@"
  else
    "$PYTHON" -m benchmarks train --model smoke --batch-size 2 --context 32 --rounds 1 --warmup 1 --steps 2 \
      --programs gpt2_fast,nanogpt --dtype "$2" --out "$OUT"
  fi
}
stage_train() { whole_steps --dtype bfloat16 --batch-size 32 --context 1024; }
stage_train-float32() { whole_steps --dtype float32 --batch-size 8 --context 1024; }

# Where cuBLASLt's products add up to less than cuBLAS's, TORCH_BLAS_PREFER_CUBLASLT=1 is worth a run of whole steps.
stage_products() {
  local smoke=(--model smoke --batch-size 2 --context 32 --rounds 1)
  gpu && smoke=()
  "$PYTHON" -m benchmarks products --out "$OUT" "${smoke[@]}"
}

stage_profile() {
  if gpu; then
    "$PYTHON" -m benchmarks profile_step --out "$OUT"
  else
    "$PYTHON" -m benchmarks profile_step --model smoke --batch-size 2 --context 32 --steps 1 --out "$OUT"
  fi
}

stage_ops() {
  has pytest || skip "pytest is not installed"
  has pytest_benchmark || skip "pytest-benchmark is not installed"
  local smoke=(--smoke)
  gpu && smoke=()
  "$PYTHON" -m pytest -p no:cacheprovider benchmarks --results "$OUT" "${smoke[@]}"
}

stage_generate() {
  [[ -e benchmarks/generate.py ]] || skip "there is no benchmarks/generate.py"
  local smoke=(--smoke)
  gpu && smoke=()
  "$PYTHON" -m benchmarks generate --out "$OUT" "${smoke[@]}"
}

find_sanitizer() {
  local candidate
  for candidate in "$(command -v compute-sanitizer)" "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer \
    /usr/local/cuda*/bin/compute-sanitizer; do
    [[ -x $candidate ]] && echo "$candidate" && return
  done
}

# Out-of-bounds and misaligned accesses of the CUDA embedding; without torch's caching allocator, which hides them.
stage_sanitizer() {
  gpu || skip "compute-sanitizer needs a GPU"
  has pytest || skip "pytest is not installed"
  local sanitizer
  sanitizer=$(find_sanitizer)
  [[ -n $sanitizer ]] || skip "compute-sanitizer was found neither on PATH nor in CUDA_HOME (it comes with the toolkit)"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 9 --target-processes all \
    "$PYTHON" -m pytest -p no:cacheprovider tests/ops/test_embedding.py
}

pack() {
  tar czf "$OUT.tar.gz" -C "$(dirname "$OUT")" --exclude stand-ins "$(basename "$OUT")" && echo "$OUT.tar.gz"
}

export JOBS=${JOBS:-$(gpu && echo 8 || echo 1)}

if [[ ${1:-} == --run-tests ]]; then
  run_tests "$2"
  exit 0
fi
if [[ ${1:-} == --run ]]; then # one stage, in a process of its own that a time limit can end
  "stage_$2"
  exit
fi

mkdir -p "$OUT" || exit 1
trap pack EXIT
for name in "$@"; do
  [[ " ${STAGES[*]} " == *" $name "* ]] || { echo "no stage '$name'; choose of ${STAGES[*]}" >&2; trap - EXIT; exit 2; }
  rm -f "$OUT/$name.done"
done
[[ $# -gt 0 ]] && STAGES=("$@")
failed=0
for name in "${STAGES[@]}"; do
  log=$OUT/$name.log
  if [[ -e $OUT/$name.done ]]; then
    echo "$name: done before"
    continue
  fi
  started=$SECONDS
  timeout --kill-after=20 "$LIMIT" bash benchmarks/gpu_report.sh --run "$name" > "$log" 2>&1
  status=$?
  took=$((SECONDS - started))
  case $status in
    0) touch "$OUT/$name.done" && echo "$name: done in $took s" ;;
    75) echo "$name: $(grep '^skipped:' "$log" | tail -1)" ;;
    124 | 137) echo "$name: cut off after $took s (LIMIT=$LIMIT); $log" && failed=1 ;;
    *) echo "$name: FAILED after $took s: $(tail -1 "$log"); $log" && failed=1 ;;
  esac
  [[ $name == environment ]] && grep MISSING "$log"
done
exit $failed
