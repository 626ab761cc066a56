"""A recompilation in the middle of a run costs minutes and usually means that a shape changes which shouldn't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megamor.errors import TrainingError
from megamor.ranks import run_on_all_ranks


class RecompileWatch:
    """Ends the run when a training step compiles anything after the first `settled_after` steps of a launch.

    Evaluation, which has graphs of its own, doesn't count. None: it never ends a run, and costs nothing.
    """

    def __init__(self, settled_after: int | None, device: torch.device) -> None:
        self.settled_after, self.device = settled_after, device
        self.steps = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around training step `number`. Collective once steps must not compile any more.

        Raises:
            TrainingError: on every rank, when any has compiled something.
        """
        if self.settled_after is None:
            yield
            return
        before = compiled_graphs()
        yield
        self.steps += 1
        new = compiled_graphs() - before
        if self.steps > self.settled_after:
            run_on_all_ranks(lambda: self.refuse(number, new), self.device)

    def refuse(self, number: int, new: int) -> None:
        """Raise if there are new graphs."""
        if new:
            raise TrainingError(
                f"step {number} compiled {new} graphs, and train.fail_on_recompile_after = {self.settled_after}: "
                "TORCH_LOGS=recompiles says why; raise the number if shapes change on purpose (train.ramp, warm-ups)"
            )


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far."""
    from torch._dynamo.utils import counters  # takes a second to import, and only compiled runs need it

    return counters["stats"]["unique_graphs"]
