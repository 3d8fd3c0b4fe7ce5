"""One run, from checked arguments to results: what lies between a command and its exit code."""

from __future__ import annotations

import argparse
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.enums import ModelType
from megatron.training import get_tensorboard_writer
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import validate_args
from megatron.training.global_vars import get_signal_handler, set_global_variables
from megatron.training.training import pretrain
from megatron.training.vocab_utils import calculate_padded_vocab_size
from tokenizers import Tokenizer
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moa_megatron import (
    arguments,
    batches,
    budget,
    checkpoints,
    costs,
    host,
    identity,
    layer_statistics,
    models,
    preflight,
    profiling,
    runstate,
    stopping,
    summary,
    telemetry,
)
from moa_megatron.config import MoAConfig
from moa_megatron.data import corpus
from moa_megatron.op import build as build_mixture
from moa_megatron.op import resolve_backend
from moa_megatron.recipes import CommandLine, RefusedError


@dataclass
class Run:
    """A run whose arguments Megatron has accepted."""

    args: argparse.Namespace
    moa: MoAConfig
    config: Any
    folder: Path
    data: str

    def train(self) -> None:
        """Builds and trains; returns after the last step, raises SystemExit on an early stop."""
        self.args.exit_signal_handler = True
        set_global_variables(self.args, build_tokenizer=self.args.moa_model != "mae")
        stopping.bind(self.args, get_signal_handler())
        if self.args.save and self.args.ckpt_format == "torch_dist":
            # The first save would start it, perhaps in the very moment of a signal.
            stopping.start_shielded(get_write_results_queue)
        batches.set_model_config(self.config.transformer)
        layer_statistics.install(self.config.transformer, self.moa, self.args.moa_log_interval)
        container = pretrain_cfg_container_from_args(self.args, self.config)
        # A single process needs no launcher, so no rendezvous address either.
        store = HashStore() if self.args.world_size == 1 else None
        try:
            datasets, forward_step, others = self._entry()
            pretrain(
                container,
                datasets,
                ModelType.encoder_or_decoder,
                forward_step,
                store=store,
                **others,
            )
        finally:
            writer = get_tensorboard_writer()
            if writer is not None:
                writer.flush()

    def _entry(self) -> tuple[Any, Any, dict[str, Any]]:
        """Data, forward step and what else Megatron's ``pretrain`` takes, of this kind of model."""
        if self.args.moa_model != "mae":
            ranks = {"get_embedding_ranks": batches.embedding_ranks}
            return batches.datasets_provider, batches.forward_step, ranks
        from moa_megatron.vision import reconstruction, training

        pictures = {"non_loss_data_func": reconstruction.drawing(self.args, self.folder)}
        return training.datasets_provider, training.forward_step, pictures

    def build_kernels(self) -> float:
        """Builds what the mixture needs before the first step; seconds, 0 where it is at hand."""
        if self.moa.mixing == "fixed":
            return 0.0
        return build_mixture(self.moa, _device(), self.args.params_dtype)

    def step(self) -> int:
        """Steps begun in this process and before it: all trained, unless training failed."""
        begun = int(getattr(self.args, "curr_iteration", -1)) + 1
        return max(begun, int(getattr(self.args, "iteration", 0)))

    def saved_step(self) -> int | None:
        """Step of the newest complete checkpoint of this run."""
        try:
            return runstate.checkpoint_step(Path(self.args.save)) if self.args.save else None
        except ValueError:
            return None

    @property
    def loss_unit(self) -> str:
        """What the loss is measured in."""
        return "squared error" if self.args.moa_model == "mae" else telemetry.NATS

    def progress(self) -> dict[str, Any]:
        """Facts for status.json that are at hand: steps, checkpoint, folders."""
        args = self.args
        facts: dict[str, Any] = {"train_iters": args.train_iters, "loss_unit": self.loss_unit}
        if hasattr(args, "moa_corpus_sha256"):
            facts["corpus_sha256"] = args.moa_corpus_sha256
        if args.moa_model == "mae":
            from moa_megatron.vision import reconstruction, training

            facts["input_wait"] = training.input_wait.fraction
            facts["reconstruction"] = reconstruction.newest(self.folder)
        saved = self.saved_step()
        if saved is not None:
            facts["checkpoint"] = str(Path(args.save) / f"iter_{saved:07d}")
        if args.tensorboard_dir is not None:
            facts["tensorboard"] = args.tensorboard_dir
        return facts

    def losses(self) -> dict[str, float]:
        """The last training, validation and test loss that TensorBoard holds."""
        if self.args.tensorboard_dir is None:
            return {}
        tested = bool(getattr(self.args, "do_test", False))
        curves = telemetry.read_run(Path(self.args.tensorboard_dir), tested)
        tags = {
            "loss": telemetry.TRAIN_LOSS,
            "validation_loss": telemetry.VALID_LOSS,
            "test_loss": telemetry.TEST_LOSS,
        }
        return {key: curves[tag].values[-1] for key, tag in tags.items() if tag in curves}

    def draw(self) -> Path | None:
        """The picture of the run's curves, or None where it logged none."""
        if self.args.tensorboard_dir is None:
            return None
        tested = bool(getattr(self.args, "do_test", False))
        curves = telemetry.read_run(Path(self.args.tensorboard_dir), tested)
        if not curves:
            return None
        picture = self.folder / "curves.png"
        title = f"{self.args.moa_recipe}, {summary.describe(self.moa)}"
        telemetry.draw_losses({"": curves}, title, picture, unit=self.loss_unit)
        return picture

    def summary(self) -> list[str]:
        """The readable start."""
        return summary.lines(self.args, self.moa, self.data, self.folder)


