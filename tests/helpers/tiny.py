"""Tiny models of one rank, on local modules or on Transformer Engine's, and what they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def start() -> None:
    """Process groups of one rank; without host mode, a CUDA device that is the CPU.

    Comes before Megatron's import. Transformer Engine then builds its modules, and runs none.
    """
    import torch

    from moa_megatron import host
    from moa_megatron.host import redirect

    if torch.distributed.is_initialized():
        return
    if not host.active():
        redirect.install()
        torch.cuda.is_available = lambda: True  # Transformer Engine asks before it builds
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


def weights(model: Any) -> dict[str, Any]:
    """Copies of the parameters, by module name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def save(model: Any, folder: Path) -> None:
    """A checkpoint of the model alone."""
    from megatron.core import dist_checkpointing

    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(sharded(model), str(folder))


def load(model: Any, folder: Path) -> None:
    """Reads what `save` wrote, as strictly as Megatron does by default."""
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(sharded(model), str(folder)))
