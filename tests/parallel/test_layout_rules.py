"""What ``layout`` calls legal trains a step on real ranks, what it calls illegal Megatron refuses.

Random models and layouts of up to four ranks; our refusal is taken out of Megatron's way.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.helpers.parity import Bench
from tests.helpers.pool import CaseFailed

SMALL = ["--vocab-size", "64", "--tokenizer-type", "NullTokenizer", "--kv-channels", "8"]
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@st.composite
def runs(draw: Any) -> tuple[int, list[str]]:
    """World size and command line; about half of the layouts are legal."""

    def usually(common: int, *rare: int) -> int:
        """The first in five of six draws."""
        return common if draw(st.integers(0, 5)) else draw(st.sampled_from(rare))

    world = draw(st.sampled_from([4, 2, 4, 3, 1, 4]))
    products = list(itertools.product((1, 2, 4), repeat=3))
    dividing = [sizes for sizes in products if world % math.prod(sizes) == 0]
    tp, pp, cp = draw(st.sampled_from(dividing if draw(st.integers(0, 9)) else products))
    values = {
        "num-layers": usually(4, 2, 3),
        "hidden-size": 32,
        "num-attention-heads": usually(4, 6, 3),
        "ffn-hidden-size": usually(24, 12, 18, 25),
        "seq-length": usually(16, 12, 14),
        "micro-batch-size": usually(1, 2),
        "global-batch-size": usually(12, 4, 8, 6),
        "tensor-model-parallel-size": tp,
        "pipeline-model-parallel-size": pp,
        "context-parallel-size": cp,
        "num-query-groups": usually(4, 1, 2),
    }
    words = ["--group-query-attention", "--moa-model", draw(st.sampled_from(["hybrid", "gpt"]))]
    recipe = draw(st.sampled_from(["tiny-moe", "tiny-moe", "tiny-dense"]))
    if recipe == "tiny-moe":
        values |= {
            "num-experts": usually(8, 4, 6),
            "moe-router-topk": usually(2, 3),
            "moe-ffn-hidden-size": usually(12, 10, 9),
            "moe-shared-expert-intermediate-size": usually(20, 12, 15),
            "expert-model-parallel-size": draw(st.sampled_from([1, 2, 2, 4])),
            "moe-layer-freq": usually(1, 2),
        }
        if draw(st.booleans()):
            values["expert-tensor-parallel-size"] = usually(1, 2)
        words += ["--moa-gate-scope", draw(st.sampled_from(["layer", "expert"]))]
        # Its metrics are sized once for a process.
        words += ["--moe-router-load-balancing-type", "none"]
    if tp > 1 and draw(st.integers(0, 5)):
        words.append("--sequence-parallel")
    if pp > 1 and draw(st.booleans()):
        values["num-layers-per-virtual-pipeline-stage"] = usually(1, 2)
    if draw(st.booleans()):
        words.append("--use-distributed-optimizer")
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return world, [recipe, *SMALL, *flags, "--max-position-embeddings", "16", *words]


def check(bench: Bench, run: tuple[int, list[str]], thorough: bool = True) -> None:
    """Fails where our verdict and Megatron's differ.

    Args:
        thorough: train illegal runs too, where Megatron's validation lets them pass.
    """
    world, words = run
    case = "tests.helpers.first_step:attempt"
    ours, reached, error = bench.pool.run(case, world, words=words, train=False)[0]
    if reached == "validated" and (thorough or not ours):
        try:
            verdicts = bench.pool.run(case, world, timeout=15 if ours else 60, words=words)
        except CaseFailed:
            # Ranks that fail at different places wait for each other: no training either.
            if ours:
                return
            raise
        reached, error = verdicts[0][1:]
        assert ours or all(verdict[1] == reached for verdict in verdicts), verdicts
    if ours:
        assert reached != "trained", f"Megatron takes what we refuse: {ours}"
    else:
        assert reached == "trained", f"Megatron refuses what we take: {error}"


@settings(max_examples=15, phases=[Phase.generate], **QUIET)
@given(run=runs())
def test_verdicts_agree(bench: Bench, run: tuple[int, list[str]]) -> None:
    check(bench, run, thorough=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=60, phases=[Phase.generate], **QUIET)
@given(run=runs())
def test_verdicts_agree_on_many(bench: Bench, run: tuple[int, list[str]]) -> None:
    check(bench, run)
