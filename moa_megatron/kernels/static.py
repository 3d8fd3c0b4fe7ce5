"""What the Triton kernels' machine code does, without a GPU: compile ahead of time, count, predict.

Kernels are compiled with the arguments that ``triton_op`` would launch them with, through Triton's
own argument specialisation, so that the code counted is the code that runs. Counts are per output
element of the mixture: instructions a lane issues, over the elements it computes.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from moa_megatron.config import MoAConfig
from moa_megatron.kernels import sass, triton_kernels, triton_op
from moa_megatron.kernels.triton_math import INTERPRETED

Direction = Literal["forward", "backward"]
LANES = 32
ROWS_SEEN = 4096  # rows of the batch compiled for; only its divisibility by 16 can matter


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture; sizes in bytes, ``lane_elements`` for a whole row."""

    name: str
    arch: int
    ttir: str
    ptx: str
    cubin: bytes = field(repr=False)
    bytes_stored: int  # per output element
    lane_elements: int  # output elements per lane and row, those beyond D included
    tile: Mapping[str, int] = field(default_factory=dict)

    @functools.cached_property
    def code(self) -> str:
        """The machine code, as nvdisasm writes it."""
        return sass.tool("nvdisasm", "-c", "-ndf", cubin=self.cubin)

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """What cuobjdump reports: REG in registers per lane; STACK, LOCAL, SHARED in bytes."""
        text = sass.tool("cuobjdump", "-res-usage", cubin=self.cubin)
        return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


@dataclass(frozen=True)
class Counts:
    """Per output element in the main loop, unless said otherwise; see ``count``."""

    issued: float  # all, those of the uniform datapath included
    fp32: float
    special: float  # MUFU; forms on two halves count twice
    half_rate: float
    memory: float
    loads: tuple[int, ...]  # bytes of each global load of one iteration
    stores: tuple[int, ...]
    opcodes: dict[str, int]  # of one iteration
    elements: int  # per lane and iteration
    looped: bool  # False: unrolled completely, and the iteration is the whole kernel
    iterations: int  # for a whole row
    before: int  # instructions
    after: int
    spills: int  # instructions on local memory, in the whole kernel
    registers: int  # per lane
    local_bytes: int  # per lane
    shared_bytes: int  # per program

    @property
    def bytes_moved(self) -> float:
        """Between memory and chip, per element."""
        return sum(self.loads + self.stores) / self.elements

    def per_row_total(self, width: int) -> float:
        """Instructions per element of a whole row of ``width``, idle lanes included."""
        body = self.issued * self.elements
        return (self.before + self.iterations * body + self.after) * LANES / width


@dataclass(frozen=True)
class GpuFigures:
    """Lanes are operations per SM and clock; ``bandwidth`` in bytes/s is what a copy reaches."""

    multiprocessors: int
    clock: float  # Hz
    issue_lanes: int
    fp32_lanes: int
    half_rate_lanes: int
    special_lanes: int
    bandwidth: float

    def seconds(self, operations: float, lanes: int) -> float:
        return operations / (self.multiprocessors * self.clock * lanes)


# H100 SXM: 132 SMs with 128 FP32 lanes (H100 whitepaper), throughputs of compute capability 9.0
# (CUDA C++ Programming Guide); clock under load and copy bandwidth are assumptions, to be measured.
H100 = GpuFigures(132, 1.75e9, 128, 128, 64, 16, 3.0e12)


@dataclass(frozen=True)
class Prediction:
    """Seconds per element that each resource alone would take; the longest is the bound."""

    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def bandwidth_share(self) -> float:
        """Of what a copy reaches, at most, in 0..1."""
        return self.seconds["memory"] / self.seconds[self.bound]


