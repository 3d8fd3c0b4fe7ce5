"""DistributedOptimizer saves with torch's Adam, or in float32, but cannot load what it saved."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from moa_megatron.patches._registry import Patch

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def _has_torch_adam(optimizer: Any) -> bool:
    """Not so where Transformer Engine or Apex brings its own, also inside of an offloaded one."""
    from megatron.core.optimizer import distrib_optimizer

    return isinstance(optimizer, torch.optim.Adam) and not distrib_optimizer.HAVE_APEX_OR_TE


def _fill_fresh_state(optimizer: torch.optim.Optimizer) -> None:
    """What torch's Adam itself puts there at its first step."""
    if optimizer.state or not _has_torch_adam(optimizer):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0, dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def _make_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream reads the step from the parameters' state, which is empty until the first step."""

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        _fill_fresh_state(self.optimizer)
        return original(self)

    return state_dict


def _make_set_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream takes torch's `step` for a sharded tensor: it is missing from one format and stale
    in the other. Parameters that require a gradient are written in place."""

    @functools.wraps(original)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # Upstream passes over entries that are not tensors.
        stale = {"step": None} if _has_torch_adam(self.optimizer) else {}
        with torch.no_grad():
            original(self, model_param, {**tensors, **stale})

    return set_states


def _make_load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream gives all parameters one `step` tensor, which torch's Adam then advances once for
    each of them: the bias correction of a resumed run is off."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original(self, state_dict)
        if _has_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load_state_dict


PATCH = Patch(
    name="distributed_optimizer",
    defect="--use-distributed-optimizer cannot resume without Transformer Engine, nor in float32",
    versions=">=0.19,<0.20",
    replace={
        f"{_OPTIMIZER}.state_dict": _make_state_dict,
        f"{_OPTIMIZER}._set_main_param_and_optimizer_states": _make_set_states,
        f"{_OPTIMIZER}.load_state_dict": _make_load_state_dict,
    },
    pins={
        f"{_OPTIMIZER}.state_dict": "fe621ae6a622b587",
        f"{_OPTIMIZER}._set_main_param_and_optimizer_states": "40cab784659711a8",
        f"{_OPTIMIZER}.load_state_dict": "7e5f988b86b48501",
    },
)
