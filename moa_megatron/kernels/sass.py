"""Reads what Triton's compiler writes: machine code (SASS) and the intermediate form (TTIR)."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence

from triton.backends import nvidia

# Pipe of 128 lanes per SM and clock on sm_90.
FP32 = {"FFMA", "FADD", "FMUL", "FFMA32I", "FADD32I", "FMUL32I", "FFMA2", "FADD2", "FMUL2"}
# What the ALU pipe executes, 64 lanes per SM and clock: "most bit manipulation and logic", integer
# work but IMAD, comparisons, selects and FP32 to FP16/BF16 packing (Nsight Compute, "Pipelines";
# CUDA C++ Programming Guide, "Arithmetic Instructions", compute capability 9.0). IMAD, also when
# it moves a register, runs in half of the FMA pipe and is in ``issued`` only.
HALF_RATE = {
    *("FMNMX", "FMNMX3", "FSEL", "SEL", "FSET", "FSETP", "FCHK", "PRMT", "LOP", "LOP3", "PLOP3"),
    *("SHF", "SHL", "SHR", "IADD", "IADD3", "VIADD", "LEA", "ISETP", "IMNMX", "VIMNMX", "VIMNMX3"),
    *("IABS", "BMSK", "SGXT", "F2FP", "I2FP", "MOV", "P2R", "R2P", "HMNMX2", "HSET2", "HSETP2"),
}
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[T0-9]+\s+)?(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\S+):")
_JUMP = re.compile(r"^BRA\S*\s.*?(\.L_\w+)")


def parse(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions without guards and padding, and innermost loops as (first, last) index."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(found.group(1))
    jumps = [
        (labels[found.group(1)], index)
        for index, line in enumerate(code)
        if (found := _JUMP.match(line)) and found.group(1) in labels
    ]
    end = next((at for at, index in jumps if at == index), len(code))  # the jump to itself
    loops = [(at, index) for at, index in jumps if at < index < end]
    innermost = [
        loop
        for loop in loops
        if not any(loop != other and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
    return code[:end], innermost


def offsets_are_64_bit(ttir: str) -> bool:
    """Whether every address that depends on the program's number is computed in 64 bits.

    True if such addresses exist and, in the TTIR, each of their offsets is i64 and follows from the
    program's number by i64 additions, multiplications and shifts only.
    """
    operations = _operations(ttir)

    @functools.cache
    def depends(name: str) -> bool:
        operation, operands, _ = operations.get(name, ("", (), ""))
        return operation == "tt.get_program_id" or any(map(depends, operands))

    @functools.cache
    def sound(name: str) -> bool:
        operation, operands, types = operations.get(name, ("", (), ""))
        narrow = re.match(r"arith\.(muli|addi|subi|shli|trunci)", operation) and (
            operation == "arith.trunci" or not re.search(r"\bi64\b|xi64>", types)
        )
        return not narrow and all(sound(each) for each in operands if depends(each))

    offsets = [
        (operands[1], types)
        for operation, operands, types in operations.values()
        if operation == "tt.addptr" and depends(operands[1])
    ]
    return bool(offsets) and all(
        sound(offset) and re.search(r"i64>?$", types.strip()) for offset, types in offsets
    )


def _operations(ttir: str) -> dict[str, tuple[str, tuple[str, ...], str]]:
    """Each TTIR value's operation, operands and types; of loop variables, where they start."""
    found: dict[str, tuple[str, tuple[str, ...], str]] = {}
    for line in ttir.splitlines():
        text = re.sub(r" loc\(.*$", "", line.strip())
        loop = re.search(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)", text)
        if loop:
            found[loop.group(1)] = ("scf.for", loop.groups()[1:], "")
            carried = re.findall(r"(%\w+) = (%[\w#]+)", text.partition("iter_args(")[2])
            found.update({name: ("scf.for", (start,), "") for name, start in carried})
        elif named := re.match(r"(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)", text):
            operands, _, types = named.group(3).rpartition(" : ")
            names = tuple(re.findall(r"%\w+", operands))
            found[named.group(1)] = (named.group(2), names, types)
    return found


def loop_length(ttir: str) -> int | None:
    """How far the loop variable of the only loop with constant bounds runs; None without one."""
    values = dict(re.findall(r"(%\w+) = arith\.constant (-?\d+) : i\d+", ttir))
    bounds = re.findall(r"scf\.for %\w+ = (%\w+) to (%\w+) step", ttir)
    lengths = [int(values[to]) - int(values[at]) for at, to in bounds if {at, to} <= set(values)]
    return lengths[0] if len(lengths) == 1 else None


def opcode(line: str) -> str:
    """Without its modifiers."""
    return line.split()[0].split(".")[0]


def widths(code: Sequence[str], name: str) -> tuple[int, ...]:
    """Bytes per lane of each instruction with this opcode."""
    return tuple(
        next((_BYTES[word] for word in line.split()[0].split(".") if word in _BYTES), 4)
        for line in code
        if opcode(line) == name
    )


def tool(name: str, *words: str, cubin: bytes) -> str:
    """Output of one of the CUDA tools that Triton ships, for a cubin."""
    path = os.path.join(os.path.dirname(nvidia.__file__), "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [path, *words, file.name], check=True, capture_output=True, text=True
        ).stdout
