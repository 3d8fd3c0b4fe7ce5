"""Runs Megatron's own training loop on a machine without a CUDA device.

Megatron names the CUDA device in some two hundred places. Instead of changing them, host mode
redirects the names: torch's factories and device moves answer with CPU tensors, `torch.cuda`'s
entry points become harmless, and a handful of Megatron's modules get a host variant the moment
they are imported. `torch.cuda.is_available()` keeps telling the truth, so code which asks it
(kernel dispatch, `torch.compile`) is not misled. Collectives run on gloo.

    from moa_megatron import host
    host.install()                     # before the first `import megatron`
    argv += host.HOST_ARGS             # if host.active()
    ...
    host.shutdown()
"""

import logging
import sys

import torch

from moa_megatron.host import modules, redirect

__all__ = ["HOST_ARGS", "active", "install", "shutdown"]

logger = logging.getLogger(__name__)

HOST_ARGS: list[str] = [
    "--distributed-backend",
    "gloo",
    "--transformer-impl",
    "local",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
]
"""Megatron arguments which a host run needs; each names a CUDA extension that it must not use."""

_HIDDEN = ("transformer_engine", "transformer_engine_torch", "apex")
_installed = False


def active() -> bool:
    """Whether host mode is installed in this process."""
    return _installed


def install(force: bool = False) -> bool:
    """Redirect CUDA to the CPU, unless a CUDA device is there; True when host mode is on.

    Must run before anything imports Megatron, whose modules bind decorators, norms and backends
    at import. `force` installs it on a machine which does have a device.
    """
    global _installed
    if _installed:
        return True
    if torch.cuda.is_available() and not force:
        return False
    early = sorted(n for n in ("megatron", *_HIDDEN) if sys.modules.get(n) is not None)
    if early:
        raise RuntimeError(
            f"host mode must be installed before {', '.join(early)} is imported: "
            "call moa_megatron.host.install() first"
        )
    # A None entry makes `import` raise and `find_spec` answer None. With Transformer Engine in
    # sight, Megatron would pick its CUDA-only norms and optimizers even for local specs.
    for name in _HIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]
    redirect.install()
    modules.install()
    _installed = True
    logger.info("no CUDA device: Megatron runs on the host CPU with gloo")
    return True


def shutdown(barrier: bool = True) -> None:
    """Leave torch.distributed in order; Megatron never does.

    gloo's threads otherwise abort some runs at interpreter exit, after training has succeeded.
    Pass `barrier=False` on an error path, where the other ranks may not arrive.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if barrier:
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
