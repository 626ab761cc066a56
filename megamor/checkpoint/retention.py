"""Which checkpoints of a run are kept, and the validation losses that the choice depends on."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamor.checkpoint.layout import LOSSES_FILE, draft_of
from megamor.errors import CheckpointError
from megamor.files import replace_file


@dataclass(frozen=True)
class Retention:
    """Keeps the newest `last` checkpoints, those of every `every`-th step, and the `best` by validation loss."""

    last: int
    every: int | None = None
    best: int = 0

    def expired(self, steps: Sequence[int], damaged: Collection[int], losses: Mapping[int, float]) -> list[int]:
        """Those of the ascending `steps` to delete. A damaged one doesn't count among the newest, nor as a best."""
        whole = [step for step in steps if step not in damaged]
        kept = set(self.ranked(whole, losses)[: self.best])
        if self.every:
            kept |= {step for step in steps if step % self.every == 0}
        return [step for step in steps if step < whole[-self.last :][0] and step not in kept]

    @staticmethod
    def ranked(steps: Sequence[int], losses: Mapping[int, float]) -> list[int]:
        """Those of `steps` whose loss is known, the lowest first."""
        return sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))


def read_losses(root: Path) -> dict[int, float]:
    """Validation loss by step.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = root / LOSSES_FILE
    if not path.exists():
        return {}
    try:
        return {int(step): float(loss) for step, loss in json.loads(path.read_bytes()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it, and `best` is chosen from the losses of later evaluations"
        ) from error


def write_losses(root: Path, losses: Mapping[int, float]) -> None:
    """Replace the file that `read_losses` reads."""
    content = {str(step): loss for step, loss in sorted(losses.items())}
    replace_file(root / LOSSES_FILE, json.dumps(content, indent=1) + "\n", draft_of(root / LOSSES_FILE))
