#!/usr/bin/env python3
"""Submits a training run to Slurm: checked first, resumed by itself, nothing lost.

    ./launch/submit.py moe-2b --nodes 4 --time 24:00:00 --account lm --chain 3
    ./launch/submit.py moe-2b --nodes 4 --time 24:00:00 --dry-run
    ./launch/submit.py dense-0.12b --time 8:00:00 --array-sweep lr=6e-4,1e-3,2e-3 --chain 2
    ./launch/submit.py --rerun runs/dense-0.12b-sweep

RECIPE and all other flags are those of ./launch/local.sh. Everything that was submitted is kept in
the run's folder: job.sbatch, submit.json, recipe.yaml, git.diff, environment.txt.
Needs Python 3.9 and PyYAML; with the project's environment, Megatron checks the flags as well.
"""

import argparse
import getpass
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
_ENVIRONMENT = Path(os.environ.get("MOA_PYTHON") or ROOT / ".venv" / "bin" / "python")


def use_environment(problem):  # type: ignore[no-untyped-def]  # read by Python 3.6 as well
    """Goes on with the project's own interpreter, where there is one."""
    if _ENVIRONMENT.exists() and not os.environ.get("MOA_SUBMIT_AGAIN"):
        os.environ["MOA_SUBMIT_AGAIN"] = "1"
        os.execv(str(_ENVIRONMENT), [str(_ENVIRONMENT), *sys.argv])
    sys.stderr.write(f"refused: {problem}, or run launch/setup.sh once\n")
    sys.exit(78)


if sys.version_info < (3, 9):  # noqa: UP036
    use_environment("python3 is older than 3.9: load a newer one")
try:
    import yaml

    from moa_megatron import outline, packages, recipes, runstate, slurm, submission, sweeps
except ImportError as error:
    use_environment(f"{error}: python3 -m pip install --user pyyaml")

from moa_megatron.recipes import RefusedError  # noqa: E402

# Variables worth knowing about a run; others may hold secrets.
_KEPT = ("NCCL_", "TORCH", "CUDA", "MOA_", "OMP_", "UCX_", "FI_", "GLOO_", "TRITON_", "NVTE_")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the flags that go on to training."""
    parser = recipes.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = ", ".join(recipes.available())
    add("recipe", nargs="?", help=f"one of {names}, or a path to a .yaml file")
    add("--nodes", type=int, default=1)
    add("--gpus-per-node", type=int, default=8, help="0 for a partition without GPUs")
    add("--procs-per-node", type=int, help="processes on a node; default: its GPUs, or 1")
    add("--time", default="24:00:00", help="limit of each job, as sbatch takes it")
    add("--partition")
    add("--account")
    add("--qos")
    add("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any option of sbatch")
    add("--container", metavar="IMAGE", help=".sqsh or registry name (pyxis), .sif (Apptainer)")
    add("--mounts", metavar="A:B,...", help="further folders that the container sees")
    add("--chain", type=int, default=1, metavar="K", help="at most K jobs, each continuing")
    add("--requeue", action="store_true", help="continue by requeueing one job, not by K jobs")
    add("--array-sweep", action="append", default=[], metavar="KEY=V1,V2", help="an array of runs")
    add("--max-parallel", type=int, metavar="N", help="elements of the array at a time")
    add("--rerun", type=Path, metavar="SWEEP", help="submit a sweep's failed points again")
    add("--per-rank", action="store_true", help="one Slurm task per process, without torchrun")
    add("--grace", type=int, default=300, metavar="S", help="seconds before the limit to save")
    add("--run-dir", type=Path, help="default: runs/RECIPE-TIME")
    add("--profile", action="store_true", help="three steps under nsys (docs/profiling.md)")
    add("--torch-profiler", action="store_true", help="the same with torch's own profiler")
    add("--no-check", action="store_true", help="skip Megatron's own check of the flags")
    add("--dry-run", action="store_true", help="print plan and script, submit nothing")
    options, flags = parser.parse_known_args(argv)
    if options.recipe is None and options.rerun is None:
        parser.print_help()
        raise RefusedError(f"no recipe given: choose one of {names}")
    if options.recipe is not None and options.recipe.startswith("-"):
        raise RefusedError(f"the recipe comes first, before {options.recipe}")
    return options, flags


def plan(options: argparse.Namespace, flags: list[str]) -> submission.Job:
    """The job that the options describe."""
    if options.profile or options.torch_profiler:
        flags = [*submission.profile_flags(flags, options.torch_profiler), *flags]
    try:
        points = sweeps.make_points(options.array_sweep)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    stamp = time.strftime("%Y%m%d-%H%M%S")
    kind = "sweep-" if points else ""
    default = Path("runs") / f"{Path(options.recipe).stem}-{kind}{stamp}"
    sbatch = {name: getattr(options, name) for name in ("partition", "account", "qos")}
    sbatch["gpus-per-node"] = str(options.gpus_per_node) if options.gpus_per_node else None
    if points:
        parallel = f"%{options.max_parallel}" if options.max_parallel else ""
        sbatch["array"] = f"0-{len(points) - 1}{parallel}"
    for text in options.sbatch:
        key, _, value = text.lstrip("-").partition("=")
        sbatch[key] = value
    return submission.Job(
        recipe=absolute(options.recipe),
        flags=flags,
        folder=(options.run_dir or default).resolve(),
        nodes=options.nodes,
        procs_per_node=options.procs_per_node or options.gpus_per_node or 1,
        time=options.time,
        grace=options.grace,
        chain=options.chain,
        # An element of an array has no jobs behind it: it continues by being requeued.
        requeue=options.requeue or (bool(points) and options.chain > 1),
        per_rank=options.per_rank,
        options={key: value for key, value in sbatch.items() if value is not None},
        points=points,
        container=absolute(options.container),
        mounts=options.mounts,
        nsys=options.profile and not options.torch_profiler,
    )


def absolute(name: str | None) -> Any:
    """A file by its full path, for the job starts elsewhere; any other name as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_file() else name