def compile_kernel(
    direction: Direction,
    config: MoAConfig,
    width: int,
    dtype: torch.dtype,
    arch: int,
    rows: int | None = None,
    weighted: bool = False,
    aligned: bool | None = None,
) -> Compiled:
    """The kernel that ``triton_op`` launches for D = ``width``, compiled for sm_``arch``.

    ``rows`` are rows, and warps, per program; None takes the default. ``aligned=False`` gives the
    tensors a row stride that rules out 16-byte accesses; None takes contiguous ones.

    Raises:
        ValueError: if ``aligned`` is True and ``width`` forbids it.
        RuntimeError: under TRITON_INTERPRET=1, where there is nothing to compile.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: Triton interprets kernels; unset it")
    name, tensors, strides, fixed = _launch(direction, config, width, dtype, weighted, aligned)
    if aligned and fixed["FORM"] != 0:
        raise ValueError(
            f"aligned=True, width={width}: rows of {dtype} are no multiple of 16 bytes"
        )
    rows = rows or triton_op.DEFAULT[name]
    return compile_arguments(
        getattr(triton_kernels, name),
        (*tensors, *strides),
        fixed | {"ROWS": rows},
        arch,
        bytes_stored=dtype.itemsize * (1 + config.gated if direction == "backward" else 1),
        lane_elements=math.ceil(width / (LANES * fixed["VEC"])) * fixed["VEC"],
        options={"num_warps": rows},
    )


def compile_arguments(
    kernel: Any,
    arguments: Sequence[Any],
    fixed: Mapping[str, Any],
    arch: int,
    *,
    bytes_stored: int,
    lane_elements: int,
    options: Mapping[str, Any],
) -> Compiled:
    """Any ``triton.jit`` kernel, specialised by Triton for ``arguments`` as at a launch."""
    target = GPUTarget("cuda", arch, LANES)
    backend = make_backend(target)
    words = {**fixed, **options}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(*arguments, **words)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, words, bound, specialisation, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    asm = triton.compile(source, target=target, options=parsed.__dict__).asm
    return Compiled(
        name=kernel.__name__,
        arch=arch,
        ttir=asm["ttir"],
        ptx=asm["ptx"],
        cubin=asm["cubin"],
        bytes_stored=bytes_stored,
        lane_elements=lane_elements,
        tile={key: fixed[key] for key in ("FORM", "VEC", "UNIT", "ROWS") if key in fixed},
    )


def count(compiled: Compiled) -> Counts:
    """Counts the main loop: the innermost loop of the machine code that stores the most.

    Elements per iteration come from the bytes it stores, whatever the compiler unrolled. Branches
    inside are counted as taken by some lane: all instructions between the loop's ends.
    """
    code, loops = sass.parse(compiled.code)
    stored = {loop: sum(sass.widths(code[loop[0] : loop[1] + 1], "STG")) for loop in loops}
    main = max(stored, key=lambda loop: stored[loop], default=None)
    if main is None or not stored[main]:
        first, last, elements, looped = 0, len(code) - 1, compiled.lane_elements, False
        looped_elements = elements
    else:
        first, last, looped = *main, True
        elements = stored[main] // compiled.bytes_stored
        columns = sass.loop_length(compiled.ttir)
        looped_elements = compiled.lane_elements if columns is None else columns // LANES
    body = code[first : last + 1]
    opcodes = Counter(sass.opcode(line) for line in body)
    special = sum(2 if "16x2" in line else 1 for line in body if sass.opcode(line) == "MUFU")
    everywhere = Counter(sass.opcode(line) for line in code)
    used = compiled.resources
    memory = {"LDG", "STG", "LDS", "STS", "LDL", "STL", "LD", "ST", "ATOMG", "RED"}
    return Counts(
        issued=len(body) / elements,
        fp32=sum(opcodes[name] for name in sass.FP32) / elements,
        special=special / elements,
        half_rate=sum(opcodes[name] for name in sass.HALF_RATE) / elements,
        memory=sum(opcodes[name] for name in memory) / elements,
        loads=sass.widths(body, "LDG"),
        stores=sass.widths(body, "STG"),
        opcodes=dict(opcodes.most_common()),
        elements=elements,
        looped=looped,
        iterations=math.ceil(looped_elements / elements),
        before=first,
        after=len(code) - 1 - last,
        spills=everywhere["LDL"] + everywhere["STL"],
        registers=used["REG"],
        local_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=used["SHARED"],
    )


def predict(counts: Counts, figures: GpuFigures = H100, width: int | None = None) -> Prediction:
    """Seconds per element for the loop alone, or for whole rows of ``width``.

    Each resource is taken as busy without a gap: lower limits of time, not estimates of latency.
    """
    total = counts.issued if width is None else counts.per_row_total(width)
    return Prediction(
        {
            "memory": counts.bytes_moved / figures.bandwidth,
            "issue": figures.seconds(total, figures.issue_lanes),
            "fp32": figures.seconds(counts.fp32, figures.fp32_lanes),
            "half rate": figures.seconds(counts.half_rate, figures.half_rate_lanes),
            "special": figures.seconds(counts.special, figures.special_lanes),
        }
    )


def addresses_are_64_bit(compiled: Compiled) -> bool:
    """Whether all addresses that depend on the program's number are computed in 64 bits."""
    return sass.offsets_are_64_bit(compiled.ttir)


def _launch(
    direction: Direction,
    config: MoAConfig,
    width: int,
    dtype: torch.dtype,
    weighted: bool,
    aligned: bool | None,
) -> tuple[str, tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """What ``triton_op`` launches for tensors of this shape: kernel, arguments, constants."""

    def empty(columns: int) -> torch.Tensor:
        stride = columns + (aligned is False)
        return torch.empty_strided((ROWS_SEEN, columns), (stride, 1), dtype=dtype, device="meta")

    preact = empty(width * (1 + config.gated))
    learned = config.mixing == "la"
    coefficients = torch.empty(
        (config.num_coefficients,) if learned else (ROWS_SEEN, config.num_coefficients),
        device="meta",
    )
    weight = torch.empty(ROWS_SEEN, device="meta") if weighted else None
    seen: list[Any] = []
    with mock.patch.object(triton_op, "_launch", lambda *words: seen.append(words)):
        if direction == "forward":
            triton_op.forward(preact, coefficients, weight, config)
        else:
            triton_op.backward(empty(width), preact, coefficients, weight, config)
    name, _, tensors, strides, fixed = seen[0]
    return name, tensors, strides, fixed
