"""What a checkpoint would hold of a module."""

from typing import Any


def global_tensors(module: Any, singleton: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's whole tensors, by their names in a checkpoint.

    Args:
        singleton: with Megatron's ``singleton_local_shards``, a name for each expert.
    """
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import apply_factories

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "singleton_local_shards": singleton}
    state = module.sharded_state_dict("", (), metadata)
    apply_factories(state)
    return {piece.key: tuple(piece.global_shape) for piece in _leaves(state)}


def _leaves(node: Any) -> list[Any]:
    if isinstance(node, (dict, list)):
        children = node.values() if isinstance(node, dict) else node
        return [leaf for child in children for leaf in _leaves(child)]
    return [node]
