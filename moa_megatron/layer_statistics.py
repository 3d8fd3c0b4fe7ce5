"""Statistics of every MoA and LA layer in TensorBoard; docs/telemetry.md explains the numbers.

``observing`` gathers them on each rank. At the end of a step that logs, two small all-reduces, of
sums and of maxima, bring them to all ranks; the last one writes. Other steps do nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import get_tensorboard_writer, get_wandb_writer
from torch import Tensor, nn

from moa_megatron import observing
from moa_megatron.config import MoAConfig
from moa_megatron.grouped import MoATEGroupedMLP
from moa_megatron.mlp import MoAMLP, MoASharedExpertMLP
from moa_megatron.telemetry import STATISTICS, coefficient_tag

Scalars = dict[str, float]
# Of the decoder of a masked autoencoder, whose layers have numbers of their own.
DECODER_DEPTH = 1000
# Columns behind the n + 3 of ``observing.gate_sums``: of weights, not of tokens.
_SQUARES, _GATES = range(3, 5)


class Place(NamedTuple):
    """Where an FFN stands: sorts as the model computes.

    ``depth`` is 0 in a language model's decoder and a masked autoencoder's encoder,
    ``DECODER_DEPTH`` in the latter's decoder, else that of multi-token prediction; ``number`` is
    Megatron's own layer number, for HybridModel one of attention and FFN layers alike; ``part`` is
    ``shared`` or ``routed`` in a MoE layer, else empty.
    """

    depth: int
    number: int
    part: str


class LayerStatistics:
    """Collects and writes the statistics of a run.

    Args:
        moa: settings of the method.
        interval: log steps that this divides.
        write: takes tags with their values, and the step; called on one rank, see ``to_writers``.
    """

    def __init__(
        self, moa: MoAConfig, interval: int, write: Callable[[Scalars, int], None] | None
    ) -> None:
        self.moa, self.interval, self.write = moa, interval, write
        self.step = 0
        self._places: list[Place] | None = None

    def watching(self, step: int) -> AbstractContextManager[None]:
        """Around the forward of a micro-batch of step ``step``, from 1; 0 stands for evaluation."""
        self.step = step
        return observing.recording() if self._logs() else nullcontext()

    def _logs(self) -> bool:
        return self.step > 0 and self.step % self.interval == 0

    def finish(self, chunks: Sequence[nn.Module]) -> None:
        """The end of a step, on every rank: reduces and writes, if the step logs.

        Args:
            chunks: the model chunks of this rank.
        """
        if not self._logs():
            return
        seen, mine = observing.take(), _modules(chunks)
        if self._places is None:
            self._places = _all_places(mine)
        sums, peaks = self._own(mine, seen, _device(chunks))
        dist.all_reduce(sums)
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        if self.write is not None:
            self.write(self._scalars(sums.tolist(), peaks.tolist()), self.step)

    def _own(
        self,
        mine: dict[Place, list[MoAMLP | MoATEGroupedMLP]],
        seen: dict[nn.Module, observing.Seen],
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """This rank's part: sums [places, n + 5] and amax [places, 2], zero where it has none."""
        assert self._places is not None
        n, count = self.moa.num_coefficients, len(self._places)
        sums = torch.zeros(count, n + 5, dtype=torch.float64, device=device)
        peaks = torch.zeros(count, 2, device=device)
        for place, modules in mine.items():
            row, peak = sums[self._places.index(place)], peaks[self._places.index(place)]
            for module in modules:
                if module.shows_gate:
                    self._add_weights(row, module)
                found = seen.get(module)
                if found is None:
                    continue
                peak.copy_(torch.maximum(peak, torch.stack([found.preact, found.hidden])))
                if found.gates is not None:
                    row[: n + 3] += found.gates
        # Backends disagree on the maximum of a number and NaN.
        return sums, peaks.nan_to_num(nan=float("inf"), posinf=float("inf"))

    def _add_weights(self, row: Tensor, module: MoAMLP | MoATEGroupedMLP) -> None:
        """Squared norms of gate vectors, or LA's scalars; replicas on other ranks count alike."""
        n = self.moa.num_coefficients
        for parameter in module.gate_in_use.parameters():
            weight = parameter.detach().double()
            if self.moa.mixing == "la":
                row[:n] += weight
            else:
                row[n + _SQUARES] += weight.square().sum()
            row[n + _GATES] += 1

    def _scalars(self, sums: list[list[float]], peaks: list[list[float]]) -> Scalars:
        """Tags and values, layer by layer, then over all layers."""
        assert self._places is not None
        names, scalars = _layer_names(self._places), {}
        saturated: list[float] = []
        for place, row, (preact, hidden) in zip(self._places, sums, peaks):
            part = f"/{place.part}" if place.part else ""
            layer = f"{STATISTICS}/{names[place[:2]]}"
            scalars[f"{layer}{part}/hidden_amax"] = hidden
            scalars[f"{layer}{part}/preact_amax"] = preact
            # One gate of a MoE layer is not its shared expert's alone.
            gates = self._of_gates(row)
            owner = part if self.moa.gate_scope == "expert" else ""
            scalars |= {f"{layer}{owner}/{name}": value for name, value in gates.items()}
            saturated += [v for name, v in gates.items() if name == "gate_saturated"]
        scalars[f"{STATISTICS}/hidden_amax"] = max(hidden for _, hidden in peaks)
        scalars[f"{STATISTICS}/preact_amax"] = max(preact for preact, _ in peaks)
        if saturated:
            scalars[f"{STATISTICS}/gate_saturated"] = sum(saturated) / len(saturated)
        return scalars

    def _of_gates(self, row: list[float]) -> Scalars:
        n = self.moa.num_coefficients
        names, extra = self.moa.coefficient_names(), row[n:]
        if not extra[_GATES]:
            return {}  # shown by the shared expert
        if self.moa.mixing == "la":
            return {
                coefficient_tag("coefficient", name): value / extra[_GATES]
                for name, value in zip(names, row)
            }
        found = {"gate_weight_norm": (extra[_SQUARES] / extra[_GATES]) ** 0.5}
        tokens = extra[observing.TOKENS]
        if tokens:
            found |= {coefficient_tag("gate_mean", m): v / tokens for m, v in zip(names, row)}
            found["gate_saturated"] = extra[observing.SATURATED] / tokens
            if self.moa.gate == "softmax":
                found["gate_entropy"] = extra[observing.ENTROPY] / tokens
        return found


