#!/usr/bin/env bash
# Starts the ranks of one node with torchrun, so that signals reach them and none outlives it.
# Usage: launch/node.sh [torchrun options] -- [arguments of moa_megatron.pretrain]
#
# Left alone, torchrun kills its ranks 30 s after SIGTERM, which is too short to save a large model,
# and dies of SIGUSR1 and SIGUSR2 leaving its ranks behind. Here it ignores all three; this script
# hands them to the ranks, which save and end by themselves.
# shellcheck disable=SC2317  # functions are called by the traps
set -euo pipefail

python=${MOA_PYTHON:?the interpreter; set by launch/task.sh and launch/local.sh}
options=()
while [ "${1:-}" != -- ]; do
  options+=("$1")
  shift
done
shift

# Should this script itself be killed, the agent goes too, and with it the ranks.
keeper=()
! setpriv --pdeathsig KILL true 2>/dev/null || keeper=(setpriv --pdeathsig KILL)

# MOA_WRAP: a profiler in front of torchrun, which then sees all ranks of the node.
(
  trap '' TERM USR1 USR2
  exec "${keeper[@]}" ${MOA_WRAP:+"$MOA_WRAP"} "$python" -m torch.distributed.run --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
    "${options[@]}" -m moa_megatron.pretrain "$@"
) &
agent=$!

ranks() { # process ids of the ranks: the leaves of the agent's tree that run pretrain
  local pid words
  for pid in $(descendants "$agent"); do
    words=$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") || continue
    case $words in
    *" -m torch.distributed.run "*) ;;
    *" -m moa_megatron.pretrain "*) echo "$pid" ;;
    esac
  done
}

descendants() {
  local child
  cat "/proc/$1/task/"*/children 2>/dev/null | tr ' ' '\n' | while read -r child; do
    echo "$child"
    descendants "$child"
  done
}

# Repeated, because a rank that is only starting does not listen yet; more of them change nothing.
forward() {
  while kill -0 "$agent" 2>/dev/null; do
    for pid in $(ranks); do kill -s "$1" "$pid" 2>/dev/null || true; done
    sleep 2
  done
}

forwarding=
for name in TERM USR1 USR2; do
  # shellcheck disable=SC2064
  trap "[ -n \"\$forwarding\" ] || { forward $name & forwarding=\$!; }" "$name"
done

code=0
wait "$agent" || code=$?
while kill -0 "$agent" 2>/dev/null; do
  code=0
  wait "$agent" || code=$?
done
[ -z "$forwarding" ] || kill "$forwarding" 2>/dev/null || true
exit "$code"
