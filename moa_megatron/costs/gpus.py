"""GPUs: memory and dense peak rates as their vendor's data sheets give them, and assumed MFU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Args:
        title: name on the data sheet.
        memory: bytes, the data sheet's gigabytes taken as 10^9.
        bf16: peak of dense bf16 matrix products without sparsity, FLOP/s.
        fp8: the same for FP8; None where the GPU has none.
        mfu: assumed model FLOPs utilisation of dense models in bf16.
        source: data sheet.
    """

    title: str
    memory: float
    bf16: float
    fp8: float | None
    mfu: float
    source: str

    def peak(self, fp8: bool) -> float:
        """FLOP/s of the precision; a GPU without FP8 has none."""
        return self.bf16 if not fp8 or self.fp8 is None else self.fp8


_HOPPER = {"bf16": 989e12, "fp8": 1979e12}
_AMPERE = {"bf16": 312e12, "fp8": None, "mfu": 0.45, "source": "NVIDIA A100 data sheet"}
GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100 SXM5", 80e9, **_HOPPER, mfu=0.35, source="NVIDIA H100 data sheet"),
    "h200": Gpu("H200 SXM", 141e9, **_HOPPER, mfu=0.38, source="NVIDIA H200 data sheet"),
    "b200": Gpu("B200 in HGX", 180e9, 2250e12, 4500e12, 0.30, "NVIDIA HGX B200 data sheet"),
    "a100-40": Gpu("A100 SXM4 40GB", 40e9, **_AMPERE),  # type: ignore[arg-type]
    "a100-80": Gpu("A100 SXM4 80GB", 80e9, **_AMPERE),  # type: ignore[arg-type]
}

MOE_MFU = 0.5
"""Assumed: share of the dense MFU that fine-grained experts reach (small products, dispatch)."""
FP8_MFU = 0.65
"""Assumed: share of the bf16 MFU that FP8 reaches of its own, twice as high, peak."""


def assumed_mfu(gpu: Gpu, experts: bool, fp8: bool) -> float:
    """MFU for which nothing was measured: a planning value, to be replaced by ``--mfu``."""
    share = (MOE_MFU if experts else 1.0) * (FP8_MFU if fp8 and gpu.fp8 else 1.0)
    return gpu.mfu * share
