"""Validation during training: losses on every set, for each routing mode, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch.distributed as dist

from megamor.config import TrainConfig
from megamor.data.loader import MicroBatch, ValidationSet
from megamor.evaluate.loss import mean_figures, modes_of, perplexity, summed_loss
from megamor.model import Transformer
from megamor.parallel import Backend
from megamor.routing import Mode

VALIDATION = "validation/"
"""Prefix of the names of validation metrics."""


@dataclass(frozen=True)
class ValidationLosses:
    """`figures` holds those of `mean_figures` for each set and routing mode."""

    figures: dict[str, dict[Mode, dict[str, float]]]
    suffix: str = ""
    """Ends the names of the metrics: `_average` for those of the averaged weights."""

    @property
    def of_set(self) -> dict[str, dict[Mode, float]]:
        """The losses of each set by routing mode, in nats per token."""
        return {name: {mode: found["loss"] for mode, found in modes.items()} for name, modes in self.figures.items()}

    @property
    def mean(self) -> float:
        """Mean over the sets of the loss under the inference rule."""
        return fmean(losses["causal"] for losses in self.of_set.values())

    def metrics(self) -> dict[str, float | int | None]:
        """Metrics to log. The gap is what it costs that the router can't look ahead at inference."""
        found: dict[str, float | int | None] = {
            f"{VALIDATION}{name}/{figure}_{mode}": value
            for name, modes in self.figures.items()
            for mode, figures in modes.items()
            for figure, value in figures.items()
        }
        for name, losses in self.of_set.items():
            if "topk" in losses:
                found[f"{VALIDATION}{name}/gap"] = losses["causal"] - losses["topk"]
        return {name + self.suffix: value for name, value in found.items()}

    def lines(self) -> Iterator[str]:
        """A line to print for each set."""
        of = self.suffix.replace("_", " of the ")
        for name, losses in self.of_set.items():
            shown = ", ".join(f"{mode} {loss:.4f}" for mode, loss in losses.items())
            if "topk" in losses:
                shown += f", gap {losses['causal'] - losses['topk']:+.4f}"
            causal = self.figures[name]["causal"]
            depth = f", depth {causal['mean_depth']:.2f}" if any("gate_1" in name for name in causal) else ""
            yield (
                f"validation loss{of} on {name}: {shown} nats/token (perplexity {perplexity(losses['causal']):.1f})"
                f"{depth}, {causal['flops_per_token']:.3e} FLOPs/token"
            )


def validation_losses(
    model: Transformer,
    backend: Backend,
    validation: Mapping[str, ValidationSet],
    config: TrainConfig,
    before_batch: Callable[[], None],
    suffix: str = "",
) -> ValidationLosses:
    """Means over at most `train.eval_sequences` windows of each set. Collective.

    `before_batch` is called before each batch and may raise to abandon the evaluation. All ranks have equally many
    batches, so it may use collectives.
    """

    def figures(data: ValidationSet, mode: Mode) -> dict[str, float]:
        batches = data.batches(backend.rank, backend.world_size, config.micro_batch_size, config.eval_sequences)
        announced = _announced(batches, before_batch)
        total = summed_loss(backend.model, announced, mode, backend.device, backend.forward_context)
        if dist.is_initialized():
            dist.all_reduce(total)
        return mean_figures(model.config, total)

    backend.model.eval()
    try:
        return ValidationLosses(
            {name: {mode: figures(data, mode) for mode in modes_of(model)} for name, data in validation.items()}, suffix
        )
    finally:
        backend.model.train()


def _announced(batches: Iterable[MicroBatch], before_batch: Callable[[], None]) -> Iterator[MicroBatch]:
    for batch in batches:
        before_batch()
        yield batch
