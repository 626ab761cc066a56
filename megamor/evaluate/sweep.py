"""A trained model under other inference rules than its own: loss against what a forward pass executes.

Everything is changed at inference alone: bounds on the depth, the router's threshold, a confidence exit on top of the
router. Depths are those of each stage where there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from megamor.config.exits import EXITS, ExitName, ExitRule
from megamor.data.loader import MicroBatch
from megamor.errors import ConfigError
from megamor.evaluate.loss import dataset_losses
from megamor.load import LoadedModel
from megamor.model import Transformer

PROBABILITIES = (1e-6, 0.001, 0.1, 0.5, 0.9, 0.999, 0.999999)
SHIFTS = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)
"""In units of the mean distance of a score from its decision."""
EXIT_THRESHOLDS: dict[ExitName, tuple[float, ...]] = {
    "max_probability": (0.1, 0.3, 0.5, 0.7, 0.9),
    "entropy": (0.5, 1.0, 2.0, 3.0, 4.0, 5.0),
    "kl": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "acceleration": (0.05, 0.1, 0.2, 0.4, 0.8),
}
FIGURES = ("loss", "accuracy", "mean_depth", "flops_per_token")


@dataclass(frozen=True)
class Setting:
    """An inference rule: the model's own one (`own`), or that with one change.

    `rule` is `max_depth` or `fixed_depth` (recursions of each stage), the name of a router's threshold
    (`Router.threshold_name`), or of an exit rule.
    """

    rule: str = "own"
    value: float | None = None

    @contextmanager
    def on(self, model: Transformer) -> Iterator[None]:
        """Let `model` follow the rule for a while."""
        with ExitStack() as stack:
            if self.value is not None and self.rule in ("max_depth", "fixed_depth"):
                most = int(self.value)
                model.depth_bounds = (most if self.rule == "fixed_depth" else 0, most)
            elif self.value is not None and self.rule in EXITS:
                model.set_exit(ExitRule(self.rule, self.value))
            elif self.value is not None:
                for router in (stage.router for stage in model.stages.values()):
                    if router.threshold_name == self.rule:
                        stack.enter_context(router.at_threshold(self.value))
            try:
                yield
            finally:
                model.depth_bounds = None
                model.set_exit(None)


def deepest(model: Transformer) -> int:
    """Recursions of the stage that has most.

    Raises:
        ConfigError: the model has nothing to sweep.
    """
    most = max((stage.router.num_recursions for stage in model.stages.values()), default=0)
    if most < 2:
        what = "one recursion" if most else "no recursion (recursion.sharing: none)"
        raise ConfigError(f"the model has {what}, so its depth can't be swept: give a checkpoint of a recursive model")
    return most


def settings(
    model: Transformer,
    batch: MicroBatch | None,
    *,
    max_depths: Sequence[int] | None = None,
    fixed_depths: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
    exits: Mapping[ExitName, Sequence[float]] | None = None,
) -> tuple[list[Setting], list[str]]:
    """The settings to measure, the model's own rule first, and a sentence about each kind that doesn't fit the model.

    None stands for all depths, and for a handful of thresholds and of each exit rule's. `batch` shows the scale of the
    scores, for `thresholds` None.

    Raises:
        ConfigError: the model has nothing to sweep, or a value is out of range.
    """
    most = deepest(model)
    found, left_out = [Setting()], []
    for rule, depths in (("max_depth", max_depths), ("fixed_depth", fixed_depths)):
        for depth in range(1, most + 1) if depths is None else depths:
            if not 1 <= depth <= most:
                raise ConfigError(f"{rule} = {depth}: the model has {most} recursions; give 1 to {most}")
            found.append(Setting(rule, depth))
    routers = [stage.router for stage in model.stages.values()]
    names = dict.fromkeys(name for router in routers if (name := router.threshold_name) is not None)
    if not names and thresholds != []:
        kinds = ", ".join(sorted({type(router).__name__ for router in routers}))
        left_out.append(f"thresholds: {kinds} compares nothing with one at inference")
    for name in names:
        values = thresholds
        if values is None and name == "shift" and batch is not None:
            values = shifts(model, batch)
        for value in PROBABILITIES if values is None else values:
            if name != "shift" and not 0 < value < 1:
                raise ConfigError(f"{name} = {value}: give a number between 0 and 1")
            found.append(Setting(name, value))
    for exit_name, values in (EXIT_THRESHOLDS if exits is None else exits).items():
        rules = [ExitRule(exit_name, value) for value in values]
        if rules and rules[0].first >= most:
            left_out.append(f"{exit_name}: needs {rules[0].first + 1} recursions or more, and the model has {most}")
        else:
            found += [Setting(rule.name, rule.threshold) for rule in rules]
    return found, left_out


@torch.no_grad()
def shifts(model: Transformer, batch: MicroBatch) -> list[float]:
    """`SHIFTS` in the scale of the model's scores for `batch`, as of the router whose scale is smallest."""
    # Routers report their margins in training, for the control of a target.
    with ExitStack() as stack:
        for router in (stage.router for stage in model.stages.values()):
            if router.threshold_name == "shift":
                stack.enter_context(router.at_threshold(0.0))
        device = model.embed.weight.device
        totals = model(**batch.arguments(device), mode="train", step=2**31).totals
    margins = torch.cat([total for name, total in totals.items() if name.endswith("margins") and total.dim() == 2])
    scale = (margins[:, 1] / margins[:, 0])[margins[:, 0] > 0].min()
    return [float(f"{factor * scale:.2g}") for factor in SHIFTS]


