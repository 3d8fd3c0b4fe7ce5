"""Machine code of the Triton kernels, compiled ahead of time: no GPU is needed or used.

The counters are held by kernels with a known number of instructions, a forced spill and 32-bit
addresses.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from moa_megatron.config import MoAConfig
from moa_megatron.kernels import static
from tools.benchmarks import static as report

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

ARCHITECTURES = (80, 90, 100)
VARIANTS = ("type1", "one", "bi", "qd")
DIRECTIONS = ("forward", "backward")
WIDE = 2048
# Issued instructions and special functions per element. Exactly memory-bound on an H100: 59 and 99.
LIMITS = {"forward": (50, 6), "backward": (106, 8)}

directions = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture(autouse=True)
def _no_line_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same instructions, a quarter sooner."""
    monkeypatch.setattr(triton.knobs.compilation, "disable_line_info", True)


def counts(direction: Any, arch: int = 90, width: int = WIDE, **words: Any) -> static.Counts:
    """Of a kernel with these settings of `MoAConfig` and `compile_kernel`."""
    inputs = {name: words.pop(name) for name in ("dtype", "weighted", "aligned") if name in words}
    inputs = {"dtype": torch.bfloat16} | inputs
    compiled = static.compile_kernel(direction, MoAConfig(**words), width, arch=arch, **inputs)
    assert static.addresses_are_64_bit(compiled)
    return static.count(compiled)


def assert_in_registers(found: static.Counts) -> None:
    assert found.spills == 0
    assert found.local_bytes == 0


@directions
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills_and_with_wide_accesses(
    arch: int, variant: str, direction: str
) -> None:
    found = counts(direction, arch, variant=variant)
    assert_in_registers(found)
    assert found.looped
    assert set(found.loads + found.stores) == {16}
    gated = variant != "type1"
    assert found.bytes_moved == 2 * ((2 + gated) if direction == "forward" else (3 + 2 * gated))


@directions
def test_instructions_of_bi_and_one(direction: str) -> None:
    issued, special = LIMITS[direction]
    bi = counts(direction, variant="bi")
    assert bi.issued <= issued
    assert bi.special <= special
    assert counts(direction, variant="one").issued <= 0.67 * bi.issued


@directions
@pytest.mark.parametrize("arch", ARCHITECTURES[1:])
@pytest.mark.parametrize(
    ("width", "dtype"), [(3413, torch.bfloat16), (WIDE, torch.float32)], ids=["odd", "fp32"]
)
def test_other_forms_of_bi(arch: int, width: int, dtype: torch.dtype, direction: str) -> None:
    found = counts(direction, arch, width, variant="bi", dtype=dtype)
    assert_in_registers(found)
    assert set(found.loads + found.stores) == {2 if width == 3413 else 16}
    assert found.per_row_total(width) > found.issued


@pytest.mark.parametrize(
    "settings",
    [
        {"gate": "softmax"},
        {"gate": "tanh"},
        {"mixing": "la"},
        {"weighted": True},
        {"aligned": False},
        {"dtype": torch.float16},
        {"dictionary": ("relu2",)},
    ],
    ids=lambda settings: "-".join(map(str, *settings.items())),
)
def test_backward_compiles_with_other_settings(settings: dict[str, Any]) -> None:
    found = counts("backward", **settings)
    assert_in_registers(found)
    assert set(found.stores) == {2 if settings.get("aligned") is False else 16}


@pytest.mark.parametrize("gate", ["softmax", "tanh"])
def test_forward_compiles_with_other_gates(gate: str) -> None:
    assert_in_registers(counts("forward", gate=gate))


def test_a_width_without_aligned_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="853"):
        counts("forward", width=853, aligned=True)


def test_short_rows_are_counted_as_a_whole() -> None:
    short = counts("forward", width=64)
    assert not short.looped
    assert short.before == short.after == 0
    looped = counts("forward")
    # 64 columns occupy 8 of the 32 lanes that 256 columns would.
    assert short.per_row_total(64) > 4 * looped.issued


@triton.jit
def known(source, target, width, FACTORS: tl.constexpr, POWERS: tl.constexpr):
    """FACTORS multiply-adds and POWERS special functions per element."""
    column = tl.arange(0, 128)
    for d in range(0, width, 128):
        x = tl.load(source + column + d)
        for _ in tl.static_range(FACTORS):
            x = x * x + 1.5
        for _ in tl.static_range(POWERS):
            x = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1
            )
        tl.store(target + column + d, x)


@triton.jit
def hungry(source, target):
    """Keeps 64 values a lane until their sum is known."""
    column = tl.arange(0, 2048)
    x = tl.load(source + column)
    tl.store(target + column, x * tl.sum(x, 0))


