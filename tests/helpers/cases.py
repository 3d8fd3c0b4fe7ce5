"""What a parallel test is made of: a tiny model and a layout. Needs neither Megatron nor torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moa_megatron.config import MoAConfig

SEQUENCE = 16
GLOBAL_BATCH = 4
VOCABULARY = 64
EXPERTS = 8
STEPS = 2
# Options of the masked autoencoder's cases, as vision transformers have it.
MAE_OPTIONS = (
    ("add_bias_linear", True),
    ("normalization", "LayerNorm"),
    ("layernorm_epsilon", 1e-6),
)
# Small gate vectors hide a wrong reduction: its share in every other gradient shrinks with them.
GATE_STD = 0.3


def moa(**choices: Any) -> MoAConfig:
    """A config with gate vectors large enough to matter, and the implementation of record."""
    return MoAConfig(**{"gate_init_std": GATE_STD, "backend": "reference", **choices})


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; ``data`` is their share of data parallelism."""

    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    data: int = 1
    sharded_optimizer: bool = False

    @property
    def ranks(self) -> int:
        """World size; expert parallelism divides the tensor, context and data ranks anew."""
        return self.tp * self.cp * self.pp * self.data


@dataclass(frozen=True)
class Model:
    """A tiny model and how it is trained.

    Args:
        family: HybridModel, GPTModel, or the masked autoencoder.
        moe: mixture-of-experts feedforward layers with a shared expert, or dense ones.
        moa: settings of the method.
        options: further fields of TransformerConfig, as pairs so that a model can be a key.
        engine: on Transformer Engine's modules.
        optimizer: sgd, adam where the distributed optimizer takes nothing else, or muon as recipes
            use it.
    """

    family: Literal["hybrid", "gpt", "mae"] = "hybrid"
    moe: bool = False
    moa: MoAConfig = field(default_factory=moa)
    options: tuple[tuple[str, Any], ...] = ()
    optimizer: Literal["sgd", "adam", "muon"] = "sgd"
    engine: bool = False


ONE_RANK = Layout()
