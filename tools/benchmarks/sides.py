"""Ways to run a recipe that should train alike: number formats, modules, recomputation.

``tools/check_numerics.py`` holds their losses against each other, ``tools/bench.py --step`` their
speed and memory.
"""

from __future__ import annotations

from dataclasses import dataclass

BF16 = ("--set", "bf16=true")
_FP8 = (*BF16, "--fp8-recipe")
_SELECTIVE = (*BF16, "--recompute-granularity", "selective", "--recompute-modules")
_UNIFORM = ("--recompute-method", "uniform", "--recompute-num-layers", "1")
# The same operations again; bfloat16 for float32; eight bits, or sums in another order, after which
# tokens near a tie choose other experts (tiny-moe, 200 steps: 0.6 %, docs/results).
_SAME, _FORMAT, OTHER = 1e-3, 5e-3, 1e-2
# What a side may need. Without it a run would be refused, or be the same as the one it is held
# against.
NEEDS = {
    "experts": "a recipe with experts",
    "dense": "a recipe without experts",
    "engine": "Transformer Engine on a GPU",
    "apex": "Apex's fused_weight_gradient_mlp_cuda on a GPU",
    "mxfp8": "a GPU of compute capability 10 or later",
}


@dataclass(frozen=True)
class Side:
    """One way to run a recipe.

    Args:
        flags: of the entry point.
        against: the side whose loss it is held against; None: it is there for its speed.
        bound: largest relative difference of the training loss at the end.
        needs: of ``NEEDS``.
    """

    flags: tuple[str, ...]
    against: str | None = None
    bound: float = 0.0
    needs: tuple[str, ...] = ()


def _bf16(*flags: str, needs: tuple[str, ...] = (), bound: float = OTHER) -> Side:
    return Side((*BF16, *flags), "bf16", bound, needs)


def _recompute(module: str, *needs: str) -> Side:
    return Side((*_SELECTIVE, module), "bf16", _SAME, needs)


def _fp8(recipe: str, form: str, *flags: str, needs: tuple[str, ...] = ()) -> Side:
    words = (*_FP8, recipe, "--fp8-format", form, *flags)
    return Side(words, "bf16", OTHER, ("engine", *needs))


SIDES: dict[str, Side] = {
    "fp32": Side(("--set", "bf16=false")),
    "bf16": Side(BF16, "fp32", _FORMAT),
    # The same numerics from weights 0.01 % larger: what chance does.
    "twin": _bf16("--init-method-std", "0.020002"),
    "sequential": _bf16("--set", "moe_grouped_gemm=false", needs=("experts", "engine")),
    "grouped": _bf16("--moe-grouped-gemm", needs=("experts",)),
    "local": _bf16("--transformer-impl", "local", needs=("engine",)),
    "local-grouped": _bf16(
        *("--transformer-impl", "local", "--moe-grouped-gemm"), needs=("experts", "engine")
    ),
    "recompute-full": _bf16("--recompute-granularity", "full", *_UNIFORM, bound=_SAME),
    "recompute-mlp": _recompute("mlp", "dense"),
    "recompute-moe": _recompute("moe", "experts"),
    "recompute-moe-act": Side(
        (*_SELECTIVE, "moe_act", "--moe-grouped-gemm"), "grouped", _SAME, ("experts",)
    ),
    "distributed-optimizer": _bf16(
        *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    ),
    "no-fusion": _bf16("--no-gradient-accumulation-fusion", needs=("apex",)),
    "cuda-graphs": _bf16("--cuda-graph-impl", "transformer_engine", needs=("engine", "dense")),
    "fp8-delayed": _fp8("delayed", "hybrid"),
    "fp8-tensorwise": _fp8("tensorwise", "hybrid"),
    "fp8-blockwise": _fp8("blockwise", "e4m3"),
    "fp8-mxfp8": _fp8("mxfp8", "e4m3", needs=("mxfp8",)),
    "fp8-params": _fp8("tensorwise", "hybrid", "--fp8-param-gather", "--use-distributed-optimizer"),
    # For their speed: the recipe as it is, its baseline, gates of experts.
    "moa": Side(("--moa-mixing", "moa")),
    "fixed": Side(("--moa-mixing", "fixed")),
    "fixed-fp8": Side(
        (*_fp8("tensorwise", "hybrid").flags, "--moa-mixing", "fixed"), needs=("engine",)
    ),
    "expert-gates": Side(("--moa-gate-scope", "expert"), needs=("experts",)),
}


def suited(experts: bool, available: frozenset[str]) -> list[str]:
    """Names of the sides that are compared, for a recipe and a machine.

    Args:
        experts: whether the recipe has any.
        available: of ``NEEDS``, what the machine has.
    """
    return [name for name in SIDES if _compared(name) and not lacks(name, experts, available)]


def lacks(name: str, experts: bool, available: frozenset[str]) -> list[str]:
    """What a side needs and neither recipe nor machine has, in words; arguments of ``suited``."""
    have = available | {"experts" if experts else "dense"}
    return [NEEDS[need] for need in SIDES[name].needs if need not in have]


def _compared(name: str) -> bool:
    return SIDES[name].against is not None or any(s.against == name for s in SIDES.values())


def closed(names: list[str]) -> list[str]:
    """``names`` in the order of the table, with the sides that they are held against."""
    wanted = set(names)
    for name in reversed(SIDES):  # a side's reference comes before it
        against = SIDES[name].against
        if name in wanted and against is not None:
            wanted.add(against)
    return [name for name in SIDES if name in wanted]
