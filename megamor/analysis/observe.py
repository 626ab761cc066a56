"""What each token of a data set meets in the model: its depths, gates and scores, and its state after each recursion.

The state of a token after recursion r is what it would leave the stage with if this recursion were its last: its row of
the stream or, under a router that emits a weighted sum (halting), the sum so far with all weight that is left on the
newest output. The logit lens reads a state as a prediction with the final norm and the head, without what comes after
the stage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.analysis.statistics import Array
from megamor.data.loader import MicroBatch, ValidationSet
from megamor.evaluate.groups import context_lengths
from megamor.model import Transformer
from megamor.model.loss import CHUNK_ELEMENTS
from megamor.model.recursion import combine
from megamor.routing import Mix, Mode, RoutingPlan, RoutingSession, TokenSet

Heads = dict[tuple[str, int], list[Array]]
Progress = Callable[..., Iterable[MicroBatch]]


@dataclass
class StageView:
    """What one stage of Nr recursions does with N tokens.

    `took` and `counts` [Nr, N]: whether a token took each recursion, and whether its output has a weight in the result
    (for soft halting, the two differ). `rms` and `lens` [Nr + 1, N]: RMS of the token's state before the first and
    after each recursion, and its logit-lens loss in nats. `gates` and `scores` by name and recursion: weights of the
    core's output, and what the router's heads returned. While passes run, the lists have an array for each.
    """

    took: list[Array] = field(default_factory=list)
    counts: list[Array] = field(default_factory=list)
    rms: list[Array] = field(default_factory=list)
    lens: list[Array] = field(default_factory=list)
    gates: Heads = field(default_factory=lambda: defaultdict(list))
    scores: Heads = field(default_factory=lambda: defaultdict(list))
    recursion: int | None = None
    """The recursion that is being run."""

    @property
    def depth(self) -> Array:
        """Recursions of each token [N] whose output has a weight in the result."""
        return np.asarray(np.concatenate(self.counts, 1).sum(0))

    def add_scores(self, name: str, output: object) -> None:
        """Keep what a head returned, [n, k]: a column for each recursion or, within a recursion, for each action."""
        if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] <= 64:
            for column, values in enumerate(as_array(output.t())):
                action = f"{name}.{column}" if output.shape[1] > 1 and self.recursion is not None else name
                self.scores[action, column if self.recursion is None else self.recursion].append(values)


class ObservedSession(RoutingSession):
    """Passes on what `inner` decides for `rows` [T, d], and notes it in `view`; `measure` gives RMS and lens [2, T]."""

    def __init__(
        self, inner: RoutingSession, rows: Tensor, view: StageView, measure: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(inner.context)
        self.losses, self.ratios, self.totals = inner.losses, inner.ratios, inner.totals
        self.inner, self.view, self.measure = inner, view, measure
        self.input = self.states = rows
        self.emitted, self.left = torch.zeros_like(rows), torch.ones_like(rows[:, :1])
        self.marks: list[Tensor] = []
        self.measured = [measure(rows)]

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        self.view.recursion = recursion
        plan = self.inner.route(recursion, rows, candidates)
        self.x = rows if plan.indices is None else rows[plan.indices]
        return plan

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        tokens, mix = plan.tokens, self.inner.mix(recursion, plan, core_output)
        ones = torch.ones_like(core_output[:, 0])
        gates = ones * (0.0 if mix.from_core is None else mix.from_core)
        states, counts = combine(mix, self.x, core_output, self.input, plan), ones
        if mix.emit is not None:
            gates = ones * mix.emit
            counts = (gates > 0).to(ones)
            states = tokens.gather(self.emitted) + tokens.gather(self.left) * core_output
            self.emitted = tokens.scatter_add(self.emitted, gates[:, None] * core_output)
            self.left = tokens.scatter_add(self.left, -gates[:, None])
        elif isinstance(mix.from_input, Tensor):
            gates = gates[mix.from_input > 0]  # those of tokens that leave; the others have none
        self.view.gates["gate", recursion].append(as_array(gates))
        self.marks.append(tokens.scatter(torch.zeros_like(self.input[:, :2]), torch.stack((ones, counts), 1)))
        self.states = tokens.scatter(self.states, states)
        self.measured.append(self.measure(self.states))
        return mix

    def finish(self, result: Tensor) -> Tensor:
        marks, measured = as_array(torch.stack(self.marks)) > 0, as_array(torch.stack(self.measured))
        for found, new in zip((self.view.took, self.view.counts), (marks[..., 0], marks[..., 1]), strict=True):
            found.append(new)
        self.view.rms.append(measured[:, 0])
        self.view.lens.append(measured[:, 1])
        self.view.recursion = None
        return self.inner.finish(result)


@dataclass(frozen=True)
class Observations:
    """Figures [N] of the analysed tokens, window by window, and those of the stages by prefix.

    `position` counts from where the model's context begins. `nll` and `entropy` are those of the prediction made at the
    token, in nats.
    """

    ids: Array
    labels: Array
    window: Array
    document: Array
    position: Array
    nll: Array
    entropy: Array
    stages: dict[str, StageView]

    @property
    def begins(self) -> Array:
        """Where the model knows nothing of what comes before [N]."""
        return np.asarray(self.position == 0)

    @property
    def depth(self) -> Array:
        """Sum of the stages' depths [N]; 0 without a stage."""
        return sum((view.depth for view in self.stages.values()), np.zeros(len(self.ids), np.int64))