def check(job: submission.Job, full: bool) -> list[str]:
    """All problems: ours, then Megatron's where it is installed, then Slurm's."""
    problems = job.problems()
    if full and not problems:
        problems += megatron_problems(job)
    if shutil.which("sbatch") is None:
        return [*problems, "sbatch is not here: run this on a login node of the cluster"]
    tested = subprocess.run(
        ["sbatch", "--test-only"], input=job.script(), capture_output=True, text=True, check=False
    )
    if tested.returncode:
        problems += [f"Slurm: {line}" for line in tested.stderr.splitlines() if line.strip()]
    return problems


def megatron_problems(job: submission.Job) -> list[str]:
    """What ``--dry-run`` of the run itself refuses, in the project's environment."""
    first = job.points[0]["settings"] if job.points else {}
    words = [*job.flags, *(f"--set={key}={value}" for key, value in first.items())]
    if not _ENVIRONMENT.exists():
        print("note: Megatron is not installed here; the job checks its flags when it starts")
        return []
    environment = {
        **os.environ,
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(job.world_size)},
        **{"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": str(ROOT)},
    }
    command = [str(_ENVIRONMENT), "-m", "moa_megatron.pretrain", job.recipe, *words, "--dry-run"]
    print("checking the flags with Megatron ...", flush=True)
    done = subprocess.run(
        [*command, "--run-dir", str(job.folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return []
    refused = done.stderr.partition("refused: ")[2].strip()
    elsewhere = {"transformer_engine cannot run here": "Transformer Engine"}
    if job.container:  # which brings its own
        elsewhere[packages.VISION_NEEDED] = "the extra vision"
    for text, name in elsewhere.items():
        if text in refused:
            print(f"note: {name} is not here; the job checks its flags when it starts")
            return []
    return [refused or f"Megatron's check failed:\n{done.stderr[-2000:]}"]


def record(job: submission.Job, argv: list[str]) -> None:
    """Keeps what was submitted in the run's folder: what it takes to do it again."""
    (job.folder / "logs").mkdir(parents=True, exist_ok=True)
    (job.folder / "job.sbatch").write_text(job.script(), encoding="utf-8")
    recipe = yaml.safe_dump(recipes.load(job.recipe), sort_keys=False)
    (job.folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    revision, changes = git("rev-parse", "HEAD"), git("diff", "HEAD")
    if changes:
        (job.folder / "git.diff").write_text(changes, encoding="utf-8")
    kept = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_KEPT)]
    (job.folder / "environment.txt").write_text("\n".join([*kept, ""]), encoding="utf-8")
    facts = {
        "command": shlex.join(["./launch/submit.py", *argv]),
        "recipe": job.recipe,
        "flags": job.flags,
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "revision": revision.strip() or None,
        "uncommitted": bool(changes),
    }
    (job.folder / "submit.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if job.points:
        sweep = {"recipe": job.recipe, "flags": job.flags, "points": job.points}
        text = json.dumps(sweep, indent=1) + "\n"
        (job.folder / "sweep.json").write_text(text, encoding="utf-8")
        (job.folder / "report.sbatch").write_text(job.report_script(), encoding="utf-8")


def git(*words: str) -> str:
    """Output of git in the project's folder; empty where there is no repository."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=False)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def rerun(folder: Path) -> int:
    """Submits again what a sweep has not finished; returns the exit code."""
    try:
        points = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["points"]
    except (OSError, ValueError, KeyError) as error:
        raise RefusedError(f"--rerun {folder} is no folder of a sweep: {error}") from error
    active = slurm.active_jobs(folder)
    if active:
        raise RefusedError(f"--rerun {folder} is still in use by job {', '.join(active)}")
    states = {
        point["index"]: (runstate.read_status(folder / point["run_dir"]) or {}).get("state")
        for point in points
    }
    left = [index for index, state in states.items() if state != "finished"]
    if not left:
        print(f"all {len(points)} points of {folder} have finished: nothing to do")
        return runstate.FINISHED
    script = (folder / "job.sbatch").read_text(encoding="utf-8")
    array = re.search(r"^#SBATCH --array=\S*?(%\d+)?$", script, flags=re.MULTILINE)
    jobs = slurm.submit_sweep(folder, ",".join(map(str, left)) + ((array and array[1]) or ""))
    names = ", ".join(point["name"] for point in points if point["index"] in left)
    print(f"submitted {len(left)} of {len(points)} points as job {jobs[0]}: {names}")
    return runstate.FINISHED


def describe(job: submission.Job) -> list[str]:
    """The resolved plan, for a person."""
    values = outline.outline(job.recipe, job.flags)
    short = {"TP": "tensor_model", "PP": "pipeline_model", "CP": "context", "EP": "expert_model"}
    sizes = {name: values[f"{key}_parallel_size"] for name, key in short.items()}
    model = sizes["TP"] * sizes["PP"] * sizes["CP"]
    sizes["DP"] = job.world_size // model
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    batch, length = values["global_batch_size"], values["seq_length"]
    run = f"{values['train_iters']} steps"
    for key in ("tokens", "epochs"):
        run = run if values[key] is None else f"--{key} {values[key]}"
    images = values.get("moa_model") == "mae"
    step = f"{batch} images" if images else f"{batch} x {length} tokens"
    how = "Slurm tasks" if job.per_rank else "torchrun"
    again = f", up to {job.chain} jobs, each continuing" if job.chain > 1 else ""
    lines = [
        f"{job.recipe}: {job.nodes} nodes x {job.procs_per_node} processes, by {how}",
        f"  layout       {split or 'one process'}",
        f"  training     {run}, {step} a step",
        f"  time         {job.time}{again}; saves {job.grace} s before the limit",
        f"  run folder   {job.folder}",
    ]
    if job.container:
        lines.append(f"  container    {job.container}")
    lines += [f"  point {p['index']:<6} {p['name']}" for p in job.points]
    return lines


def main(argv: list[str]) -> int:
    """Checks and submits; returns an exit code of the exit contract."""
    options, flags = parse(argv)
    if options.rerun is not None:
        return rerun(options.rerun.resolve())
    job = plan(options, flags)
    problems = check(job, full=not options.no_check)
    if problems:
        raise RefusedError("\n".join(problems))
    print("\n".join(describe(job)))
    if options.dry_run:
        print(f"\nwould submit:\n\n{job.script()}")
        return runstate.FINISHED
    record(job, argv)
    count = 1 if job.requeue else job.chain
    submitted = slurm.submit_sweep(job.folder) if job.points else None
    jobs = submitted or slurm.submit_chain(job.folder, count)
    log = "slurm-%A_%a.out".replace("%A", jobs[0]).replace("%a", "*")
    log = log if job.points else f"slurm-{jobs[0]}.out"
    print(f"submitted job {', '.join(jobs)}")
    print(f"  follow         tail -F {job.folder}/logs/{log}")
    print(f"  save and stop  scancel --signal=USR1 {jobs[0]}")
    print(f"  cancel         scancel {' '.join(jobs)}")
    return runstate.FINISHED


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (RefusedError, slurm.SlurmError) as refusal:
        sys.stderr.write(f"refused: {refusal}\n")
        sys.exit(runstate.REFUSED)
