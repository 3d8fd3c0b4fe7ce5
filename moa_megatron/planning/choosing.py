"""Every legal layout with its best settings, in the order in which to take them.

Structure is judged by ``layout.problems``, the rules that refuse a run; bytes and FLOPs by
``costs``; what is policy by ``policy.advice``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moa_megatron import costs, derive, flags, layout
from moa_megatron.costs.memory import Memory
from moa_megatron.costs.parameters import layer_patterns
from moa_megatron.layout import Layout
from moa_megatron.planning.model import Cluster, Model, padded
from moa_megatron.planning.policy import LONG_SEQUENCE, advice, step_seconds

RECOMPUTE = ("none", "selective", "full")
_SIZES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
}
_VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")


@dataclass(frozen=True)
class Choice:
    """A layout with its settings, and what it costs.

    Args:
        args: Megatron's namespace at this layout.
        recompute: one of ``RECOMPUTE``, or ``given`` for the user's own flags.
        sharded: ``--use-distributed-optimizer``.
        virtual: blocks of a virtual pipeline stage, or None.
        seconds: predicted time of a step.
    """

    layout: Layout
    args: argparse.Namespace
    recompute: str
    sharded: bool
    virtual: int | None
    memory: Memory
    seconds: float
    advice: tuple[str, ...]

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch."""
        return int(self.args.micro_batch_size)

    def flags(self, given: Iterable[str], micro_batch: int) -> list[str]:
        """Flags of Megatron that make the choice, without those that the user has given.

        Args:
            given: names of the user's arguments.
            micro_batch: what the recipe says.
        """
        found = self.layout.flags()
        if self.virtual:
            found.append(f"--num-layers-per-virtual-pipeline-stage={self.virtual}")
        if self.micro_batch != micro_batch:
            found.append(f"--micro-batch-size={self.micro_batch}")
        if self.sharded:
            found.append("--use-distributed-optimizer")
        if self.recompute == "selective":
            modules = self.args.recompute_modules
            found += ["--recompute-granularity=selective", "--recompute-modules", *modules]
        if self.recompute == "full":
            found += ["--recompute-granularity=full", "--recompute-method=uniform"]
            found.append(f"--recompute-num-layers={self.args.recompute_num_layers}")
        names = {name.replace("_", "-") for name in given}
        return [flag for flag in found if flag.lstrip("-").partition("=")[0] not in names]


def choices(model: Model, cluster: Cluster) -> tuple[list[Choice], dict[str, list[str]]]:
    """For each legal layout its best settings, best first; and illegal layouts with the reasons.

    Order: what fits; no advice against it; least model parallelism; least expert parallelism;
    without recomputation; the largest micro-batch.
    """
    found, refused = [], {}
    for candidate, args, virtual in _layouts(model, cluster):
        legal, problems = [], []
        for micro in _micro_batches(model):
            args.micro_batch_size = micro
            problems = layout.problems(args)
            legal += [] if problems else [micro]
        if not legal:
            # Those of the smallest micro-batch, which divides what any other does.
            refused[str(candidate)] = problems
            continue
        settings = itertools.product(legal, *_settings(model, candidate, args))
        tried = (_choice(model, cluster, candidate, args, virtual, *one) for one in settings)
        found.append(min(tried, key=lambda choice: _order(choice, cluster)))
    return sorted(found, key=lambda choice: _order(choice, cluster)), refused


def fits(choice: Choice, cluster: Cluster) -> bool:
    """Whether the fullest rank has enough memory, margins included."""
    return choice.memory.total <= cluster.gpu.memory


def _order(choice: Choice, cluster: Cluster) -> tuple[Any, ...]:
    place = choice.layout
    level = RECOMPUTE.index(choice.recompute) if choice.recompute in RECOMPUTE else 0
    fit = fits(choice, cluster)
    return (
        not fit,
        0 if fit else choice.memory.total,
        len(choice.advice),
        place.tp * place.pp * place.cp,
        place.ep,
        place.cp,
        place.pp,
        level,
        choice.sharded and choice.args.optimizer == "muon",
        place.vpp,
        place.etp != place.tp,
        -choice.micro_batch,
    )


