"""What is planned: a recipe with flags, parsed as training does, and the GPUs that are there."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron.training.vocab_utils import calculate_padded_vocab_size

from moa_megatron import arguments, budget, costs, recipes
from moa_megatron.config import MoAConfig
from moa_megatron.costs.activations import ENGINE, LOCAL, Modules
from moa_megatron.costs.gpus import GPUS, Gpu
from moa_megatron.costs.parameters import layer_patterns
from moa_megatron.recipes import RefusedError

_CORPUS_VOCABULARY = 4096  # of the embedded corpus, whose tokenizer is trained when it is used
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


def read(recipe: str, words: list[str]) -> Model:
    """Parses recipe and flags as training does; needs Megatron to be importable.

    Raises:
        RefusedError: what training would refuse of them, and what cannot be planned.
    """
    command = recipes.parse_command_line([recipe, "--dry-run", *words])
    parsed = arguments.parse(command, [])
    args, moa = parsed.args, parsed.moa
    if args.moa_model == "mae":
        raise RefusedError(
            f"{recipe} is no language model, whose memory and time are planned; try what fits: "
            f"DRY_RUN=1 ./launch/local.sh {recipe} --mock-data counts its parameters"
        )
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
    if not (args.train_iters or args.train_samples or args.tokens):
        problems.append("the length of the run is not known: add --train-iters N")
    if problems:
        raise RefusedError("\n".join(problems))
    args.padded_vocab_size = padded(args, 1)
    fixed = MoAConfig(mixing="fixed")
    budget.apply(
        args,
        parsed.recipe,
        parsed.given,
        lambda: costs.parameters(args, fixed, args.padded_vocab_size).total,
    )
    return Model(recipe, words, args, moa, frozenset(parsed.given))


def padded(args: argparse.Namespace, tp: int) -> int:
    """Rows of the embedding at a tensor-parallel size, as Megatron pads the vocabulary."""
    divisor = args.make_vocab_size_divisible_by
    return int(calculate_padded_vocab_size(args.vocab_size, divisor, tp, logging_enabled=False))
