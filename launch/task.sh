#!/usr/bin/env bash
# One task of a Slurm step: the ranks of a node by torchrun, or with MOA_PER_RANK=1 a single rank.
# Usage, from slurm.sbatch: srun ... launch/task.sh RECIPE [flags] --run-dir DIR --exit-file FILE
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
# Inside a container its own interpreter serves, not one of the host that submitted.
MOA_PYTHON=${MOA_PYTHON:-$root/.venv/bin/python}
[ -z "${MOA_CONTAINER:-}" ] || MOA_PYTHON=python
export MOA_PYTHON
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[ -z "${MOA_TOOL:-}" ] || exec "$MOA_PYTHON" "$MOA_TOOL" "$@"
# shellcheck source=launch/env.sh
. "$root/launch/env.sh"
moa_device_connections "$@"
moa_nccl_logs "${MOA_LOGS:-.}"

if [ -n "${MOA_PER_RANK:-}" ]; then
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$MOA_PROCS_PER_NODE GROUP_RANK=$SLURM_NODEID
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(moa_threads "$MOA_PROCS_PER_NODE")}"
  # A signal that comes before the interpreter listens must not end the rank.
  trap '' TERM USR1 USR2
  exec ${MOA_WRAP:+"$MOA_WRAP"} "$MOA_PYTHON" -m moa_megatron.pretrain "$@"
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(moa_threads "$MOA_PROCS_PER_NODE")}"
exec "$root/launch/node.sh" --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
  --nproc-per-node "$MOA_PROCS_PER_NODE" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -- "$@"