def _layouts(
    model: Model, cluster: Cluster
) -> Iterator[tuple[Layout, argparse.Namespace, int | None]]:
    """Sizes worth a look that make up the cluster, each with its arguments."""
    args, gpus = model.args, cluster.gpus
    fixed = {short: getattr(args, name) for name, short in _SIZES.items() if name in model.given}
    blocks = "".join(layer_patterns(args)[0].split("|")).count("*")
    options = {
        "tp": _divisors(min(gpus, cluster.gpus_per_node)),
        "pp": [n for n in _divisors(gpus) if n <= blocks],
        "cp": _divisors(gpus) if args.seq_length >= LONG_SEQUENCE else [1],
        "ep": [n for n in _divisors(args.num_experts or 1) if n <= gpus],
    }
    options.update({name: [size] for name, size in fixed.items() if name != "etp"})
    for tp, pp, cp, ep in itertools.product(*options.values()):
        if gpus % (tp * pp * cp):
            continue
        etps = {tp, 1} if args.num_experts and "etp" not in fixed else {fixed.get("etp") or tp}
        own = any(name in model.given for name in _VIRTUAL) or "|" in layer_patterns(args)[0]
        vpps = [1, 2] if pp > 1 and not own and blocks % (2 * pp) == 0 else [1]
        for etp, vpp in itertools.product(sorted(etps), vpps):
            sizes = Layout(tp, pp, vpp, cp, ep, etp, gpus // (tp * pp * cp))
            yield _at(args, sizes, blocks // (vpp * pp) if vpp > 1 else None)


def _at(
    args: argparse.Namespace, sizes: Layout, virtual: int | None
) -> tuple[Layout, argparse.Namespace, int | None]:
    """The arguments at a layout, with what Megatron derives from it."""
    placed = argparse.Namespace(**vars(args))
    for name, short in _SIZES.items():
        setattr(placed, name, getattr(sizes, short))
    placed.world_size = sizes.world_size
    placed.sequence_parallel = sizes.tp > 1
    placed.padded_vocab_size = padded(args, sizes.tp)
    if virtual is not None:
        placed.num_layers_per_virtual_pipeline_stage = virtual
        derive.pattern(placed)
    segments = layer_patterns(placed)[0].count("|") + 1
    if segments > sizes.pp and segments % sizes.pp == 0:
        sizes = dataclasses.replace(sizes, vpp=segments // sizes.pp)
    return sizes, placed, virtual


def _micro_batches(model: Model) -> list[int]:
    """The recipe's, and its halves."""
    size = model.args.micro_batch_size
    if "micro_batch_size" in model.given:
        return [size]
    return [size // n for n in (1, 2, 4, 8, 16, 32) if size % n == 0]


def _settings(
    model: Model, place: Layout, placed: argparse.Namespace
) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Recomputation and sharded optimiser: what the recipe says, then what needs less memory."""
    args = model.args
    own = {"recompute_granularity", "recompute_activations"} & model.given
    levels = ("given",) if own or args.recompute_granularity else RECOMPUTE
    if args.use_distributed_optimizer:
        return levels, (True,)
    cut = argparse.Namespace(**{**vars(placed), "use_distributed_optimizer": True})
    if place.dp * place.cp == 1 or flags.layer_wise_problems(cut, model.moa):
        return levels, (False,)
    # Cutting Adam's state costs nothing: its two exchanges move what the one sum moves.
    return levels, (True,) if args.optimizer == "adam" else (False, True)


def _choice(
    model: Model,
    cluster: Cluster,
    place: Layout,
    placed: argparse.Namespace,
    virtual: int | None,
    micro: int,
    recompute: str,
    sharded: bool,
) -> Choice:
    args = argparse.Namespace(**vars(placed))
    args.micro_batch_size, args.use_distributed_optimizer = micro, sharded
    if recompute in ("selective", "full"):
        args.recompute_granularity = recompute
        args.recompute_method, args.recompute_num_layers = "uniform", 1
        kinds = "".join(layer_patterns(args))
        modules = (("mlp", "-"), ("moe", "E"))
        args.recompute_modules = [module for module, kind in modules if kind in kinds]
    memory = costs.memory(args, model.moa, place, model.modules)
    seconds = step_seconds(model, cluster, place, args)
    return Choice(
        place, args, recompute, sharded, virtual, memory, seconds, advice(args, place, cluster)
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
