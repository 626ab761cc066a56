"""Where metrics are written: always to `metrics.jsonl`, on request to TensorBoard and to `trackers`.

A metric is a number under a flat name such as `train/loss`; None means that there is no value.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megamor.errors import ConfigError
from megamor.files import replace_file

log = logging.getLogger("megamor.metrics")

Metrics = Mapping[str, float | int | None]


class MetricSink(Protocol):
    """A destination of metrics, used by one process only."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Write `metrics` of `step`."""

    def rewind(self, step: int) -> None:
        """Remove what was logged after `step`, if the sink can: those steps will run again."""

    def close(self) -> None:
        """Flush and close; nothing may be logged afterwards."""


class JsonlSink:
    """One JSON object per line: `{"step": 3, "time": 1700000000.0, "train/loss": 5.2, …}`, flushed line by line.

    None is `null`; values that JSON lacks are the strings `"nan"`, `"inf"`, `"-inf"`, which `float()` reads.

    Args:
        path: the file; appended to.
        resume_step: step of the checkpoint that the run resumes from. Lines of later steps are removed, since those
            steps will run again. None: a new run, which removes all lines.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_after(path, resume_step)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        # Flushed line by line, so that a kill loses no step that was reported, at the cost of one write per step.
        record = {"step": step, "time": round(time.time(), 3), **{name: _to_json(v) for name, v in metrics.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Remove the lines of later steps."""
        # The file is replaced by a shorter one, so the open handle would write to the old one.
        self._file.close()
        _drop_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars for TensorBoard, which hides the points after `resume_step` (as in `JsonlSink`)."""

    def __init__(self, directory: Path, *, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "metrics.tensorboard is on, but tensorboard is not installed: pip install tensorboard"
            ) from error
        self._open = partial(SummaryWriter, str(directory), flush_secs=30)
        self._writer: Any = self._open(purge_step=0 if resume_step is None else resume_step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        """Add a point to the curve of each metric that has a value."""
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        if depths := depth_histogram(metrics):
            counts, edges = depths
            total = sum(depth * count for depth, count in enumerate(counts))
            squares = sum(depth**2 * count for depth, count in enumerate(counts))
            self._writer.add_histogram_raw(
                "depth/histogram", 0, len(counts) - 1, sum(counts), total, squares, edges[1:], counts, step
            )

    def rewind(self, step: int) -> None:
        """Start a new event file, which hides the later points of the previous one."""
        self._writer.close()
        self._writer = self._open(purge_step=step + 1)

    def close(self) -> None:
        self._writer.close()


def depth_histogram(metrics: Metrics) -> tuple[list[float], list[float]] | None:
    """Fractions of the tokens at depth 0, 1, … and the edges of their bins; None where there are no depths."""
    counts: list[float] = []
    while (share := metrics.get(f"depth/{len(counts)}")) is not None:
        counts.append(share)
    return (counts, [depth - 0.5 for depth in range(len(counts) + 1)]) if counts else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file, with `"nan"` and the like as numbers again. An incomplete last line is skipped."""
    return [
        {name: float(v) if v in ("nan", "inf", "-inf") else v for name, v in record.items()}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if (record := _parse(line)) is not None
    ]


def _to_json(value: float | int | None) -> float | int | str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _drop_after(path: Path, resume_step: int | None) -> None:
    """Rewrite the file without lines after `resume_step` and without incomplete ones; all or nothing."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for line in lines:
        record = _parse(line) if line.endswith("\n") else None
        if record is not None and resume_step is not None and record["step"] <= resume_step:
            kept.append(line)
    removed = len(lines) - len(kept)
    if removed:
        log.warning("%s: %d of %d lines removed, because their steps will run again", path, removed, len(lines))
        replace_file(path, "".join(kept))