def sweep(
    loaded: LoadedModel,
    data: Mapping[str, str],
    chosen: Sequence[Setting],
    *,
    sequences: int | None,
    batch_size: int,
    watch: Callable[[Setting, Iterable[MicroBatch], int], Iterable[MicroBatch]] = lambda setting, batches, total: (
        batches
    ),
    score: Callable[[LoadedModel], Mapping[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure the model under each setting, by the causal rule.

    Args:
        data: prefixes of data sets by name.
        watch: wraps the batches of a set to show progress, given the setting and the number of batches.
        score: scores the model, such as on tasks.

    Returns:
        For each setting `rule`, `value`, and of `sets` by name and of their mean `loss`, `accuracy`, `mean_depth` and
        `flops_per_token` of a forward pass, what the head predicts for an exit rule included; `tasks` if `score` is
        given. And a sentence about each setting that the model doesn't follow.
    """
    entries: list[dict[str, Any]] = []
    ignored: list[str] = []
    depths = [stage.router.num_recursions for stage in loaded.model.stages.values()]
    for setting in chosen:
        options: Any = {"sequences": sequences, "batch_size": batch_size, "modes": ("causal",)}

        def watched(batches: Iterable[MicroBatch], total: int, description: str, s: Setting = setting) -> Any:
            return watch(s, batches, total)

        if setting.rule == "max_depth" and setting.value == max(depths) and entries and entries[0]["rule"] == "own":
            entries.append({**entries[0], "rule": setting.rule, "value": setting.value})
            continue
        with setting.on(loaded.model):
            found = {name: dataset_losses(loaded, prefix, **options, watch=watched) for name, prefix in data.items()}
            tasks = {"tasks": dict(score(loaded))} if score is not None else {}
        sets = {name: {key: figures[f"{key}_causal"] for key in FIGURES} for name, figures in found.items()}
        means = {key: fmean(figures[key] for figures in sets.values()) for key in FIGURES}
        if setting.rule in ("max_depth", "fixed_depth"):
            limit = sum(min(depth, setting.value or 0) for depth in depths)
            missed = abs(means["mean_depth"] - limit) if setting.rule == "fixed_depth" else means["mean_depth"] - limit
            if missed > 1e-6:
                ignored.append(f"{setting.rule} = {setting.value}: the router ignores bounds on the depth")
                continue
        entries.append({"rule": setting.rule, "value": setting.value, **means, "sets": sets, **tasks})
    return entries, ignored
