# shellcheck shell=bash
# Environment of every launch: sourced by local.sh and task.sh, each export with its reason.
# Values that the caller has set are kept.

# The code compiles Megatron's 400 modules once instead of at every start (seconds on a laptop).
unset PYTHONDONTWRITEBYTECODE

# Kernels, tokenized text and compilations are kept between runs. In a container the home folder may
# be missing, read-only or of a user without a name; a private folder then serves while it lasts.
if [ -z "${XDG_CACHE_HOME:-}" ] && ! [ -w "${HOME:-/none}/.cache" ] && ! [ -w "${HOME:-/none}" ]; then
  XDG_CACHE_HOME=${TMPDIR:-/tmp}/moa-cache-$(id -u)
  # Libraries are loaded from it: a folder of that name which someone else made is not used.
  mkdir -m 700 "$XDG_CACHE_HOME" 2>/dev/null ||
    { [ -O "$XDG_CACHE_HOME" ] && ! [ -L "$XDG_CACHE_HOME" ]; } || XDG_CACHE_HOME=$(mktemp -d)
  export XDG_CACHE_HOME
fi
# These two do not follow it by themselves; the second needs a user's name otherwise.
if [ -n "${XDG_CACHE_HOME:-}" ]; then
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$XDG_CACHE_HOME/triton}"
  export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$XDG_CACHE_HOME/inductor}"
fi

# The code is that of the checkout whose launcher runs: Python would look into the working folder
# first, which in a container is the image's own copy.
export PYTHONSAFEPATH=1

# Packages in the user's home directory must not shadow the project's own.
export PYTHONNOUSERSITE=1

# Progress lines reach log files when they are printed, not when a buffer is full.
export PYTHONUNBUFFERED=1

# Data and tokenizers are local files; nothing is asked of a model hub.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-true}"

# Ranks on one host share its cores; torchrun would otherwise give each rank one thread.
moa_threads() { # NPROC -> threads per process
  local cores
  cores=$(nproc 2>/dev/null || echo 1)
  echo $((cores / $1 > 0 ? cores / $1 : 1))
}

# An OpenMP thread that waits by spinning holds the core that the thread it waits for needs: on a
# busy or virtual machine small kernels become 10 times slower (docs/decisions.md).
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"

# Before Blackwell, overlapping communication with computation under tensor or context parallelism
# relies on a single hardware queue, which keeps kernels in launch order; overlapped expert
# communication wants many queues, FSDP anything but one. The recipe and its flags decide.
moa_device_connections() { # RECIPE [flags]; needs MOA_PYTHON
  local connections
  command -v nvidia-smi >/dev/null 2>&1 && [ -z "${CUDA_DEVICE_MAX_CONNECTIONS:-}" ] || return 0
  connections=$("$MOA_PYTHON" -m moa_megatron.outline "$@")
  [ -z "$connections" ] || export CUDA_DEVICE_MAX_CONNECTIONS="$connections"
}

# Offloading of activations: Megatron refuses it with Transformer Engine's newer implementation,
# which would move weights, too.
export NVTE_CPU_OFFLOAD_V1="${NVTE_CPU_OFFLOAD_V1:-1}"

# Tensors used on another stream are kept by their autograd graph instead of the allocator's
# bookkeeping, which fragments memory.
export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}"

# NVLS reserves buffers per communicator; many process groups would cost gigabytes.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# When a collective hangs, every rank writes its last collectives: the one that is behind is the
# one to look at. Without Python stacks, which can deadlock with the interpreter's lock.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_INCLUDE_STACK_TRACE="${TORCH_INCLUDE_STACK_TRACE:-False}"

# Both the record of a hang and, with MOA_NCCL_DEBUG=INFO, NCCL's own messages go to one file per
# rank in the attempt's folder, not to a node's /tmp or between the progress lines.
moa_nccl_logs() { # FOLDER
  export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$1/nccl_trace_rank_}"
  [ -n "${MOA_NCCL_DEBUG:-}" ] || return 0
  export NCCL_DEBUG="$MOA_NCCL_DEBUG" NCCL_DEBUG_FILE="$1/nccl.%h.%p.log"
}

# Where ranks meet: the first node of the job, by an address where its name does not resolve, and a
# port that two jobs on one node do not share. MOA_MASTER_ADDR and MOA_MASTER_PORT choose others.
moa_rendezvous() { # sets MASTER_ADDR, MASTER_PORT from Slurm's variables
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if ! getent hosts "$first" >/dev/null; then
    first=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  fi
  # Not what the submitting shell has, which may itself be part of another job.
  export MASTER_ADDR="${MOA_MASTER_ADDR:-$first}"
  export MASTER_PORT="${MOA_MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
}
