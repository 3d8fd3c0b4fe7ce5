#!/usr/bin/env bash
# Everything a GPU has to show, in one call, with a report under docs/results/.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: tools/gpu_check.sh [FOLDER] [PART...]

  tools/gpu_check.sh                    the suite; results and report.md in gpu-results/
  tools/gpu_check.sh out step fp8       some parts
  tools/gpu_check.sh out all            the suite, and all that measures

Uses one GPU. Parts, in this order, each with its time limit in seconds:
TEXT
  for name in $SUITE $MEASURING; do
    [ "$name" != tests ] || echo "the suite, $DEADLINE in all:"
    [ "$name" != step ] || echo "what measures, when it is named:"
    echo "  $(printf '%-10s' "$name") $(limit "$name")"
  done
  cat <<TEXT
variables:
  PYTHON       the interpreter (default: MOA_PYTHON, else .venv/bin/python, else python3)
  OVERLAY      an archive with Transformer Engine, unpacked beside this Python first
               (default: $SHARED where Transformer Engine is missing)
  NO_ENGINE=1  where it is missing, leave out FP8 and its modules
  RESULTS      where DATE-gpu.md, or DATE-gpu-bench.md without the suite, copies the report
               (default: docs/results; empty: nowhere)
  DEADLINE     seconds of the suite (default: 480)
exit code: 0 all parts passed, 1 one did not, 78 no CUDA device, no Transformer Engine or an unknown part
TEXT
}

refuse() {
  echo "refused: $*" >&2
  exit 78
}

SUITE="tests numerics dense experts"
MEASURING="step fp8 op layer images"
SHARED=../shared/te/overlay-sm90.tar.xz
DEADLINE=${DEADLINE:-480}
RESULTS=${RESULTS-docs/results}
GRACE=20 # seconds in which a part that is told to stop writes what it has
limit() {
  case $1 in
  tests | numerics) echo 240 ;;
  dense | experts) echo 120 ;;
  step) echo 300 ;;
  fp8) echo 420 ;;
  images) echo 180 ;;
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
case " $SUITE $MEASURING all " in *" $out "*)
  refuse "'$out' is a part: the folder comes first, as in tools/gpu_check.sh gpu-results $out"
  ;;
esac
for part in "$@"; do
  case " $SUITE $MEASURING all " in
  *" $part "*) ;;
  *) refuse "no part '$part': choose from $SUITE $MEASURING, or all" ;;
  esac
done
chosen=${*:-$SUITE}
case " $chosen " in *" all "*) chosen="$SUITE $MEASURING" ;; esac

python=${PYTHON:-${MOA_PYTHON:-}}
if [ -n "$python" ]; then
  command -v "$python" >/dev/null 2>&1 || refuse "$python cannot be run: set PYTHON or MOA_PYTHON to a Python 3.12"
  export MOA_PYTHON=$python # launch/local.sh takes the same one
else
  python=.venv/bin/python
  [ -x "$python" ] || python=python3
fi
mkdir -p "$out"
unset TRITON_INTERPRET # interpreted kernels would pass as evidence of a GPU
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 78

has_engine() { "$python" -c 'import torch, transformer_engine.pytorch' 2>"$out/engine.log"; }
engine=1
archive=${OVERLAY:-}
if [ -z "$archive" ] && ! has_engine; then
  engine=0
  [ "${NO_ENGINE:-0}" = 1 ] || ! [ -f "$SHARED" ] || archive=$SHARED
fi
if [ -n "$archive" ]; then
  echo "Transformer Engine from $archive"
  overlay=$(mktemp -d) && trap 'rm -rf "$overlay"' EXIT && tar -xJf "$archive" -C "$overlay" || exit 1
  export PYTHONPATH="$PWD:$overlay:$PYTHONPATH" # the archive does not shadow the project
  engine=1
  has_engine || engine=0