@triton.jit
def addressed(source, target, stride, WIDEN: tl.constexpr):
    row = tl.program_id(0)
    if WIDEN == "first":
        row = row.to(tl.int64)
    offset = row * stride
    if WIDEN == "late":
        offset = offset.to(tl.int64)
    for d in range(0, stride, 128):
        column = tl.arange(0, 128) + d
        tl.store(target + offset + column, tl.load(source + offset + column))


def compile_control(kernel: Any, *arguments: int, **words: Any) -> static.Compiled:
    options = {"num_warps": 1} | ({"maxnreg": words.pop("maxnreg")} if "maxnreg" in words else {})
    pointers = (torch.empty(1, device="meta"), torch.empty(1, device="meta"))
    return static.compile_arguments(
        kernel,
        (*pointers, *arguments),
        words,
        90,
        bytes_stored=4,
        lane_elements=64,
        options=options,
    )


@pytest.mark.parametrize(("factors", "powers"), [(5, 2), (11, 1)])
def test_counter_finds_a_known_number_of_instructions(factors: int, powers: int) -> None:
    found = static.count(compile_control(known, 4096, FACTORS=factors, POWERS=powers))
    assert found.looped
    assert found.fp32 == factors
    assert found.special == powers
    assert factors + powers + 0.5 < found.issued < factors + powers + 4
    assert set(found.loads) == set(found.stores) == {16}
    assert found.bytes_moved == 8


def test_counter_sees_a_forced_spill() -> None:
    assert_in_registers(static.count(compile_control(hungry)))
    spilled = static.count(compile_control(hungry, maxnreg=32))
    assert spilled.registers <= 32
    assert spilled.spills > 0
    assert spilled.local_bytes > 0


@pytest.mark.parametrize(("widen", "expected"), [("first", True), ("late", False), ("no", False)])
def test_address_check_sees_32_bit_products(widen: str, expected: bool) -> None:
    assert static.addresses_are_64_bit(compile_control(addressed, 4095, WIDEN=widen)) is expected


def test_address_check_needs_an_address_to_judge() -> None:
    assert not static.addresses_are_64_bit(compile_control(hungry))


def test_prediction_agrees_with_the_counting_model() -> None:
    """59 and 99 instructions per element are exactly memory-bound; 65 and 123 are 90 % and 80 %."""
    for moved, balanced, more, share in ((6, 59, 65, 0.9), (10, 99, 123, 0.8)):
        base = static.Counts(
            issued=balanced, fp32=0, special=0, half_rate=0, memory=0, loads=(moved,), stores=(),
            opcodes={}, elements=1, looped=True, iterations=1, before=0, after=0, spills=0,
            registers=0, local_bytes=0, shared_bytes=0,
        )  # fmt: skip
        seconds = static.predict(base).seconds
        assert seconds["issue"] == pytest.approx(seconds["memory"], rel=0.01)
        busier = static.predict(dataclasses.replace(base, issued=more))
        assert busier.bound == "issue"
        assert busier.bandwidth_share == pytest.approx(share, abs=0.01)
        special = static.predict(dataclasses.replace(base, special=balanced))
        assert special.bound == "special"


def test_report_has_no_numbers_for_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    options = parser.parse_args(["--variant", "type1", "--width", "64"])
    errors = {"type1 D=64": {"hidden": 1e-3, "grad_preact": float("nan")}}
    monkeypatch.setattr(report, "measured_errors", lambda *_: errors)
    with pytest.raises(SystemExit, match="grad_preact"):
        report.run(options)
    errors["type1 D=64"]["grad_preact"] = 1e-3
    assert json.loads(json.dumps(report.run(options)))["kernels"][0]["width"] == 64


_ROUNDING = """
import torch, triton, triton.language as tl
import sys; sys.path.insert(0, sys.argv[1])
from rounding import store
x = 1 + torch.arange(8) * 2.0**-9
y = torch.empty(8, dtype=torch.bfloat16)
store[(1,)](x, y)
print(y.float().tolist() == ((x.view(torch.int32) & -65536).view(torch.float32)).tolist(),
      y.equal(x.bfloat16()))
"""
_STORE = """
import triton, triton.language as tl
@triton.jit
def store(x, y):
    i = tl.arange(0, 8)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))
"""


def test_the_interpreter_truncates_to_bf16(tmp_path: Any) -> None:
    """Why the report's bound for bf16 is twice what one rounding to nearest would need."""
    (tmp_path / "rounding.py").write_text(_STORE)
    done = subprocess.run(
        [sys.executable, "-c", _ROUNDING, str(tmp_path)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False"]
