"""How a training run shows its metrics in the progress display."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType

from megamor.metrics.sinks import Metrics
from megamor.progress import ProgressDisplay, format_count

LOSS, MFU = "train/loss", "throughput/mfu"

# Metric -> its label and format, in the order of the display.
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    LOSS: ("loss", "{:.4f}".format),
    "train/lr": ("lr", "{:.2e}".format),
    "train/grad_norm": ("grad", "{:.2f}".format),
    "throughput/tokens_per_second": ("tok/s", format_count),
    "routing/mean_depth": ("depth", "{:.2f}".format),
    "memory/peak_gib": ("mem", "{:.2f} GiB".format),
    MFU: ("mfu", "{:.1%}".format),
}


class TrainingDisplay:
    """Shows the newest value of the most telling metrics beside the steps done."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display = display
        self._values: dict[str, float | None] = {MFU: None}
        self._mean_loss = self._weight = 0.0

    def __enter__(self) -> TrainingDisplay:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)

    def update(self, step: int, metrics: Metrics) -> None:
        """Show that `step` is done; metrics that aren't given keep their last value."""
        self._values.update(metrics)
        loss = metrics.get(LOSS)
        # A loss that isn't a number must be seen at once instead of being smoothed away.
        if loss is not None and math.isfinite(loss):
            self._mean_loss = 0.9 * self._mean_loss + 0.1 * loss
            self._weight = 0.9 * self._weight + 0.1
            self._values[LOSS] = self._mean_loss / self._weight
        self._display.update(step, self._figures())

    def message(self, text: str) -> None:
        """Print `text` above the bar, or as a line of its own."""
        self._display.message(text)

    def _figures(self) -> dict[str, str]:
        values = {metric: self._values.get(metric) for metric in _FIGURES}
        return {
            label: "n/a" if value is None else text(value)
            for (metric, value), (label, text) in zip(values.items(), _FIGURES.values(), strict=True)
            if value is not None or metric == MFU
        }