fi
missing="No Transformer Engine: FP8 and its modules are left out."
if [ "$engine" = 0 ]; then
  [ "${NO_ENGINE:-0}" = 1 ] || refuse "$python cannot import Transformer Engine" \
    "($(tail -n 1 "$out/engine.log")): OVERLAY= an archive that has it, PYTHON= an interpreter" \
    "that has it, or NO_ENGINE=1 for a check without FP8 and its modules"
  echo "$missing"
fi

today=$(date +%F)
report=$out/report.md
{
  echo "# On a GPU, $today"
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
  [ "$engine" = 1 ] || printf '\n%s\n' "$missing"
} >"$report"

failed=0
running=
# timeout has a process group of its own, which a terminal's Ctrl-C does not reach.
trap '[ -z "$running" ] || kill -TERM "$running"; exit 130' INT
trap '[ -z "$running" ] || kill -TERM "$running"; exit 143' TERM
part() { # NAME COMMAND...
  local name=$1 start=$SECONDS seconds left
  shift
  case " $chosen " in *" $name "*) ;; *) return ;; esac
  seconds=$(limit "$name")
  left=$((DEADLINE - GRACE - SECONDS))
  case " $SUITE " in *" $name "*) [ "$left" -ge "$seconds" ] || seconds=$left ;; esac
  if [ "$seconds" -lt 1 ]; then # timeout takes 0 for no limit
    failed=1
    echo "$name: not run, no time was left"
    printf '\n## %s\n\nNot run: no time was left of %s s.\n' "$name" "$DEADLINE" >>"$report"
    return
  fi
  # The numbers come last: JSON goes to its own file, progress to the log alone.
  timeout --kill-after="$GRACE" "$seconds" "$@" >"$out/$name.txt" 2>"$out/$name.log" &
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

words() { # as they could be typed
  shift
  printf 'python'
  printf ' %q' "$@"
}

keep() { # a copy of the report under its date
  local kind=gpu-bench name file
  for name in $SUITE; do
    case " $chosen " in *" $name "*) kind=gpu ;; esac
  done
  file=$RESULTS/$today-$kind.md
  if [ -e "$file" ]; then
    echo "$file exists and stays as it is: this report is in $report alone"
  else
    mkdir -p "$RESULTS" && cp "$report" "$file" && echo "report: $file"
  fi
}

rm -rf "$out/numerics" "$out/dense" # a check keeps nothing from an earlier one
eight_bits=() dense=(recompute-mlp)
[ "$engine" = 0 ] || eight_bits=(--fp8 tensorwise blockwise) dense+=(cuda-graphs fp8-tensorwise fp8-blockwise)
model=(--recipe moe-2b --steps 12 --pairs 2)
sizes='--mock-data --moa-align 64 --micro-batch-size 16 --global-batch-size 16'
part tests "$python" -m pytest -q -p no:cacheprovider --durations=10 \
  tests/kernels/triton tests/kernels/test_grouped_gpu.py tests/gpu
part numerics "$python" tools/check_numerics.py tiny-moe --jobs 6 --out "$out/numerics"
part dense "$python" tools/check_numerics.py tiny-dense --jobs 6 --out "$out/dense" --sides "${dense[@]}"
part experts "$python" tools/bench.py --experts --variants qd --repeats 10 \
  --json "$out/experts.json" "${eight_bits[@]}"
part step "$python" tools/bench.py --step "${model[@]}" --sides fixed moa --at-least moa=0.96 \
  --flags "$sizes" --json "$out/step.json"
[ "$engine" = 0 ] || part fp8 "$python" tools/bench.py --step "${model[@]}" \
  --sides moa fp8-blockwise fp8-tensorwise --at-least fp8-blockwise=1.15 \
  --flags "$sizes --optimizer adam" --json "$out/fp8.json"
part op "$python" tools/bench.py --op --json "$out/op.json"
part layer "$python" tools/bench.py --layer --json "$out/layer.json"
part images "$python" tools/bench.py --step --recipe mae-vit-b --sides fixed moa --steps 12 \
  --pairs 2 --flags '--mock-data --global-batch-size 256' --json "$out/images.json"
[ -z "$RESULTS" ] || keep
exit "$failed"
