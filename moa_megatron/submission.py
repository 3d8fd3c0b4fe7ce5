"""What is handed to Slurm: the checks before it, the batch script, the points of a sweep.

Needs Python 3.9 and PyYAML only: it runs on a login node.
"""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa_megatron import layout, outline, runstate, slurm
from moa_megatron.recipes import RefusedError

ROOT = Path(__file__).resolve().parents[1]
_TEMPLATE = ROOT / "launch" / "slurm.sbatch"
_DIRECTIVE = re.compile(r"^#SBATCH --([\w-]+)")
_FOLDERS = ("save", "load", "tensorboard_dir", "data_cache_path", "tokenizer_model")
_DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
# What an option of the user's replaces beside its namesake.
_DISPLACES = {
    "mem-per-cpu": ("mem",),
    "mem-per-gpu": ("mem",),
    "no-requeue": ("requeue",),
    "oversubscribe": ("exclusive",),
}
# Folders that each node has for itself.
_OWN = {"nodes": "--nodes", "time": "--time", "array": "--array-sweep", "signal": "--grace"}
_NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")


@dataclass
class Job:
    """One submission: a run, or a sweep whose points are runs."""

    recipe: str
    flags: list[str]
    folder: Path
    nodes: int
    procs_per_node: int
    time: str
    grace: int
    chain: int
    requeue: bool
    per_rank: bool
    options: dict[str, str]
    points: list[dict[str, Any]] = field(default_factory=list)
    container: str | None = None
    mounts: str | None = None
    nsys: bool = False

    @property
    def world_size(self) -> int:
        return self.nodes * self.procs_per_node

    def problems(self) -> list[str]:
        """Every reason not to submit that can be seen without Megatron and without Slurm."""
        found = self._resources() + self._folder() + self._image()
        if self.nsys and self.points:
            found.append(
                "--profile with --array-sweep: profile one point by a submission of its own"
            )
        found += self._contradictions()
        if self.requeue and self.chain < 2:
            found.append("--requeue needs --chain K: how often the job may run in all")
        if self.world_size < 1:
            return found
        variants = self.points or [{"name": "", "settings": {}}]
        for point in variants:
            settings = [f"{key}={value}" for key, value in point["settings"].items()]
            words = [word for setting in settings for word in ("--set", setting)]
            where = f"point {point['name']}: " if point["name"] else ""
            for problem in self._layout([*self.flags, *words]):
                if where + problem not in found and problem not in found:
                    found.append(where + problem)
        return found

    def _contradictions(self) -> list[str]:
        words = (flag.split("=")[0] for flag in self.flags if flag.startswith("--"))
        given = {word[2:].replace("-", "_") for word in words}
        swept = {key for point in self.points for key in point["settings"]}
        found = [
            f"{key} is swept, but --{key.replace('_', '-')} among the flags would override every "
            "point: leave the flag out"
            for key in sorted(given & swept)
        ]
        for key, flag in _OWN.items():
            if key in self.options and not (key == "array" and self.points):
                found.append(f"--sbatch {key}: use {flag}, which the checks know")
        return found

    def _layout(self, flags: list[str]) -> list[str]:
        try:
            values = outline.outline(self.recipe, flags)
            args = argparse.Namespace(**values, world_size=self.world_size)
            return layout.problems(args) + layout.schedule_problems(args)
        except RefusedError as error:
            return [str(error)]
        except TypeError as error:  # a text where a number belongs
            return [f"recipe {self.recipe} with these flags: {error}"]

    def _resources(self) -> list[str]:
        found = []
        for flag, value in (
            ("--nodes", self.nodes),
            ("--procs-per-node", self.procs_per_node),
            ("--chain", self.chain),
        ):
            if value < 1:
                found.append(f"{flag} {value}: must be at least 1")
        limit = seconds(self.time)
        if limit is None or limit <= 0:
            found.append(
                f"--time {self.time}: write minutes, HH:MM:SS or D-HH:MM:SS, such as 24:00:00"
            )
        elif limit <= self.grace:
            found.append(
                f"--time {self.time} is not longer than --grace {self.grace} s, which is for "
                "saving before the limit: raise the one or lower the other"
            )
        return found

    def _folder(self) -> list[str]:
        path = str(self.folder)
        if self.nodes > 1 and path.startswith(tuple(f"{local}/" for local in _NODE_LOCAL)):
            return [
                f"--run-dir {path} is on a disk that each node has for itself: choose a folder on "
                "the shared file system"
            ]
        if (runstate.read_status(self.folder) or {}).get("state") == "finished":
            return [f"--run-dir {path} holds a run that has finished: choose another folder"]
        parent = next(folder for folder in self.folder.parents if folder.exists())
        if not _writable(self.folder if self.folder.exists() else parent):
            return [f"--run-dir {path} cannot be written: choose another folder"]
        active = slurm.active_jobs(self.folder)
        if active:
            return [
                f"--run-dir {path} is in use by job {', '.join(active)}: scancel it, wait, or "
                "choose another folder"
            ]
        return []

    def _image(self) -> list[str]:
        image = self.container
        is_file = image is not None and image.endswith((".sif", ".sqsh"))
        if image is None or not is_file or Path(image).is_file():
            return []
        return [f"--container {image}: no such file; build or import it first (docs/launching.md)"]

    def script(self) -> str:
        """The batch script of the run, or of a sweep's array."""
        # The signal may come a minute early, and a save must fit behind it.
        supervise = ["--retry-needs", str(self.grace + 120)]
        supervise += ["--chain", str(self.chain)] if self.chain > 1 else []
        supervise += ["--requeue"] if self.requeue else []
        supervise += ["--sweep", str(self.folder)] if self.points else []
        options = {
            "job-name": self.folder.name,
            "output": str(self.folder / "logs" / f"slurm-{'%A_%a' if self.points else '%j'}.out"),
            "nodes": str(self.nodes),
            "time": self.time,
            "signal": f"USR1@{self.grace}",
            **self.options,
        }
        variables = {"MOA_SUPERVISE": shlex.join(supervise), **self._variables()}
        words = [self.recipe, *self.flags]
        words += [] if self.points else ["--run-dir", str(self.folder)]
        return _render(options, variables, words)

    def report_script(self) -> str:
        """The batch script that draws a sweep's table and picture."""
        dropped = (*_OWN, "gpus-per-node", "gres", "exclusive")
        options = {
            "job-name": f"{self.folder.name}-report",
            "output": str(self.folder / "logs" / "report-%j.out"),
            "nodes": "1",
            "time": "15",
            **{key: value for key, value in self.options.items() if key not in dropped},
            "exclusive": "no",
        }
        variables = {**self._variables(), "MOA_TOOL": "tools/report_sweep.py"}
        return _render(options, variables, [str(self.folder)])

    def _outside(self) -> list[Path]:
        """Folders outside the project that the run names: a container must see them as they are."""
        values = outline.outline(self.recipe, self.flags)
        named = [self.folder, *(values.get(key) for key in _FOLDERS)]
        for key in _DATA:
            words = values.get(key) or []
            # The last part of a prefix is no folder; weights stand between prefixes.
            paths = [Path(str(word)) for word in (words if isinstance(words, list) else [words])]
            named += [path.parent for path in paths if path.is_absolute()]
        found = sorted({Path(path) for path in named if path and Path(path).is_absolute()})
        return [path for path in found if not path.is_relative_to(ROOT)]

    def _profiler(self) -> dict[str, str]:
        ranks = outline.outline(self.recipe, self.flags).get("profile_ranks", 0)
        words = ranks if isinstance(ranks, list) else [ranks]
        return {
            "MOA_WRAP": str(ROOT / "launch" / "nsys.sh"),
            "MOA_PROFILE_DIR": str(self.folder / "nsight"),
            "MOA_PROFILE_RANKS": " ".join(map(str, words)),
        }

    def _variables(self) -> dict[str, str]:
        mounts = [f"{path}:{path}" for path in self._outside()]
        mounts += [self.mounts] if self.mounts else []
        return {
            "MOA_ROOT": str(ROOT),
            "MOA_PROCS_PER_NODE": str(self.procs_per_node),
            "MOA_PER_RANK": "1" if self.per_rank else "",
            "MOA_CONTAINER": self.container or "",
            **(self._profiler() if self.nsys else {}),
            "MOA_MOUNTS": ",".join(mounts) if self.container else "",
        }