@torch.no_grad()
def observe(
    model: Transformer,
    data: ValidationSet,
    mode: Mode = "causal",
    sequences: int | None = None,
    batch_size: int = 16,
    watch: Progress = lambda batches, total, description: batches,
) -> Observations:
    """Run `sequences` windows of `data` (None: all), evenly spread, through the model; `watch` as in evaluation.

    Routers see all tokens, so those that a loss mask leaves out are observed too.
    """
    data = data.all_tokens
    starts, device, first, rows = data.starts(sequences), model.embed.weight.device, 0, []
    labels = torch.empty(0)
    with watching(model, lambda: labels) as views:
        batches = data.batches(0, 1, batch_size, sequences)
        for batch in watch(batches, total=-(-len(starts) // batch_size), description=f"{data.name}, {mode}"):
            assert batch.lengths is not None
            inside = torch.arange(batch.inputs.shape[1]) < batch.lengths.unsqueeze(1)
            labels = batch.labels[inside].to(device)
            scores = model(**batch.arguments(device), mode=mode, score_tokens=True).scores
            assert scores is not None
            row, column = (x.numpy() for x in inside.nonzero(as_tuple=True))
            window, first = first + row, first + batch_size
            position = context_lengths(batch)[inside].numpy()
            document = data.shard.documents_at(starts[window] + column)
            nll, entropy = (as_array(x.cpu()[inside].double()) for x in (scores.nll, scores.entropy))
            ids = batch.inputs[inside].numpy()
            rows.append((ids, batch.labels[inside].numpy(), window, document, position, nll, entropy))
    names = ("ids", "labels", "window", "document", "position", "nll", "entropy")
    columns = {name: np.concatenate(parts) for name, *parts in zip(names, *rows, strict=True)}
    return Observations(**columns, stages=views)


@contextmanager
def watching(model: Transformer, labels: Callable[[], Tensor]) -> Iterator[dict[str, StageView]]:
    """Views of the model's stages, by prefix, which fill while the block runs; `labels` gives those of a pass [T]."""

    def measure(states: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float64) / states.shape[1] ** 0.5
        size = max(1, CHUNK_ELEMENTS // len(model.embed.weight))
        pieces = zip(torch.split(states, size), torch.split(labels(), size), strict=True)
        losses = [F.cross_entropy(model.readout(rows), targets, reduction="none") for rows, targets in pieces]
        return torch.stack((rms, torch.cat(losses).double()))

    views = {prefix: StageView() for prefix in model.stages}
    hooks = []
    for view, stage in zip(views.values(), model.stages.values(), strict=True):
        stage.observe = lambda inner, rows, view=view: ObservedSession(inner, rows, view, measure)
        for name, head in heads(stage.router):
            keep = lambda _, __, output, view=view, name=name: view.add_scores(name, output)  # noqa: E731
            hooks.append(head.register_forward_hook(keep))
    try:
        yield views
    finally:
        for hook in hooks:
            hook.remove()
        for stage in model.stages.values():
            stage.observe = None


def heads(router: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The networks of a router whose results are its scores."""
    for name, child in router.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((name, head) for head in child)
        elif not isinstance(child, nn.Embedding):
            yield name, child


def as_array(values: Tensor) -> Array:
    """`values` on the host; NumPy has no bf16."""
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
