"""What a launcher must know of a run before Megatron can be imported.

    python -m moa_megatron.outline moe-2b --tensor-model-parallel-size 2

A login node has neither torch nor a GPU: recipe and flags are read as they stand, without
Megatron's parser. Printed: CUDA_DEVICE_MAX_CONNECTIONS for this run, or nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import yaml

from moa_megatron import budget, recipes

# Sizes that Megatron's parser would fill in.
_DEFAULTS: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "sequence_parallel": False,
    "num_layers": None,
    "hidden_size": None,
    "ffn_hidden_size": None,
    "num_attention_heads": None,
    "group_query_attention": False,
    "num_query_groups": 1,
    "kv_channels": None,
    "seq_length": 0,
    "micro_batch_size": None,
    "global_batch_size": None,
    "eval_global_batch_size": None,
    "eval_micro_batch_size": None,
    "num_experts": None,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_layer_freq": 1,
    "hybrid_layer_pattern": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "train_iters": None,
    "lr_decay_iters": None,
    "lr_warmup_iters": 0,
    "rampup_batch_size": None,
    "moa_align": 1,
    "tokens": None,
    "epochs": None,
}


def outline(recipe: str, flags: list[str]) -> dict[str, Any]:
    """Recipe values with the flags' over them; a switch is True, several values are a list.

    Raises:
        RefusedError: unknown recipe, or a malformed ``--set``.
    """
    stated = recipes.load(recipe)
    values = {**_DEFAULTS, **stated}
    asked: dict[str, Any] = {}
    words = list(flags)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            continue
        key, separator, text = word[2:].partition("=")
        following = [text] if separator else []
        while not separator and words and not words[0].startswith("--"):
            following.append(words.pop(0))
        if key == "set":
            asked.update(recipes.parse_setting(item) for item in following)
        else:
            asked[key.replace("-", "_")] = _value(following)
    values.update(asked)
    if values["tokens"] is not None or values["epochs"] is not None:
        # Parameters and images are counted later; no launcher checks the number of steps.
        values.update(train_iters=None, lr_warmup_iters=0)
    elif isinstance(values["train_iters"], int):
        values.update(budget.scaled(stated, values["train_iters"], asked))
    return values


def _value(words: list[str]) -> Any:
    if not words:
        return True
    read = [_read(word) for word in words]
    return read if len(read) > 1 else read[0]


def _read(word: str) -> Any:
    for kind in (int, float):  # YAML takes 1e-3 for a text
        try:
            return kind(word)
        except ValueError:
            continue
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:  # a layer pattern such as *-*-
        return word


def device_connections(values: dict[str, Any]) -> int | None:
    """CUDA_DEVICE_MAX_CONNECTIONS that the overlaps of a run rely on; None: leave it alone.

    Source: Megatron-core's ``validate_args``, which asserts 1 for tensor and context parallelism
    before Blackwell and forbids it for FSDP; 32 is its advice for expert overlap.
    """
    if values.get("overlap_moe_expert_parallel_comm"):
        return 32
    if values.get("use_megatron_fsdp") or values.get("use_torch_fsdp2"):
        return None
    split = max(values["tensor_model_parallel_size"], values["context_parallel_size"])
    return 1 if split > 1 else None


def main() -> int:
    """Prints what the environment needs; refusals are left to the command itself."""
    try:
        connections = device_connections(outline(sys.argv[1], sys.argv[2:]))
    except (recipes.RefusedError, IndexError, TypeError):
        return 0
    if connections is not None:
        print(connections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