_installed: LayerStatistics | None = None


def install(config: Any, moa: MoAConfig, interval: int) -> None:
    """Logs the run that is about to start.

    Megatron calls ``finalize_model_grads_func`` once a step on every rank, behind the last backward
    pass of every schedule, and keeps one that is set before.

    Args:
        config: Megatron's transformer config.
        moa: settings of the method.
        interval: steps from one record to the next; 0 logs nothing.
    """
    global _installed
    _installed = None
    if not interval or moa.mixing == "fixed":
        return
    writes = get_tensorboard_writer() is not None or get_wandb_writer() is not None
    _installed = LayerStatistics(moa, interval, to_writers if writes else None)
    config.finalize_model_grads_func = finishing(_installed)


def finishing(statistics: LayerStatistics) -> Callable[..., None]:
    """Megatron's ``finalize_model_grads``, then ``statistics.finish``."""

    def finalize(model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(model, *args, **kwargs)
        statistics.finish(model)

    return finalize


def watching(step: int) -> AbstractContextManager[None]:
    """``LayerStatistics.watching`` of what is installed."""
    return nullcontext() if _installed is None else _installed.watching(step)


def to_writers(scalars: Scalars, step: int) -> None:
    """To TensorBoard and Weights & Biases, as far as Megatron has them open on this rank."""
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard is not None:
        for tag, value in scalars.items():
            tensorboard.add_scalar(tag, value, step)
    if wandb is not None:
        wandb.log(scalars, step)


def _modules(chunks: Sequence[nn.Module]) -> dict[Place, list[MoAMLP | MoATEGroupedMLP]]:
    """The FFNs of this rank; a sequential MoE layer has one for each of its experts."""
    found: dict[Place, list[MoAMLP | MoATEGroupedMLP]] = {}
    for layer, depth in (item for chunk in chunks for item in _layers(chunk, 0)):
        for module in layer.modules():
            if isinstance(module, MoAMLP | MoATEGroupedMLP):
                place = Place(depth, layer.layer_number, _part(module))
                found.setdefault(place, []).append(module)
    return found


def _layers(module: nn.Module, depth: int) -> Iterator[tuple[Any, int]]:
    if isinstance(module, TransformerLayer):
        yield module, depth
        return
    if isinstance(module, MultiTokenPredictionLayer):
        depth = module.layer_number
    depth = getattr(module, "statistics_depth", depth)
    for child in module.children():
        yield from _layers(child, depth)


def _part(module: MoAMLP | MoATEGroupedMLP) -> str:
    if isinstance(module, MoASharedExpertMLP):
        return "shared"
    return "routed" if isinstance(module, MoATEGroupedMLP) or module.is_expert else ""


def _all_places(mine: dict[Place, Any]) -> list[Place]:
    """Those of all pipeline stages; other ranks hold the same layers as these."""
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[list[Place]] = [[] for _ in range(group.size())]
    dist.all_gather_object(stages, list(mine), group=group)
    return sorted({place for stage in stages for place in stage})


def _layer_names(places: Sequence[Place]) -> dict[tuple[int, int], str]:
    """Name by depth and number: FFNs counted from 1, which is what recipes call blocks."""
    names: dict[tuple[int, int], str] = {}
    for depth in sorted({place.depth for place in places}):
        numbers = sorted({place.number for place in places if place.depth == depth})
        for index, number in enumerate(numbers, start=1):
            several = f"_{index}" if len(numbers) > 1 else ""
            name = f"mtp_{depth:02}{several}" if depth else f"layer_{index:02}"
            if depth == DECODER_DEPTH:
                name = f"decoder_{index:02}"
            names[depth, number] = name
    return names


def _device(chunks: Sequence[nn.Module]) -> torch.device:
    return next(p.device for chunk in chunks for p in chunk.parameters())
