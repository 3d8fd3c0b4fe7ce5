#!/usr/bin/env bash
# Everything a GPU has to show, in one call, with a report to keep under docs/results/.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: tools/gpu_check.sh [FOLDER] [PART...]

  tools/gpu_check.sh                        all parts; results and report.md in gpu-results/
  tools/gpu_check.sh out tests numerics     some of them
  OVERLAY=te.tar.xz tools/gpu_check.sh out  unpacks Transformer Engine beside this Python first

Uses one GPU. Without Transformer Engine what needs it is left out.

parts, in this order, each with its time limit in seconds:
TEXT
  for name in $PARTS; do
    echo "  $(printf '%-10s' "$name") $(limit "$name")"
  done
  echo "PYTHON chooses the interpreter (default: .venv/bin/python, else python3)."
  echo "exit code: 0 all parts passed, 1 one did not, 78 no CUDA device or an unknown part"
}

# tests, numerics and experts are the suite, meant to take less than 8 minutes; the others measure.
PARTS="tests numerics experts step fp8 op layer images"
limit() {
  case $1 in
  tests | numerics | step) echo 240 ;;
  experts | fp8) echo 120 ;;
  *) echo 90 ;;
  esac
}
case "${1:-}" in -h | --help)
  usage
  exit 0
  ;;
esac

cd "$(dirname "$0")/.." || exit 1
out=${1:-gpu-results}
shift || true
case " $PARTS " in *" $out "*)
  echo "refused: '$out' is a part: the folder comes first, as in tools/gpu_check.sh gpu-results $out" >&2
  exit 78
  ;;
esac
for part in "$@"; do
  case " $PARTS " in
  *" $part "*) ;;
  *)
    echo "refused: no part '$part': choose from $PARTS" >&2
    exit 78
    ;;
  esac
done
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
mkdir -p "$out"
unset TRITON_INTERPRET # interpreted kernels would pass as evidence of a GPU
if [ -n "${OVERLAY:-}" ]; then
  overlay=$(mktemp -d) && trap 'rm -rf "$overlay"' EXIT && tar -xJf "$OVERLAY" -C "$overlay" || exit 1
  export PYTHONPATH="$overlay${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 78
engine=1
"$python" -c 'import torch, transformer_engine.pytorch' 2>/dev/null || engine=0

report=$out/report.md
{
  echo "# On a GPU, $(date +%F)"
  echo
  echo "    tools/gpu_check.sh FOLDER $*"
  echo
  "$python" - <<'TEXT'
from importlib import metadata
import torch
names = ("torch", "triton", "megatron-core", "transformer-engine", "apex")
def version(name):
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"
print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda},", ", ".join(map(version, names)) + ",")
TEXT
  echo "commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}."
  [ "$engine" = 1 ] || printf '\nNo Transformer Engine: FP8 and its modules are left out.\n'
} >"$report"

failed=0
running=
# timeout has a process group of its own, which a terminal's Ctrl-C does not reach.
trap '[ -z "$running" ] || kill -TERM "$running"; exit 130' INT
trap '[ -z "$running" ] || kill -TERM "$running"; exit 143' TERM
part() { # NAME COMMAND...
  local name=$1 start=$SECONDS
  shift
  case " ${chosen:-$PARTS} " in *" $name "*) ;; *) return ;; esac
  # The numbers come last: JSON goes to its own file, progress to the log alone.
  timeout --kill-after=20 "$(limit "$name")" "$@" >"$out/$name.txt" 2>"$out/$name.log" &
  running=$!
  wait "$running"
  local code=$?
  running=
  echo "$name: exit $code after $((SECONDS - start)) s; ends with"
  tail -n 25 "$out/$name.txt" | cut -c1-300
  [ "$code" = 0 ] || {
    failed=1
    tail -n 15 "$out/$name.log" | cut -c1-300
  }
  {
    printf '\n## %s\n\n    %s\n\nExit code %s after %s s.\n\n' \
      "$name" "$(words "$@")" "$code" "$((SECONDS - start))"
    grep -v '^{' "$out/$name.txt" | tail -n 60 | cut -c1-220 | sed 's/^/    /'
  } >>"$report"
}
chosen=$*

words() { # as they could be typed
  shift
  printf 'python'
  printf ' %q' "$@"
}

rm -rf "$out/numerics" # a check keeps nothing from an earlier one
eight_bits=()
[ "$engine" = 0 ] || eight_bits=(--fp8 tensorwise blockwise)
model=(--recipe moe-2b --steps 12 --pairs 1)
sizes='--mock-data --moa-align 64 --micro-batch-size 16 --global-batch-size 16'
part tests "$python" -m pytest -q -p no:cacheprovider --durations=10 \
  tests/kernels/triton tests/kernels/test_grouped_gpu.py tests/gpu
part numerics "$python" tools/check_numerics.py tiny-moe --jobs 6 --out "$out/numerics"
part experts "$python" tools/bench.py --experts --variants qd --repeats 10 \
  --json "$out/experts.json" "${eight_bits[@]}"
part step "$python" tools/bench.py --step "${model[@]}" --sides fixed moa --flags "$sizes" \
  --json "$out/step.json"
[ "$engine" = 0 ] || part fp8 "$python" tools/bench.py --step "${model[@]}" --sides moa fp8-tensorwise \
  --flags "$sizes --optimizer adam" --json "$out/fp8.json"
part op "$python" tools/bench.py --op --json "$out/op.json"
part layer "$python" tools/bench.py --layer --json "$out/layer.json"
part images "$python" tools/bench.py --step --recipe mae-vit-b --sides fixed moa --steps 12 \
  --pairs 1 --flags '--mock-data --global-batch-size 256' --json "$out/images.json"
exit "$failed"
