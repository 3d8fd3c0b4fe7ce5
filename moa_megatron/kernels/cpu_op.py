"""The CPU backend: builds ``cpu.cpp`` once per config and machine, and calls it."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from moa_megatron.config import MoAConfig
from moa_megatron.kernels import basis

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("cpu.cpp", "cpu_blocks.h", "cpu_math.h")
)
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fschedule-insns",
    "-fsched-pressure",
    "-w",
)
_FIX = "install g++, or run with --moa-backend reference"
_VARIANTS = ("type1", "one", "bi", "qd")
_GATES = ("sigmoid", "tanh", "softmax", "none")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    """Why these kernels cannot run here, with the fix, or None when they can."""
    compiler = _compiler()
    if compiler is None:
        return f"no C++ compiler ($CXX, g++ or clang++) on PATH: {_FIX}"
    proof = _cache() / f"probed-{hashlib.sha256(_machine().encode()).hexdigest()[:32]}"
    if proof.exists() and os.access(proof.parent, os.W_OK):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <cmath>\n#include <omp.h>\nint threads = omp_get_max_threads();\n"
        )
        command = [compiler, *FLAGS, str(source), "-o", f"{folder}/probe.so"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "it fails")
        return f"{compiler} builds no OpenMP library ({reason.strip()}): {_FIX}"
    try:
        proof.parent.mkdir(parents=True, exist_ok=True)
        proof.touch()
    except OSError as error:
        return f"kernels cannot be kept ({error}): name a writable folder by XDG_CACHE_HOME"
    return None


def compiler_version() -> str | None:
    """First line of what the compiler says of itself, None where there is none."""
    compiler = _compiler()
    return _version(compiler).splitlines()[0] if compiler else None


def prepare(config: MoAConfig) -> float:
    """Builds and loads the kernels of ``config``; returns the seconds this took, 0 if they were.

    Raises:
        RuntimeError: when they cannot be built, with the compiler's output and the fix.
    """
    start = time.perf_counter()
    cached = _path(config).exists()
    _library(config)
    return 0.0 if cached else time.perf_counter() - start


def forward(
    preact: Tensor, coefficients: Tensor, token_weight: Tensor | None, config: MoAConfig
) -> Tensor:
    """Hidden [N, D] from pre-activations [N, P], coefficients [N, n] or [n], token weights [N].

    Raises:
        RuntimeError: when the kernels cannot be built, with the compiler's output and the fix.
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    library, dtype = _library(config), _dtype(preact)
    preact, logits = _rows(preact), _plain(coefficients)
    weight = None if token_weight is None else _plain(token_weight)
    rows, width = len(preact), preact.shape[1] // (1 + config.gated)
    hidden = preact.new_empty(rows, width)
    library.moa_forward(
        *_place(preact),
        *_place(logits),
        _pointer(weight),
        _pointer(hidden),
        ctypes.c_int64(rows),
        ctypes.c_int64(width),
        dtype,
        torch.get_num_threads(),
    )
    return hidden


