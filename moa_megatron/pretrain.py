"""Entry point of language-model pretraining.

    python -m moa_megatron.pretrain tiny-moe --run-dir runs/first [flags]

Recipe and flags become Megatron's arguments, the model configuration gets the MoA specification,
and Megatron's own ``pretrain`` does the rest. Exit codes: see ``moa_megatron.runstate``.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# host imports torch, which takes seconds: it waits until signals are heard.
from moa_megatron import console, recipes, runstate, stopping
from moa_megatron.recipes import CommandLine, RefusedError

logger = logging.getLogger(__name__ if __name__ != "__main__" else "moa_megatron.pretrain")
_STARTED = time.time()
_SECONDS_FOR_ALL_TO_REFUSE = 20.0


def main(argv: list[str] | None = None) -> int:
    """Runs one pretraining command; returns its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    words = sys.argv[1:] if argv is None else argv
    # A refusal of the command line itself must reach the launcher, too.
    exit_file = Path(words[words.index("--exit-file") + 1]) if "--exit-file" in words[:-1] else None
    try:
        command = recipes.parse_command_line(words)
        code = _run(command, None if command.help_all else console.install(rank))
    except RefusedError as error:
        return _refused(exit_file, rank, str(error))
    except BaseException as error:
        _record_failure(exit_file, runstate.FAILED, f"{type(error).__name__}: {error}", None)
        raise
    if exit_file is None:
        return code
    clean = code in (runstate.FINISHED, runstate.RETRY)
    if rank == 0 or not clean:
        runstate.first_writer(exit_file, str(code))
    # torchrun makes 1 of every failure and reports it at length: the file carries the code.
    return runstate.FINISHED if clean else code


def _refused(exit_file: Path | None, rank: int, message: str) -> int:
    """Says once what is refused; the exit code of this rank's process.

    Where all ranks refuse, they leave with 0, or torchrun's report would bury the message. Where
    only some do (a node lacks the data, say), they must fail, or the others would wait for them.
    """
    if rank == 0:
        sys.stderr.write(f"refused: {message}\n")
    if exit_file is None:
        return runstate.REFUSED
    _record_failure(exit_file, runstate.REFUSED, f"refused: {message}", None)
    deadline = time.monotonic() + _SECONDS_FOR_ALL_TO_REFUSE
    while runstate.count_failures(exit_file) < int(os.environ.get("WORLD_SIZE", "1")):
        if time.monotonic() > deadline:
            sys.stderr.write(f"refused on rank {rank} of {os.uname().nodename}: {message}\n")
            return runstate.REFUSED
        time.sleep(0.5)
    return runstate.FINISHED


def _run(command: CommandLine, out: console.Console | None) -> int:
    if command.recipe:
        recipes.load(command.recipe)  # a wrong name need not wait for Megatron's import
    if command.exit_file is not None:
        stopping.die_with_parent()
    from moa_megatron import host

    host.install()
    from moa_megatron import patches

    applied = patches.apply()
    logger.info("%d fixes of upstream defects in place (patches/README.md)", len(applied))
    from moa_megatron import launch

    try:
        run = launch.prepare(command, host.HOST_ARGS if host.active() else [])
    except OSError as error:
        if not runstate.is_storage_error(error):
            raise RefusedError(str(error)) from error
        sys.stderr.write(f"storage: {error}\n")
        return runstate.STORAGE
    assert out is not None
    for line in run.summary():
        out.say_on_first_rank(line)
    return runstate.FINISHED if command.dry_run else _train(run, out, command.exit_file)


