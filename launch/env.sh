# shellcheck shell=bash
# Environment of every launch: sourced by local.sh, each export with its reason.
# Values that the caller has set are kept.

# The code compiles Megatron's 400 modules once instead of at every start (seconds on a laptop).
unset PYTHONDONTWRITEBYTECODE

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
# relies on a single hardware queue, which keeps kernels in launch order.
if command -v nvidia-smi >/dev/null 2>&1; then
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
fi