def prepare(command: CommandLine, extra_flags: list[str], mends_index: bool = False) -> Run:
    """Arguments, data, model configuration and checks of a run; creates nothing in its folder.

    With `mends_index` the caller builds dataset indices, so damaged ones are no obstacle.

    Raises:
        RefusedError: with every violation that was found.
    """
    parsed = arguments.parse(command, extra_flags)
    args, moa = parsed.args, parsed.moa
    if args.tensorboard_dir is None:
        args.tensorboard_dir = str(command.run_dir / "tensorboard")
    data = _choose_data(args, command)
    if args.moa_model != "mae":
        _pad_vocabulary(args, parsed.given)
    count = partial(_parameters_without_gates, args)
    budget.apply(args, parsed.recipe, parsed.given, count)
    # A dry run may stand for another machine.
    has_device = command.dry_run or not host.active()
    problems = preflight.check(args, moa) + profiling.problems(args, has_device)
    _refuse(problems + ([] if mends_index else preflight.index_problems(args)))
    try:
        validate_args(args, {})
        config = models.model_config(args, moa)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise RefusedError(f"Megatron refuses these arguments: {_reason(error)}") from error
    except SystemExit as error:
        raise RefusedError("Megatron refuses these arguments; its reason stands above") from error
    setattr(args, identity.NAME, identity.describe(args))
    _choose_backend(args, moa)
    # Only now are both sides complete: a checkpoint holds what validation has filled in.
    _refuse(checkpoints.problems(args))
    return Run(args, moa, config, command.run_dir, data)


def _parameters_without_gates(args: argparse.Namespace) -> int | None:
    """Total parameters, or None where a size that counts is not set."""
    sizes = ("padded_vocab_size", "hidden_size", "num_attention_heads")
    if any(getattr(args, name) is None for name in sizes):
        return None
    return costs.parameters(args, MoAConfig(mixing="fixed"), args.padded_vocab_size).total


def _choose_backend(args: argparse.Namespace, moa: MoAConfig) -> None:
    """Logs what computes the mixture; refuses a backend that was asked for and cannot run."""
    if moa.mixing == "fixed":
        return
    try:
        resolve_backend(moa.backend, _device(), args.params_dtype)
    except ValueError as error:
        raise RefusedError(str(error).replace("backend=", "--moa-backend ", 1)) from error


def _device() -> str:
    return "cpu" if host.active() else "cuda"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise RefusedError("\n".join(problems))


def _reason(error: BaseException) -> str:
    """The message, or for an assertion without one the condition that failed."""
    if str(error):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} ({frame.name})"


def _choose_data(args: argparse.Namespace, command: CommandLine) -> str:
    """Fills in the embedded corpus where the user named no data; says what is read."""
    if args.moa_model == "mae":
        from moa_megatron.vision import data, settings

        _refuse(settings.problems(args))  # before the images are checked, which takes a while
        return data.choose(args, command.exit_file, command.dry_run)
    if args.mock_data:
        if args.tokenizer_type is None:
            args.tokenizer_type, args.vocab_size = "NullTokenizer", args.vocab_size or 4096
        return "random tokens (--mock-data)"
    try:
        named = preflight.data_prefixes(args)
    except (OSError, ValueError, AttributeError):
        named = ["unreadable"]  # preflight says why
    if named or args.moa_corpus != "stdlib":
        return ", ".join(named)
    if args.tokenizer_type is not None or args.tokenizer_model is not None:
        raise RefusedError(
            "--moa-corpus stdlib brings its own tokenizer: leave --tokenizer-type and "
            "--tokenizer-model out, or prepare data with yours (tools/prepare_data.py)"
        )
    found = corpus.stdlib_corpus(Path(args.moa_cache_dir))
    args.train_data_path = [str(found.train_prefix)]
    args.valid_data_path = [str(found.valid_prefix)]
    args.split = None
    args.tokenizer_type = "HuggingFaceTokenizer"
    args.tokenizer_model = str(found.tokenizer_dir)
    args.vocab_size = max(found.vocab_size, args.vocab_size or 0)
    if args.data_cache_path is None:
        args.data_cache_path = str(found.train_prefix.parent / "index")
    # It varies with the Python patch release, so the run and its checkpoints remember it.
    args.moa_corpus_sha256 = found.sha256
    return f"{found.description}, sha256 {found.sha256[:12]}"


def _pad_vocabulary(args: argparse.Namespace, given: set[str]) -> None:
    """Sizes of the vocabulary, which Megatron would find only when it loads the tokenizer.

    A recipe's size, which keeps the paper's count of parameters, holds for tokenizers up to it.
    """
    if args.tokenizer_model is not None and "vocab_size" not in given:
        file = Path(args.tokenizer_model) / "tokenizer.json"
        if file.is_file():
            size = Tokenizer.from_file(str(file)).get_vocab_size()
            args.vocab_size = max(size, args.vocab_size or 0)
    if args.padded_vocab_size is None and args.vocab_size is not None:
        args.padded_vocab_size = calculate_padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
