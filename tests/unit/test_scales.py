"""Delayed scaling's pickled history: a run's own is read, others' after a word of the user."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from moa_megatron import scales

DELAYED = SimpleNamespace(fp8="hybrid", fp8_recipe="delayed")


def asked(
    load: str, saved: Any = DELAYED, impl: str = "transformer_engine", **more: Any
) -> list[str]:
    values = {"load": load, "save": "runs/mine", "transformer_impl": impl, **more}
    args: Any = SimpleNamespace(**values)
    problems = scales.problems(args, saved)
    if not problems:
        scales.allow_own(args, saved)
    return problems


@pytest.fixture(autouse=True)
def newest_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "_asks", lambda: True)
    monkeypatch.setenv(scales.ALLOW, "0")
    monkeypatch.delenv(scales.ALLOW)


def test_own_history_is_read() -> None:
    assert asked("runs/mine") == [] and os.environ[scales.ALLOW] == "1"


def test_a_word_of_the_user_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = asked("runs/theirs")
    assert "runs/theirs" in problem and f"set {scales.ALLOW}=1" in problem
    assert scales.ALLOW not in os.environ
    monkeypatch.setenv(scales.ALLOW, "1")
    assert asked("runs/theirs") == []
    monkeypatch.setenv(scales.ALLOW, "0")
    assert asked("runs/mine"), "forbidden by the user"


def test_others_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked("runs/theirs", SimpleNamespace(fp8="e4m3", fp8_recipe="blockwise")) == []
    assert asked("runs/theirs", SimpleNamespace(fp8=None, fp8_recipe="delayed")) == []
    assert asked("runs/theirs", SimpleNamespace()) == [], "older than FP8"
    assert asked("runs/theirs", SimpleNamespace(fp8="hybrid")), "older than other recipes"
    assert asked("runs/theirs", impl="local") == [], "modules without such state"
    monkeypatch.setattr(scales, "_asks", lambda: False)
    assert asked("runs/theirs") == [], "an engine that does not ask"


def test_history_does_not_move_between_experts() -> None:
    words = {"fp8": "hybrid", "fp8_recipe": "delayed", "num_experts": 8, "moe_grouped_gemm": True}
    saved = SimpleNamespace(**words, expert_model_parallel_size=1)
    assert asked("runs/mine", saved, **words, expert_model_parallel_size=1) == []
    (problem,) = asked("runs/mine", saved, **words, expert_model_parallel_size=2)
    assert "expert_model_parallel_size: checkpoint 1, this run 2" in problem
    assert "another --fp8-recipe" in problem
    sequential = {**words, "moe_grouped_gemm": False, "expert_model_parallel_size": 1}
    assert "moe_grouped_gemm" in asked("runs/mine", saved, **sequential)[0]
    unknown = SimpleNamespace(fp8="hybrid", fp8_recipe="delayed")
    assert asked("runs/mine", unknown, **words, expert_model_parallel_size=1) == []
    other = {**words, "fp8_recipe": "tensorwise", "expert_model_parallel_size": 2}
    assert asked("runs/mine", saved, **other) == []
    saved = SimpleNamespace(**{**words, "moe_grouped_gemm": False}, expert_model_parallel_size=1)
    sequential["expert_model_parallel_size"] = 2
    assert asked("runs/mine", saved, **sequential) == [], "each expert has its own"


def test_nothing_is_allowed_or_converted_beside_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    from moa_megatron import checkpoints

    words = {"load": "runs/mine", "save": "runs/mine", "transformer_impl": "transformer_engine"}
    args: Any = SimpleNamespace(**words)
    others, prepared = ["other data"], []
    monkeypatch.setattr(checkpoints, "read_args", lambda args: DELAYED)
    for name in ("differences", "optimizer_problems"):
        monkeypatch.setattr(checkpoints, name, lambda *_: [])
    monkeypatch.setattr(checkpoints.identity, "problems", lambda *_: list(others))
    monkeypatch.setattr(checkpoints.moves, "prepare", lambda *_: prepared.append(True))
    assert checkpoints.problems(args) == others
    assert not prepared and scales.ALLOW not in os.environ
    others.clear()
    assert checkpoints.problems(args) == [] and prepared and os.environ[scales.ALLOW] == "1"
