"""How a training run shows its metrics in the progress display."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from rich.console import Console

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


class TrainingDisplay(ProgressDisplay):
    """Shows the newest values of the most telling metrics beside the steps done."""

    def __init__(
        self,
        name: str,
        total_steps: int,
        *,
        start: int,
        enabled: bool,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Compilation can make the first step take minutes, so a log file shows at once that it is over.
        super().__init__(
            name, total_steps, unit="steps", start=start, enabled=enabled, log_first=True, console=console, clock=clock
        )
        self._values: dict[str, float | None] = {MFU: None}
        self._mean_loss = self._weight = 0.0

    def show(self, step: int, metrics: Metrics) -> None:
        """Show that `step` is done; metrics that aren't given keep their last value."""
        self._values.update(metrics)
        loss = metrics.get(LOSS)
        # A loss that isn't a number must be seen at once instead of being smoothed away.
        if loss is not None and math.isfinite(loss):
            self._mean_loss = 0.9 * self._mean_loss + 0.1 * loss
            self._weight = 0.9 * self._weight + 0.1
            self._values[LOSS] = self._mean_loss / self._weight
        self.update(step, self._figures())

    def _figures(self) -> dict[str, str]:
        shown = {}
        for metric, (label, text) in _FIGURES.items():
            value = self._values.get(metric)
            if value is not None or metric == MFU:
                shown[label] = "n/a" if value is None else text(value)
        return shown
