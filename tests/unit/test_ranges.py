"""Ranges of a MoE layer: names, nesting and balance, forward and recomputed, with any experts.

torch.cuda.nvtx is replaced by a recorder, since NVTX itself keeps nothing that a test could read.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moa_megatron import profiling
from tests.e2e.runs import ROOT
from tests.helpers import isolated
from tests.helpers.cases import EXPERTS, SEQUENCE, VOCABULARY, Layout, Model, moa

Nesting = tuple[str, ...]
INSIDE_EXPERTS = ("moa.gate", "moa.fc1", "moa.mixture", "moa.fc2")
MOE_LAYERS = 2


class Recorder:
    """Stands in for torch.cuda.nvtx: the path of every range that was opened."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[Nesting] = []

    def range_push(self, message: str) -> None:
        self.open.append(message)
        self.seen.append(tuple(self.open))

    def range_pop(self) -> None:
        self.open.pop()

    def ours(self) -> Counter[Nesting]:
        """How often each nesting of our own names was opened."""
        named = (tuple(n for n in path if n.split()[0] in profiling.RANGES) for path in self.seen)
        last = [path[-1].split()[0] in profiling.RANGES for path in self.seen]
        return Counter(path for path, ours in zip(named, last) if ours)


@contextmanager
def recording() -> Iterator[Recorder]:
    from megatron.core.utils import configure_nvtx_profiling

    recorder = Recorder()
    with mock.patch.multiple(
        torch.cuda.nvtx, range_push=recorder.range_push, range_pop=recorder.range_pop
    ):
        configure_nvtx_profiling(True)
        try:
            yield recorder
        finally:
            configure_nvtx_profiling(False)
    assert not recorder.open, "ranges stayed open"


@contextmanager
def moe_model(**options: Any) -> Iterator[Any]:
    """A small hybrid model with two MoE layers, in training."""
    import torch.distributed as dist

    from moa_megatron import host, patches

    if not dist.is_initialized():
        host.install()
        patches.apply()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    from tests.helpers.models import build, model_parallel

    scope = options.pop("gate_scope", "layer")
    settings = moa(gate_scope=scope)
    with model_parallel(Layout()):
        model = Model(moe=True, moa=settings, options=tuple(options.items()))
        yield build(model, Layout())[0].train()


def losses(model: Any) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (1, SEQUENCE), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQUENCE)[None]
    return model(tokens, positions, None, labels=tokens).sum()


def expected_forward(experts_at_once: bool) -> Counter[Nesting]:
    """Paths of one forward pass of one MoE layer."""
    calls = 1 if experts_at_once else EXPERTS
    paths: Counter[Nesting] = Counter()
    for name, times in (("moe.router", 1), ("moe.dispatch", 2), ("moe.combine", 2)):
        paths[(name,)] = times
    for name in ("moe.shared_experts", "moe.routed"):
        paths[(name,)] = 1
    for name in INSIDE_EXPERTS:
        paths[("moe.shared_experts", name)] = 1
        paths[("moe.routed", "moe.experts", name)] = calls
    paths[("moe.routed", "moe.experts")] = 1
    return paths


def times(paths: Counter[Nesting], factor: int) -> Counter[Nesting]:
    return Counter({path: count * factor for path, count in paths.items()})


def check_one_pass_sequential_and_grouped() -> None:
    for scope in ("layer", "expert"):
        for grouped in (False, True):
            with moe_model(moe_grouped_gemm=grouped, gate_scope=scope) as model:
                with recording() as recorder:
                    loss = losses(model)
                assert recorder.ours() == times(expected_forward(grouped), MOE_LAYERS)
                with recording() as recorder:
                    loss.backward()
                assert not recorder.ours(), "nothing is computed anew"


def check_recompute_opens_them_again() -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    selective = {"recompute_granularity": "selective"}
    for grouped in (False, True):
        for options in (
            full | {"recompute_num_layers": 1},
            selective | {"recompute_modules": ("moe",)},
        ):
            with moe_model(moe_grouped_gemm=grouped, **options) as model:
                whole = times(expected_forward(grouped), MOE_LAYERS)
                with recording() as recorder:
                    loss = losses(model)
                assert recorder.ours() == whole
                with recording() as recorder:
                    loss.backward()
                assert recorder.ours() == whole, "the recomputed pass has the same ranges"
    with moe_model(moe_grouped_gemm=True, recompute_modules=("moe_act",), **selective) as model:
        loss = losses(model)
        with recording() as recorder:
            loss.backward()
        assert recorder.ours() == {("moa.mixture",): MOE_LAYERS}


