"""Which layout to train at: every legal one, whether it fits, how long it takes, in what order.

Structure is judged by ``layout.problems``, the rules that refuse a run; bytes and FLOPs by
``costs``. What is policy and not law, ``advice`` says. MFU is measured by the user or assumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moa_megatron import arguments, costs, derive, flags, layout, recipes
from moa_megatron.config import MoAConfig
from moa_megatron.costs.activations import ENGINE, LOCAL, Modules
from moa_megatron.costs.gpus import GPUS, Gpu, assumed_mfu
from moa_megatron.costs.memory import Memory
from moa_megatron.costs.parameters import layer_patterns
from moa_megatron.layout import Layout
from moa_megatron.recipes import RefusedError

LONG_SEQUENCE = 8192
"""Context parallelism splits only longer sequences: below, its exchanges cost more than they save
(advice of Megatron's MoE guide)."""
RECOMPUTE = ("none", "selective", "full")
_CORPUS_VOCABULARY = 4096  # of the embedded corpus, whose tokenizer is trained when it is used
_SIZES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
}
_VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
_OWN_STAGES = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)


@dataclass(frozen=True)
class Model:
    """A recipe with flags, parsed: what is planned, and which settings the user has fixed."""

    recipe: str
    words: list[str]
    args: argparse.Namespace
    moa: MoAConfig
    given: frozenset[str]

    @property
    def modules(self) -> Modules:
        """Transformer Engine's, as training chooses where it can run, unless others are named."""
        named = "transformer_impl" in self.given
        return LOCAL if named and self.args.transformer_impl == "local" else ENGINE

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        samples = (self.args.train_samples or 0) // self.args.global_batch_size
        return int(self.args.train_iters or samples)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.step_tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return int(self.args.global_batch_size * self.args.seq_length)

    def flops(self) -> costs.Flops:
        """FLOPs of a token."""
        return costs.flops(self.args, self.moa, self.args.padded_vocab_size)


@dataclass(frozen=True)
class Cluster:
    """What is there, and the user's measurements: ``mfu`` in (0, 1], ``price`` per GPU-hour."""

    gpus: int
    kind: str
    gpus_per_node: int = 8
    mfu: float | None = None
    price: float | None = None

    @property
    def gpu(self) -> Gpu:
        """Its data sheet."""
        return GPUS[self.kind]


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


def read(recipe: str, words: list[str]) -> Model:
    """Parses recipe and flags as training does; needs Megatron to be importable.

    Raises:
        RefusedError: what training would refuse of them, and what cannot be planned.
    """
    command = recipes.parse_command_line([recipe, "--dry-run", *words])
    args, moa = arguments.parse(command, [])
    named = {flag[2:].partition("=")[0].replace("-", "_") for flag in command.flags}
    given = frozenset(named | {key.replace("-", "_") for key in command.settings})
    problems = []
    layers = "".join(layer_patterns(args))
    special = sorted(set(layers) - set("*-E|"))
    if special:
        problems.append(f"--hybrid-layer-pattern: layers {' '.join(special)} cannot be planned")
    own = [f"--{name.replace('_', '-')}" for name in _OWN_STAGES if getattr(args, name)]
    problems += [f"{flag} cannot be planned: stages are equal here" for flag in own]
    if args.optimizer not in ("adam", "sgd", "muon"):
        problems.append(f"--optimizer {args.optimizer} cannot be planned: use adam, sgd or muon")
    if args.multi_latent_attention:
        problems.append("--multi-latent-attention cannot be planned")
    if args.vocab_size is None and args.moa_corpus == "stdlib":
        args.vocab_size = _CORPUS_VOCABULARY
    if args.vocab_size is None:
        problems.append("the size of the vocabulary is not known: add --vocab-size N")
    if args.global_batch_size is None or args.micro_batch_size is None:
        problems.append("batch sizes are not known: add --micro-batch-size, --global-batch-size")
    if not (args.train_iters or args.train_samples):
        problems.append("the length of the run is not known: add --train-iters N")
    if problems:
        raise RefusedError("\n".join(problems))
    args.padded_vocab_size = _padded(args, 1)
    return Model(recipe, words, args, moa, given)


def _padded(args: argparse.Namespace, tp: int) -> int:
    multiple = args.make_vocab_size_divisible_by * tp
    return int(-(-args.vocab_size // multiple) * multiple)


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
    placed.padded_vocab_size = _padded(args, sizes.tp)
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


def advice(args: argparse.Namespace, place: Layout, cluster: Cluster) -> tuple[str, ...]:
    """Why a legal layout is not a good one: topology and policy."""
    found, node = [], cluster.gpus_per_node
    if place.tp * place.cp > node and place.tp > 1:
        found.append(f"tensor and context parallelism leave the node of {node} GPUs")
    if place.ep * place.etp > node:
        found.append(f"experts are exchanged between nodes: EP x ETP exceeds {node} GPUs")
    if place.cp > 1 and args.seq_length < LONG_SEQUENCE:
        found.append(f"context parallelism for sequences below {LONG_SEQUENCE}")
    if place.pp > 1 and place.world_size <= node:
        found.append("pipeline stages within a node: idle time that tensor parallelism has not")
    return tuple(found)


def step_seconds(model: Model, cluster: Cluster, place: Layout, args: argparse.Namespace) -> float:
    """Predicted time of a step: model FLOPs over peak rate and MFU.

    A measured MFU already holds what its layout costs. To the assumed one are added recomputed
    FLOPs and the idle share of the pipeline, (pp - 1) / (micro-batches x vpp) of a step.
    """
    flops, fp8 = model.flops(), bool(args.fp8)
    work = flops.model * model.step_tokens
    mfu = cluster.mfu
    if mfu is None:
        mfu = assumed_mfu(cluster.gpu, bool(args.num_experts), fp8)
        work *= 1 + recomputed(flops, args) / flops.training
        count = args.global_batch_size // (args.micro_batch_size * place.dp)
        work *= 1 + (place.pp - 1) / (count * place.vpp)
    return float(work / (cluster.gpus * cluster.gpu.peak(fp8) * mfu))


def recomputed(flops: costs.Flops, args: argparse.Namespace) -> float:
    """FLOPs of a token that the backward pass repeats, apart from norms and activations."""
    if args.recompute_granularity == "full":
        return flops.forward - flops.head - flops.prediction
    modules = set(args.recompute_modules or ["core_attn"])
    if args.recompute_granularity != "selective":
        return 0.0
    found = flops.attention if "core_attn" in modules else 0.0
    if modules & {"mlp", "moe"}:
        found += flops.ffn + flops.gates + flops.mixture + flops.router
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
