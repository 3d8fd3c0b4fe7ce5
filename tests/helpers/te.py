"""Transformer Engine on a CPU: its classes import and build, forwards need a GPU.

The overlay is a tree of the packages that torch and this project leave out; its README says how to
make one. Host mode hides Transformer Engine, so these tests run in processes of their own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.isolated import ROOT

FOLDER = ROOT.parent / "shared" / "te"
ARCHIVE = "overlay-sm90.tar.xz"
NEEDED = ("onnxscript", "einops", "zipp")
TORCH = "2.11.0"


class Missing(Exception):
    """What these tests need and this machine lacks, with the way to get it."""


def environment() -> dict[str, str]:
    """Variables under which a process finds Transformer Engine.

    Raises:
        Missing: the overlay, a C compiler, or a package is not there.
    """
    import torch

    archive = Path(os.environ.get("MOA_TE_OVERLAY") or FOLDER / ARCHIVE)
    if not archive.is_file():
        raise Missing(f"no {archive}: put {ARCHIVE} there, or its path into MOA_TE_OVERLAY")
    if not torch.__version__.startswith(TORCH):
        raise Missing(f"torch {torch.__version__}: the overlay is built for {TORCH}")
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise Missing(f"packages {', '.join(absent)}: pip install {' '.join(NEEDED)}")
    source = archive.parent / "libcuda_stub.c"
    if not source.is_file():
        raise Missing(f"no {source}: it stands beside the overlay's archive")
    overlay = _unpacked(archive)
    paths = {"PYTHONPATH": overlay, "LD_LIBRARY_PATH": _stub(source, overlay.parent)}
    return {
        name: os.pathsep.join([str(path), *filter(None, [os.environ.get(name)])])
        for name, path in paths.items()
    }


def _unpacked(archive: Path) -> Path:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moa_megatron"
    folder = cache / f"te-{digest}" / "overlay"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=folder.parent)
    with tarfile.open(archive) as content:
        content.extractall(scratch, filter="data")
    _publish(Path(scratch), folder)
    return folder


def _stub(source: Path, folder: Path) -> Path:
    """The folder of a libcuda.so.1 that Transformer Engine can link against without a driver."""
    stub = folder / "stub"
    if stub.is_dir():
        return stub
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Missing("a C compiler: install gcc")
    scratch = Path(tempfile.mkdtemp(dir=folder))
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(scratch / "libcuda.so.1")]
    subprocess.run([compiler, *options, str(source)], check=True)
    _publish(scratch, stub)
    return stub


def _publish(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(scratch)


def start() -> None:
    """Process groups of one rank, and a CUDA device that is the CPU; before Megatron's import."""
    import torch

    from moa_megatron.host import redirect

    if torch.distributed.is_initialized():
        return
    redirect.install()
    torch.cuda.is_available = lambda: True  # Transformer Engine asks before it builds a module
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)


def config(**changes: Any) -> Any:
    """A TransformerConfig of two tiny layers."""
    import torch
    import torch.nn.functional as F
    from megatron.core.transformer import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "params_dtype": torch.bfloat16,
        "bf16": True,
    }
    return TransformerConfig(**{**values, **changes})


def moe_config(**changes: Any) -> Any:
    """The same with four experts and a shared one."""
    moe: dict[str, Any] = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "moe_token_dispatcher_type": "alltoall",
    }
    return config(**{**moe, **changes})


def gpt(settings: Any, spec: Any, mtp: Any = None) -> Any:
    """A GPTModel of one rank."""
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        settings,
        spec,
        vocab_size=64,
        max_sequence_length=16,
        position_embedding_type="rope",
        mtp_block_spec=mtp,
    )


def hybrid(settings: Any, spec: Any, pattern: str) -> Any:
    """A HybridModel of one rank."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    return HybridModel(
        settings,
        spec,
        vocab_size=64,
        max_sequence_length=16,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
    )


def sharded(model: Any) -> dict[str, Any]:
    """The model's sharded state dict."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": group})  # type: ignore[no-any-return]


def saved_names(model: Any) -> set[str]:
    """Names in the model's checkpoints, without entries for quantisation state."""
    return {v.key for v in sharded(model).values() if not v.key.endswith("_extra_state")}


def saved_states(model: Any) -> set[str]:
    """The entries for quantisation state alone."""
    return {v.key for v in sharded(model).values() if v.key.endswith("_extra_state")}