def check_closed_when_a_layer_is_left_by_an_exception() -> None:
    with moe_model() as model, recording() as recorder:
        experts = next(m for m in model.modules() if type(m).__name__ == "MoASequentialMLP")
        failing = mock.patch.object(experts.local_experts[0], "forward", side_effect=KeyError)
        with failing, pytest.raises(KeyError):
            losses(model)
        # Upstream's own ranges have no such care: those that are open are not ours.
        assert not [name for name in recorder.open if name.split()[0] in profiling.RANGES]
        recorder.open.clear()


def check_nothing_is_pushed_when_ranges_are_off() -> None:
    with moe_model() as model, mock.patch.object(torch.cuda.nvtx, "range_push") as push:
        losses(model)
        assert not push.called


def check_step_is_named_like_the_log() -> None:
    with moe_model():  # for host mode
        from moa_megatron import ranges

        with recording() as recorder, ranges.step(12):
            pass
        assert recorder.seen == [("train.step 12",)]
        with pytest.raises(ValueError, match="profiling.RANGES"):
            ranges.Range("moa.unknown")


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_ranges(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]


def test_docs_have_the_table_of_names() -> None:
    page = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \| (.+) \|$", page, flags=re.MULTILINE))
    assert {name: rows.get(name) for name in profiling.RANGES} == profiling.RANGES


def arguments(**given: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "profile": True,
        "use_pytorch_profiler": False,
        "profile_step_start": 10,
        "profile_step_end": 13,
        "profile_ranks": [0],
        "train_iters": 100,
        "world_size": 4,
        "load": None,
        "enable_ft_package": False,
    }
    return argparse.Namespace(**(values | given))


def test_a_fitting_window_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    assert profiling.problems(arguments(), has_device=True) == []
    assert profiling.problems(arguments(profile_step_end=100), has_device=True) == []
    assert profiling.problems(arguments(profile=False), has_device=False) == []
    assert profiling.problems(arguments(train_iters=None), has_device=True) == []
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"profile_step_end": 10}, ["--profile-step-end=10", "--profile-step-start=10"]),
        ({"profile_step_start": -1}, ["--profile-step-start=-1"]),
        ({"train_iters": 12}, ["--profile-step-end=13", "--train-iters=12"]),
        ({"profile_ranks": [0, 4, 9]}, ["--profile-ranks 4 9", "ranks 0 to 3"]),
        ({"enable_ft_package": True}, ["--enable-ft-package"]),
        ({"profile": False, "use_pytorch_profiler": True}, ["without --profile: add it"]),
    ],
)
def test_a_window_that_captures_nothing_is_refused(given: dict[str, Any], parts: list[str]) -> None:
    found = profiling.problems(arguments(**given), has_device=True)
    assert len(found) == 1
    assert all(part in found[0] for part in parts), found[0]


def test_nsys_needs_a_device_and_torch_does_not() -> None:
    found = profiling.problems(arguments(), has_device=False)
    assert len(found) == 1 and "--use-pytorch-profiler" in found[0]
    assert not profiling.problems(arguments(use_pytorch_profiler=True), has_device=False)


def test_all_ranks_are_allowed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not profiling.problems(arguments(profile_ranks=[]), has_device=True)
    assert "all 4 ranks" in caplog.text


def test_a_continued_run_must_reach_the_window(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    (tmp_path / "iter_0000040").mkdir()
    behind = profiling.problems(arguments(load=str(tmp_path)), has_device=True)
    assert len(behind) == 1 and "step 40" in behind[0]
    ahead = arguments(load=str(tmp_path), profile_step_start=40, profile_step_end=42)
    assert not profiling.problems(ahead, has_device=True)
    ahead.use_pytorch_profiler = True
    assert "new --run-dir" in profiling.problems(ahead, has_device=True)[0]