def _train(run: Any, out: console.Console, exit_file: Path | None) -> int:
    from moa_megatron import host

    args, folder = run.args, run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "logs" / f"rank{args.rank}.log"
        out.open(log, *((1, "images") if args.moa_model == "mae" else (args.seq_length, "tokens")))
    except OSError as error:
        if runstate.is_storage_error(error):
            _record_failure(exit_file, runstate.STORAGE, f"storage: {error}", None)
            sys.stderr.write(f"storage: {error}\n")
            return runstate.STORAGE
        raise RefusedError(f"--run-dir {folder} cannot be written: {error}") from error
    if args.rank == 0:
        runstate.write_status(
            folder, "running", None, recipe=args.moa_recipe, checkpoints=args.save, pid=os.getpid()
        )
    code, problem = runstate.FINISHED, None
    try:
        seconds = run.build_kernels()
        if seconds:
            out.say_on_first_rank(
                f"built the mixture's kernel in {seconds:.1f} s, for later runs too"
            )
        run.train()
    except SystemExit as stop:
        code, problem = _verdict(run, stop)
    except KeyboardInterrupt:
        code, problem = 130, "interrupted"
    except BaseException as error:  # torch's CheckpointException is no Exception
        problem = f"{type(error).__name__}: {error}"
        code = runstate.STORAGE if runstate.is_storage_error(error) else runstate.FAILED
        traceback.print_exc()
    healthy = code in (runstate.FINISHED, runstate.RETRY)
    speaks = args.rank == 0
    if not healthy:
        speaks = _record_failure(exit_file, code, problem or "", run.step())
    if healthy or host.active():
        try:
            host.shutdown(barrier=healthy)
        except Exception:  # a peer is gone; what this rank has done stands
            traceback.print_exc()
    if speaks:
        _report(run, out, code, problem)
    if not healthy and not host.active():
        # NCCL's groups wait for peers that sit in a collective, at exit too; the launcher, which
        # ends those, must hear of this rank now and not at the watchdog's time limit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _record_failure(exit_file: Path | None, code: int, problem: str, step: int | None) -> bool:
    """Tells the launcher which rank failed, when, where and of what; True on the first to do so."""
    if exit_file is None:
        return True
    first = runstate.first_writer(exit_file, str(code))
    runstate.write_failure(exit_file, int(os.environ.get("RANK", "0")), code, problem, step)
    return first


def _verdict(run: Any, stop: SystemExit) -> tuple[int, str | None]:
    """Megatron exits with 0, or with no code, both when it stops early and when it cannot load."""
    if isinstance(stop.code, int) and stop.code != runstate.FINISHED:
        return stop.code, f"Megatron exited with code {stop.code}"
    if isinstance(stop.code, str):
        return runstate.FAILED, stop.code
    step = run.step()
    if step and step >= (run.args.train_iters or 0):
        return runstate.FINISHED, None
    if step and step == run.saved_step():
        return runstate.RETRY, None
    return runstate.FAILED, f"Megatron ended at step {step} without a checkpoint of that step"


def _report(run: Any, out: console.Console, code: int, problem: str | None) -> None:
    state = {runstate.FINISHED: "finished", runstate.RETRY: "stopped"}.get(code, "failed")
    facts: dict[str, Any] = {
        "recipe": run.args.moa_recipe,
        "step": run.step(),
        "checkpoints": run.args.save,
    }
    if stopping.requested():
        facts["signal"] = stopping.requested()
    try:
        if problem:
            facts.update(error=problem, rank=run.args.rank)
        # First what a launcher waits for: reading long curves takes a while.
        facts.update(run.progress())
        runstate.write_status(run.folder, state, code, **facts)
        facts.update(run.losses())
        runstate.write_status(run.folder, state, code, **facts)
        picture = run.draw()
        if picture is not None:
            facts["curves"] = str(picture)
            runstate.write_status(run.folder, state, code, **facts)
    except Exception:  # a full disk must not turn a finished run into a failed one
        traceback.print_exc()
    minutes = (time.time() - _STARTED) / 60
    out.say()
    out.say(f"{state} at step {facts['step']} of {run.args.train_iters} after {minutes:.1f} min")
    if problem:
        out.say(f"  error            {problem}")
    for label, key in (
        ("validation loss", "validation_loss"),
        ("test loss", "test_loss"),
        ("checkpoint", "checkpoint"),
        ("TensorBoard", "tensorboard"),
        ("curves", "curves"),
        ("reconstruction", "reconstruction"),
        ("input wait", "input_wait"),
    ):
        if facts.get(key) is not None:
            value = facts[key]
            text = f"{value:.4f} {facts.get('loss_unit')}" if isinstance(value, float) else value
            if key == "input_wait":
                text = f"{value:.2%} of training time"
            out.say(f"  {label:<16} {text}")
    out.say(f"  {'status':<16} {_short(run.folder / 'status.json')}")
    if code == runstate.RETRY:
        out.say("  the same command with the same --run-dir continues from the checkpoint")


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__mp_main__":  # imported by a process that multiprocessing has spawned
    stopping.serve_parent()

if __name__ == "__main__":
    stopping.install()
    code = main()
    stopping.deafen()
    sys.exit(code)
