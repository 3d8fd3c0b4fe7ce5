#!/usr/bin/env bash
# Everything a GPU has to show, in one call: kernels against the reference, then the benchmarks.
# Usage: tools/gpu_check.sh [FOLDER]   results go to FOLDER (default: gpu-results)
# PYTHON chooses the interpreter (default: .venv/bin/python, else python3).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-gpu-results}
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
mkdir -p "$out"
unset TRITON_INTERPRET # interpreted kernels would pass as evidence of a GPU
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 78

failed=0
part() { # NAME COMMAND...
  local name=$1 start=$SECONDS
  shift
  "$@" >"$out/$name.log" 2>&1
  local code=$?
  echo "$name: exit $code after $((SECONDS - start)) s; ends with"
  tail -n 25 "$out/$name.log"
  [ "$code" = 0 ] || failed=1
}

part tests "$python" -m pytest -q -p no:cacheprovider \
  tests/kernels/triton tests/kernels/test_grouped_gpu.py tests/gpu
part op "$python" tools/bench.py --op --json "$out/op.json"
part layer "$python" tools/bench.py --layer --json "$out/layer.json"
exit "$failed"