def backward(
    grad: Tensor,
    preact: Tensor,
    coefficients: Tensor,
    token_weight: Tensor | None,
    config: MoAConfig,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of pre-activations, coefficients and token weights, each in its input's dtype.

    Raises:
        RuntimeError: when the kernels cannot be built, with the compiler's output and the fix.
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    library, dtype = _library(config), _dtype(preact)
    grad, preact = _rows(grad.to(preact.dtype)), _rows(preact)
    logits = _plain(coefficients)
    weight = None if token_weight is None else _plain(token_weight)
    rows, width = len(preact), preact.shape[1] // (1 + config.gated)
    grad_preact = preact.new_empty(preact.shape)
    grad_logits = logits.new_empty(rows, config.num_coefficients)
    grad_weight = None if weight is None else torch.empty_like(weight)
    library.moa_backward(
        *_place(grad),
        *_place(preact),
        *_place(logits),
        _pointer(weight),
        _pointer(grad_preact),
        _pointer(grad_logits),
        _pointer(grad_weight),
        ctypes.c_int64(rows),
        ctypes.c_int64(width),
        dtype,
        torch.get_num_threads(),
    )
    if config.mixing == "la":
        total = torch.empty(config.num_coefficients, dtype=torch.float32)
        library.moa_sum_rows(_pointer(grad_logits), _pointer(total), ctypes.c_int64(rows))
        grad_logits = total
    if grad_weight is not None and token_weight is not None:
        grad_weight = grad_weight.to(token_weight.dtype)
    return grad_preact, grad_logits.to(coefficients.dtype), grad_weight


def _dtype(preact: Tensor) -> int:
    if preact.dtype not in _DTYPES:
        raise ValueError(f"preact.dtype={preact.dtype}: this kernel takes {_DTYPES}")
    return _DTYPES.index(preact.dtype)


def _rows(tensor: Tensor) -> Tensor:
    """[N, width] whose rows are contiguous; they may lie apart."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _place(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """Address and row stride in elements, 0 where all rows share one."""
    stride = tensor.stride(0) if tensor.dim() == 2 else 0
    return _pointer(tensor), ctypes.c_int64(stride)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _list(values: tuple[float, ...]) -> str:
    return "{" + ",".join(f"{float(value)!r}f" for value in values) + "}"


def _constants(config: MoAConfig) -> tuple[str, ...]:
    """What the source is compiled for, as ``-D`` flags."""
    rows = [basis.expansion(name, config.leaky_slope) for name in config.names]
    gate = config.gate if config.mixing == "moa" else "none"
    return (
        f"-DMOA_VARIANT={_VARIANTS.index(config.variant)}",
        f"-DMOA_GATE={_GATES.index(gate)}",
        f"-DMOA_K={len(rows)}",
        f"-DMOA_MATRIX={{{','.join(_list(row) for row in rows)}}}",
        f"-DMOA_TAIL_FINE={_list(basis.TAIL_FINE)}",
        f"-DMOA_TAIL_COARSE={_list(basis.TAIL_COARSE)}",
    )


def _compiler() -> str | None:
    """Full path of $CXX, else g++, else clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


@functools.cache
def _machine() -> str:
    """What ``-march=native`` depends on: the compiler's version, the CPU's model and its flags."""
    compiler = _compiler() or ""
    described = [compiler, _version(compiler), platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        wanted = ("model name", "flags", "Features", "CPU part")
        described += sorted(
            {line for line in cpuinfo.read_text().splitlines() if line.startswith(wanted)}
        )
    return "\n".join(described)


def _path(config: MoAConfig) -> Path:
    """Where the library of ``config`` is, or will be."""
    return _cache() / f"{_key(config, _machine())}.so"


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "moa_megatron" / "kernels"


@functools.cache
def _key(config: MoAConfig, machine: str) -> str:
    parts = [machine, *FLAGS, *_constants(config), *(path.read_text() for path in SOURCES)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _library(config: MoAConfig) -> ctypes.CDLL:
    """The loaded kernels of ``config``, built first where needed."""
    path = _path(config)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Of the ranks of a machine one compiles, the others wait for its library.
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _build(config, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(
            f"MoA kernels for the CPU: {error}; name a folder for written and loaded files "
            "by XDG_CACHE_HOME, or run with --moa-backend reference"
        ) from error


def _build(config: MoAConfig, path: Path) -> None:
    """Compiles beside ``path`` and moves the library there, so that none is loaded half-written."""
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError(f"MoA kernels for the CPU: {unavailable()}")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, "kernels.so")
        command = [compiler, *FLAGS, *_constants(config), str(SOURCES[0]), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"MoA kernels for the CPU: {compiler} failed (exit code {done.returncode}); "
                f"run with --moa-backend reference, or mend the compiler.\n"
                f"{' '.join(command)}\n{done.stdout}{done.stderr}"
            )
        os.replace(built, path)
