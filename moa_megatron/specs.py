"""``with_moa``: exchanges the feedforward modules of a Megatron layer specification.

The only place where MoA enters a model. It rebuilds what it changes and shares the rest, because
upstream's specs are module-level singletons and builders mutate them.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from megatron.core.models.gpt import moe_module_specs
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from moa_megatron import layers
from moa_megatron.config import MoAConfig
from moa_megatron.experts import MoALayer, build_experts, build_shared_experts
from moa_megatron.mlp import MoAMLP

# What stands in a specification instead, and which flag put it there.
_CURES = {
    "TEFusedMLP": "leave --use-transformer-engine-op-fuser out",
    "TEFusedMLPWithGroupedLinear": "leave --use-grouped-gemm-for-dense-mlp out",
    "FusedSharedExpertMLP": "leave --use-grouped-gemm-for-shared-expert out",
    "InferenceGroupedMLP": "train with --transformer-impl transformer_engine or local",
}


def with_moa(spec: Any, config: MoAConfig, moe_norm_has_dense_name: bool = False) -> Any:
    """A copy of ``spec`` whose feedforward modules are MoA's.

    Args:
        spec: a ModuleSpec or a block of layers, as Megatron's spec functions return them.
        config: settings of the method; ``mixing='fixed'`` returns ``spec`` itself.
        moe_norm_has_dense_name: how the checkpoint to load names a norm, see ``layers``.

    Returns:
        A specification of the same kind; a block without layers comes back as it is.

    Raises:
        ValueError: when the spec holds a feedforward module that MoA cannot replace, or none.
    """
    if config.mixing == "fixed" or getattr(spec, "layer_specs", None) == []:
        return spec  # a pipeline stage may have no layers at all
    walker = _Walker(config, moe_norm_has_dense_name)
    result = walker.visit(spec)
    if not walker.swaps:
        raise ValueError(
            f"with_moa: no feedforward module in {type(spec).__name__}; pass the specification of "
            "a whole layer or block"
        )
    return result


class _Walker:
    """One walk over a spec tree; a node met twice is rebuilt once."""

    def __init__(self, config: MoAConfig, moe_norm_has_dense_name: bool) -> None:
        self.config = config
        self.moe_norm_has_dense_name = moe_norm_has_dense_name
        self.swaps = 0
        self._done: dict[int, tuple[Any, Any]] = {}

    def visit(self, node: Any) -> Any:
        if id(node) not in self._done:
            # The node is kept beside its copy, so that its id is not used again.
            self._done[id(node)] = (node, self._rebuild(node))
        return self._done[id(node)][1]

    def _rebuild(self, node: Any) -> Any:
        if isinstance(node, partial):
            return self._exchange(node)
        if isinstance(node, ModuleSpec):
            if node.module is MLP:
                params = {"submodules": node.submodules, **node.params}
                return self._exchange(partial(MLP.as_mlp_submodule, **params))
            _refuse_unknown(node.module)
            submodules = self.visit(node.submodules)
            if submodules is node.submodules:
                return node
            return ModuleSpec(node.module, node.params, submodules, node.metainfo)
        if isinstance(node, list):
            items = [self.visit(item) for item in node]
            return node if all(a is b for a, b in zip(items, node, strict=True)) else items
        if isinstance(node, TransformerLayerSubmodules):
            return self._replace_fields(layers.prepare(node, self.moe_norm_has_dense_name))
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            return self._replace_fields(node)
        _refuse_unknown(node)
        return node

    def _replace_fields(self, node: Any) -> Any:
        changed = {}
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            rebuilt = self.visit(value)
            if rebuilt is not value:
                changed[field.name] = rebuilt
        return dataclasses.replace(node, **changed) if changed else node

    def _exchange(self, node: partial[Any]) -> Any:
        function, owner = node.func, getattr(node.func, "__self__", None)
        if owner is MLP and function.__name__ == "as_mlp_submodule":
            fc1 = getattr(node.keywords.get("submodules"), "linear_fc1", None)
            if layers.holds_norm(fc1):
                raise layers.refuse_norm_in_fc1(getattr(fc1, "__name__", str(fc1)))
            return self._swap(node, MoAMLP.as_mlp_submodule)
        if function is SequentialMLP:
            return self._swap(node, build_experts)
        if function is TEGroupedMLP:
            # Imported where it is used: it needs Transformer Engine's grouped linear layers.
            from moa_megatron.grouped import MoATEGroupedMLP

            return self._swap(node, MoATEGroupedMLP)
        if function is moe_module_specs._build_shared_experts:
            return self._swap(node, build_shared_experts)
        if function is MoELayer:
            submodules = self.visit(node.keywords["submodules"])
            keywords = {**node.keywords, "submodules": submodules, "moa": self.config}
            return partial(MoALayer, *node.args, **keywords)
        _refuse_unknown(owner if isinstance(owner, type) else function)
        return node

    def _swap(self, node: partial[Any], build: Any) -> Any:
        self.swaps += 1
        return partial(build, *node.args, **node.keywords, moa=self.config)


def _refuse_unknown(kind: Any) -> None:
    """Feedforward modules that would keep their fixed activation must not pass unnoticed."""
    if not isinstance(kind, type):
        return
    name = kind.__name__
    known_base = issubclass(kind, (MLP, MoELayer, SequentialMLP, TEGroupedMLP))
    if known_base or ("MLP" in name and not name.endswith(("Layer", "Submodules"))):
        cure = _CURES.get(
            name, "build the spec without it (docs/megatron.md lists what is replaced)"
        )
        raise ValueError(
            f"with_moa: {name} is a feedforward module that MoA does not replace; {cure}, or use "
            "--moa-mixing fixed"
        )
