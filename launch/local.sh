#!/usr/bin/env bash
# Trains a recipe on this machine: all GPUs, or the CPU where there is none.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./launch/local.sh RECIPE [flags]

  ./launch/local.sh tiny-moe                         a laptop, minutes
  ./launch/local.sh tiny-moe --moa-variant qd        another variant
  ./launch/local.sh tiny-moe --moa-mixing fixed      the SwiGLU baseline
  NPROC=2 ./launch/local.sh tiny-moe --expert-model-parallel-size 2
  DRY_RUN=1 ./launch/local.sh moe-2b --mock-data     check and print, train nothing

RECIPE is a name from launch/recipes or a .yaml file. Flags are Megatron's and --moa-*;
--set key=value overrides any recipe key. The run goes to runs/RECIPE-TIME, or to --run-dir DIR;
an existing DIR with a checkpoint is continued.
NPROC=n processes: default all GPUs, or 1 on a CPU.
TEXT
}

root=$(cd "$(dirname "$0")/.." && pwd)
case "${1:-}" in
--[!h]* | -[!-h]*)
  echo "refused: the recipe comes first, before $1" >&2
  exit 78
  ;;
-h | --help)
  usage
  exit 0
  ;;
"")
  usage >&2
  exit 78
  ;;
esac

"$root/launch/setup.sh" --recipe "$1"
# shellcheck source=launch/env.sh
. "$root/launch/env.sh"
export MOA_PYTHON="${MOA_PYTHON:-$root/.venv/bin/python}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

recipe=$1
run_dir="runs/$(basename "$recipe" .yaml)-$(date +%Y%m%d-%H%M%S)"
command=(-m moa_megatron.pretrain "$recipe" --run-dir "$run_dir" "${@:2}")
[ "${DRY_RUN:-0}" = 0 ] || command+=(--dry-run)

moa_device_connections "$recipe" "${@:2}"

count_gpus() { # those that CUDA will show, where it is told which
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  else
    { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
  fi
}
nproc_wanted=${NPROC:-$(count_gpus)}
if [ "$nproc_wanted" -le 1 ]; then
  [ "${DRY_RUN:-0}" = 0 ] || echo "would run: python ${command[*]}"
  exec ${MOA_WRAP:+"$MOA_WRAP"} "$MOA_PYTHON" "${command[@]}"
fi

# torchrun turns every exit code into 1: the true one travels in a file.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(moa_threads "$nproc_wanted")}"
notes=$(mktemp -d)
trap 'rm -rf "$notes"' EXIT
launcher=(--standalone --nproc-per-node "$nproc_wanted")
[ "${DRY_RUN:-0}" = 0 ] || echo "would run: torchrun ${launcher[*]} ${command[*]}"
"$root/launch/node.sh" "${launcher[@]}" -- "${command[@]:2}" --exit-file "$notes/exit" &
launched=$!
# bash alone would leave the ranks running.
for name in TERM USR1 USR2; do
  # shellcheck disable=SC2064
  trap "kill -s $name $launched 2>/dev/null || true" "$name"
done
trap 'kill -s TERM "$launched" 2>/dev/null || true' INT
code=0
wait "$launched" || code=$?
while kill -0 "$launched" 2>/dev/null; do
  code=0
  wait "$launched" || code=$?
done
# A refusal leaves torchrun with 0, so that its own report does not bury the message.
said=$(cat "$notes/exit" 2>/dev/null || true)
if [ "$code" = 0 ] || [ "${said:-0}" != 0 ]; then code=${said:-$code}; fi
exit "$code"