def profile_flags(flags: list[str], torch_profiler: bool) -> list[str]:
    """Megatron's capture window: three steps of rank 0, where the flags name no other."""
    added = ["--profile", "--nvtx-ranges"]
    added += ["--use-pytorch-profiler"] if torch_profiler else []
    window = {"--profile-step-start": "10", "--profile-step-end": "13", "--profile-ranks": "0"}
    given = {flag.split("=")[0] for flag in flags}
    for flag, value in window.items():
        added += [] if flag in given else [flag, value]
    return added


def _render(options: dict[str, str], variables: dict[str, str], words: list[str]) -> str:
    """``launch/slurm.sbatch`` with these options in place of its defaults, and its arguments."""
    head, body = _TEMPLATE.read_text(encoding="utf-8").split("set -euo pipefail\n", 1)
    chosen = dict(options)
    displaced = {name for key in chosen for name in (key, *_DISPLACES.get(key.split("=")[0], ()))}
    kept = []
    for line in head.splitlines()[1:]:
        directive = _DIRECTIVE.match(line)
        if directive is None or directive[1] not in displaced:
            kept.append(line)
    if chosen.get("exclusive") == "no":
        del chosen["exclusive"]
    directives = [
        f"#SBATCH --{key}={shlex.quote(value)}" if value else f"#SBATCH --{key}"
        for key, value in chosen.items()
    ]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in variables.items() if value]
    lines = ["#!/usr/bin/env bash", *directives, *kept, "set -euo pipefail", *exports]
    return "\n".join([*lines, f"set -- {shlex.join(words)}", body])


def seconds(text: str) -> int | None:
    """Seconds of a Slurm time limit (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS)."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        return None
    days, first, second, third = (int(part) if part else None for part in match.groups())
    assert first is not None
    if days is not None:
        return days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + (second or 0) * 60 + third
    return first * 60 + (second or 0)


def _writable(folder: Path) -> bool:
    try:
        probe = folder / ".moa-write-test"
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
