"""Entry point of language-model pretraining.

    python -m moa_megatron.pretrain tiny-moe --run-dir runs/first [flags]

Recipe and flags become Megatron's arguments, the model configuration gets the MoA specification,
and Megatron's own ``pretrain`` does the rest. Exit codes: see ``moa_megatron.runstate``.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from moa_megatron import console, host, recipes, runstate
from moa_megatron.recipes import CommandLine, RefusedError

_STARTED = time.time()


def main(argv: list[str] | None = None) -> int:
    """Runs one pretraining command; returns its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    exit_file = None
    out: console.Console | None = None
    try:
        command = recipes.parse_command_line(sys.argv[1:] if argv is None else argv)
        exit_file = command.exit_file
        recipes.load(command.recipe) if command.recipe else None
        out = None if command.help_all else console.install(rank)
        code = _run(command, out)
    except RefusedError as error:
        code = runstate.REFUSED
        if rank == 0:
            sys.stderr.write(f"refused: {error}\n")
    if exit_file is None:
        return code
    if rank == 0:
        exit_file.write_text(str(code))
    clean = code in (runstate.FINISHED, runstate.RETRY, runstate.REFUSED)
    return runstate.FINISHED if clean else code


def _run(command: CommandLine, out: console.Console | None) -> int:
    host.install()
    from moa_megatron import patches

    patches.apply()
    from moa_megatron import launch

    run = launch.prepare(command, host.HOST_ARGS if host.active() else [])
    assert out is not None
    for line in run.summary():
        out.say_on_first_rank(line)
    if command.dry_run:
        return runstate.FINISHED
    return _train(run, out)


def _train(run: Any, out: console.Console) -> int:
    args, folder = run.args, run.folder
    folder.mkdir(parents=True, exist_ok=True)
    out.open(folder / "logs" / f"rank{args.rank}.log", args.seq_length)
    first = args.rank == 0
    if first:
        runstate.write_status(folder, "running", None, recipe=args.moa_recipe)
    code, problem = runstate.FAILED, None
    try:
        run.train()
        code = runstate.FINISHED
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else runstate.FINISHED
        if code == runstate.FINISHED and run.step() < (args.train_iters or 0):
            code = runstate.RETRY
    except KeyboardInterrupt:
        problem = "interrupted"
        code = 130
    except BaseException as error:  # torch's CheckpointException is no Exception
        problem = f"{type(error).__name__}: {error}"
        code = runstate.STORAGE if runstate.is_storage_error(error) else runstate.FAILED
        traceback.print_exc()
    healthy = code in (runstate.FINISHED, runstate.RETRY)
    host.shutdown(barrier=healthy)
    if first:
        _report(run, out, code, problem)
    return code


def _report(run: Any, out: console.Console, code: int, problem: str | None) -> None:
    state = {runstate.FINISHED: "finished", runstate.RETRY: "stopped"}.get(code, "failed")
    facts = run.results()
    if problem:
        facts["error"] = problem
    runstate.write_status(run.folder, state, code, recipe=run.args.moa_recipe, **facts)
    minutes = (time.time() - _STARTED) / 60
    out.say()
    out.say(f"{state} at step {facts['step']} of {run.args.train_iters} after {minutes:.1f} min")
    if problem:
        out.say(f"  error            {problem}")
    for label, key in (
        ("validation loss", "validation_loss"),
        ("checkpoint", "checkpoint"),
        ("TensorBoard", "tensorboard"),
        ("curves", "curves"),
    ):
        if facts.get(key) is not None:
            value = facts[key]
            text = f"{value:.4f} nats per token" if isinstance(value, float) else value
            out.say(f"  {label:<16} {text}")
    out.say(f"  {'status':<16} {_short(run.folder / 'status.json')}")
    if code == runstate.RETRY:
        out.say("  the same command with the same --run-dir continues from the checkpoint")


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
