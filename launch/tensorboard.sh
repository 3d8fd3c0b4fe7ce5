#!/usr/bin/env bash
# Serves the curves of a run, of a sweep, or of all runs in a folder.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./launch/tensorboard.sh RUN [tensorboard options]

  ./launch/tensorboard.sh runs/tiny-moe-20261122-101500   one run
  ./launch/tensorboard.sh runs/lr-sweep                   every point of a sweep
  ./launch/tensorboard.sh runs --port 7007                all runs

The server listens on this machine only; on a cluster, the printed ssh command brings it to yours.
PORT or --port chooses another port than 6006.
TEXT
}

case "${1:-}" in
-h | --help)
  usage
  exit 0
  ;;
"" | -*)
  usage >&2
  exit 78
  ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
run=$1
shift
if [ -z "$(find "$run" -name 'events.out.tfevents.*' -print -quit 2>/dev/null)" ]; then
  echo "refused: $run holds no TensorBoard events: name the folder of a run that has started" >&2
  exit 78
fi
if [ -z "${MOA_PYTHON:-}" ]; then
  "$root/launch/setup.sh"
  MOA_PYTHON="$root/.venv/bin/python"
fi
# shellcheck source=launch/env.sh
. "$root/launch/env.sh"

port=${PORT:-6006}
words=("$@")
for ((i = 0; i < ${#words[@]}; i++)); do
  case ${words[i]} in
  --port) port=${words[i + 1]:-$port} ;;
  --port=*) port=${words[i]#--port=} ;;
  esac
done
echo "http://localhost:$port   (Ctrl-C ends it)"
if [ -n "${SSH_CONNECTION:-}${SLURM_JOB_ID:-}" ]; then
  echo "on your own machine: ssh -N -L $port:localhost:$port ${USER:-you}@$(hostname -f)"
fi
exec "$MOA_PYTHON" -m tensorboard.main --logdir "$run" --port "$port" "$@"
