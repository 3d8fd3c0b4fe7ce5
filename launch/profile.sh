#!/usr/bin/env bash
# Profiles a few steps of a run: ./launch/local.sh under nsys, or with torch's own profiler.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./launch/profile.sh RECIPE [flags]

  ./launch/profile.sh moe-2b --mock-data                     steps 10 to 12 of rank 0, with nsys
  ./launch/profile.sh moe-2b --mock-data --profile-step-start 40 --profile-step-end 44
  ./launch/profile.sh tiny-moe --torch-profiler              without nsys, also on a CPU
  DRY_RUN=1 ./launch/profile.sh moe-2b --mock-data           print the command, profile nothing

RECIPE and flags are those of ./launch/local.sh. The window is Megatron's: --profile-step-start A
--profile-step-end B captures steps A to B - 1, counted from 0, of --profile-ranks R...
--torch-profiler uses torch's profiler in place of nsys.
--trace LIST is what nsys traces; nvtx,cuda-sw where its hardware tracing crashes.
Reports go to RUN/nsight, or traces to RUN/torch_profile. docs/profiling.md explains both.
TEXT
}

refuse() {
  echo "refused: $*" >&2
  exit 78
}

root=$(cd "$(dirname "$0")/.." && pwd)
case "${1:-}" in
-h | --help)
  usage
  exit 0
  ;;
"") refuse "no recipe given; ./launch/profile.sh --help shows how" ;;
-*) refuse "the recipe comes first, before $1" ;;
esac
recipe=$1
shift

profiler=nsys
flags=()
while [ $# -gt 0 ]; do
  case "$1" in
  --torch-profiler) profiler=torch ;;
  --trace)
    [ $# -gt 1 ] || refuse "--trace needs a list, such as nvtx,cuda-sw"
    export MOA_PROFILE_TRACE=$2
    shift
    ;;
  --trace=*) export MOA_PROFILE_TRACE=${1#--trace=} ;;
  *) flags+=("$1") ;;
  esac
  shift
done

given() { # FLAG: whether the user's flags, or his --set, name it
  local word key=${1#--}
  for word in ${flags[@]+"${flags[@]}"}; do
    case "$word" in
    "$1" | "$1="* | "$key="* | "${key//-/_}="*) return 0 ;;
    esac
  done
  return 1
}

values_of() { # FLAG: the words behind its last use
  local word found=() inside=no
  for word in ${flags[@]+"${flags[@]}"}; do
    case "$word" in
    "$1")
      inside=yes
      found=()
      ;;
    "$1="*)
      inside=no
      found=("${word#*=}")
      ;;
    -*) inside=no ;;
    *) [ "$inside" = no ] || found+=("$word") ;;
    esac
  done
  echo ${found[@]+"${found[*]}"}
}

added=(--profile --nvtx-ranges)
given --profile-step-start || added+=(--profile-step-start 10)
given --profile-step-end || added+=(--profile-step-end 13)
given --profile-ranks || added+=(--profile-ranks 0)
ranks=$(values_of --profile-ranks)
run_dir=$(values_of --run-dir)
if [ -z "$run_dir" ]; then
  run_dir=runs/$(basename "$recipe" .yaml)-profile-$(date +%Y%m%d-%H%M%S)
  added+=(--run-dir "$run_dir")
fi

if [ "$profiler" = torch ]; then
  added+=(--use-pytorch-profiler)
elif given --use-pytorch-profiler; then
  refuse "--use-pytorch-profiler under nsys: two profilers cannot run at once;" \
    "write --torch-profiler, which leaves nsys out"
else
  [ "${DRY_RUN:-0}" != 0 ] || command -v nsys >/dev/null 2>&1 ||
    refuse "nsys is not on PATH: load NVIDIA's Nsight Systems (NVIDIA's PyTorch containers have" \
      "it), or add --torch-profiler, which needs nothing more"
  export MOA_WRAP=$root/launch/nsys.sh MOA_PROFILE_DIR=$run_dir/nsight
  export MOA_PROFILE_RANKS=${ranks:-0}
fi

started=$(mktemp)
trap 'rm -f "$started"' EXIT
code=0
"$root/launch/local.sh" "$recipe" "${added[@]}" ${flags[@]+"${flags[@]}"} &
run=$!
# A signal goes on to the run, which saves and stops; bash alone would leave it running.
for name in TERM USR1 USR2; do
  # shellcheck disable=SC2064
  trap "kill -s $name $run 2>/dev/null || true" "$name"
done
trap 'kill -s TERM "$run" 2>/dev/null || true' INT
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do
  code=0
  wait "$run" || code=$?
done
[ "${DRY_RUN:-0}" = 0 ] && [ "$code" != 78 ] || exit "$code"

# Only what this run has written: a continued run's folder holds older profiles too.
files_of_run() { find "$1" -name "$2" -newer "$started" 2>/dev/null | sort; }
if [ "$profiler" = torch ]; then
  mapfile -t traces < <(files_of_run "$run_dir/torch_profile" '*.json.gz')
  echo "traces of torch's profiler, for https://ui.perfetto.dev or chrome://tracing:"
  printf '  %s\n' "${traces[@]:-none was written; did the run reach --profile-step-end?}"
  exit "$code"
fi
mapfile -t exports < <(files_of_run "$run_dir/nsight" '*.sqlite')
if [ ${#exports[@]} = 0 ]; then
  mapfile -t reports < <(files_of_run "$run_dir/nsight" '*.nsys-rep')
  if [ ${#reports[@]} = 0 ]; then
    echo "nsys wrote no report in $run_dir/nsight: did the run reach --profile-step-end?" >&2
  else
    echo "report: tools/nsys_report.py ${reports[*]}"
  fi
  exit "$code"
fi
page=$run_dir/nsight/report.html
echo "report: tools/nsys_report.py ${exports[*]} --html $page"
"${MOA_PYTHON:-$root/.venv/bin/python}" "$root/tools/nsys_report.py" "${exports[@]}" --html "$page" ||
  echo "the report failed; the captures are in $run_dir/nsight" >&2
exit "$code"
