#!/usr/bin/env bash
# Runs a command under nsys where its rank is to be profiled, and as it is elsewhere:
#   launch/nsys.sh COMMAND...
#
# MOA_PROFILE_DIR    folder of the reports (needed)
# MOA_PROFILE_NAME   start of their names, default: the folder above MOA_PROFILE_DIR
# MOA_PROFILE_RANKS  global ranks, such as "0 8"; default: all
# MOA_PROFILE_TRACE  what nsys traces; nvtx,cuda-sw where tracing in hardware crashes
# DRY_RUN=1          prints the nsys command, runs COMMAND without it
#
# One process per rank (RANK is set, or SLURM_PROCID by srun): a report per selected rank. Around
# torchrun, which COMMAND then names: one report per node, of all its ranks.
set -euo pipefail

refuse() {
  echo "refused: $*" >&2
  exit 78
}

[ $# -gt 0 ] || refuse "launch/nsys.sh needs the command to run, such as launch/nsys.sh python ..."
dir=${MOA_PROFILE_DIR:?launch/nsys.sh: set MOA_PROFILE_DIR to the folder of the reports}
name=${MOA_PROFILE_NAME:-$(basename "$(dirname "$dir")")}

case " $* " in
*" torch.distributed.run "* | *"/torchrun "* | *" torchrun "*) rank=all ;;
*) rank=${RANK:-${SLURM_PROCID:-0}} ;;
esac
if [ "$rank" != all ] && [ -n "${MOA_PROFILE_RANKS:-}" ]; then
  case " $MOA_PROFILE_RANKS " in
  *" $rank "*) ;;
  *) exec "$@" ;;
  esac
fi

# Spelled out here instead of by nsys's %q, which fails where a variable is not set.
job=${SLURM_JOB_ID:+job$SLURM_JOB_ID}
output=$dir/$name-${job:-local}-node${SLURM_NODEID:-${GROUP_RANK:-0}}-rank$rank
# Sampling off: a capture window of a few steps needs none, and containers often forbid it.
# Megatron opens and closes the window; without "stop" nsys would end the training with it.
capture=(
  nsys profile
  --trace "${MOA_PROFILE_TRACE:-nvtx,cuda,cublas,cudnn}"
  --sample none
  --cpuctxsw none
  --capture-range cudaProfilerApi
  --capture-range-end stop
  --cuda-graph-trace node
  --export sqlite
  --force-overwrite true
  --output "$output"
)

if [ "${DRY_RUN:-0}" != 0 ]; then
  echo "would capture: ${capture[*]} $*"
  exec "$@"
fi
command -v nsys >/dev/null 2>&1 ||
  refuse "nsys is not on PATH: load NVIDIA's Nsight Systems (NVIDIA's PyTorch containers have it)," \
    "or use ./launch/profile.sh --torch-profiler, which needs nothing more"
mkdir -p "$dir"
exec "${capture[@]}" "$@"
