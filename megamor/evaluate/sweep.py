"""A trained model under other inference rules than its own: loss against what a forward pass executes.

Everything is changed at inference alone: bounds on the depth, the router's threshold, a confidence exit on top of the
router. Depths are those of each stage where there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
LABELS: dict[str, str] = {
    "own": "own rule",
    "max_depth": "at most n recursions",
    "fixed_depth": "exactly n recursions",
    "shift": "scores shifted",
    **{name: f"exit: {name}" for name in EXITS},
}


@dataclass(frozen=True)
class Setting:
    """An inference rule: the model's own one (`own`), or that with one change.

    `rule` is `max_depth` or `fixed_depth` (recursions of each stage), the name of a router's threshold
    (`Router.threshold_name`), or of an exit rule.
    """

    rule: str = "own"
    value: float = 0.0

    @property
    def label(self) -> str:
        """What the rule is called in a table or a plot."""
        return LABELS.get(self.rule, f"router.{self.rule}")

    @contextmanager
    def on(self, model: Transformer) -> Iterator[None]:
        """Let `model` follow the rule for a while."""
        bounds, rule = model.depth_bounds, model.exit
        with ExitStack() as stack:
            if self.rule in ("max_depth", "fixed_depth"):
                model.depth_bounds = (int(self.value) if self.rule == "fixed_depth" else 0, int(self.value))
            elif self.rule in EXITS:
                model.set_exit(ExitRule(self.rule, self.value))
            for router in (stage.router for stage in model.stages.values()):
                if router.threshold_name == self.rule:
                    stack.enter_context(router.at_threshold(self.value))
            try:
                yield
            finally:
                model.depth_bounds = bounds
                model.set_exit(rule)


def settings(
    model: Transformer,
    batch: MicroBatch | None = None,
    *,
    max_depths: Sequence[int] | None = None,
    fixed_depths: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
    exits: Mapping[ExitName, Sequence[float]] | None = None,
) -> tuple[list[Setting], list[str]]:
    """The settings to measure, the model's own rule first, and a sentence about each kind that doesn't fit the model.

    None stands for all depths, and for a handful of thresholds and of each exit rule's; `batch` then shows the scale
    of the scores.

    Raises:
        ConfigError: the model has nothing to sweep, or a value is out of range.
    """
    routers, found, left_out = [stage.router for stage in model.stages.values()], [Setting()], []
    most = max((router.num_recursions for router in routers), default=0)
    if most < 2:
        what = "one recursion" if most else "no recursion (recursion.sharing: none)"
        raise ConfigError(f"the model has {what}, so its depth can't be changed: give a checkpoint of a recursive one")
    for rule, depths in (("max_depth", max_depths), ("fixed_depth", fixed_depths)):
        found += [Setting(rule, depth) for depth in (range(1, most + 1) if depths is None else depths)]
        if wrong := [s.value for s in found if s.rule == rule and not 1 <= s.value <= most]:
            raise ConfigError(f"{rule} = {wrong[0]}: the model has {most} recursions; give 1 to {most}")
    names = dict.fromkeys(name for router in routers if (name := router.threshold_name) is not None)
    if not names and thresholds != []:
        kinds = ", ".join(sorted({type(router).__name__ for router in routers}))
        left_out.append(f"thresholds: {kinds} compares nothing with one at inference")
    for name in names:
        defaults = shifts(model, batch) if thresholds is None and batch and name == "shift" else PROBABILITIES
        found += [Setting(name, value) for value in (defaults if thresholds is None else thresholds)]
        if name != "shift" and (wrong := [value for value in thresholds or () if not 0 < value < 1]):
            raise ConfigError(f"{name} = {wrong[0]}: give a number between 0 and 1")
    for exit_name, values in (EXIT_THRESHOLDS if exits is None else exits).items():
        rules = [ExitRule(exit_name, value) for value in values]
        if rules and rules[0].first >= most:
            left_out.append(f"{exit_name}: needs {rules[0].first + 1} recursions or more, and the model has {most}")
        else:
            found += [Setting(rule.name, rule.threshold) for rule in rules]
    return found, left_out


@torch.no_grad()
def shifts(model: Transformer, batch: MicroBatch) -> list[float]:
    """`SHIFTS` in the scale of the model's scores for `batch`: that of the recursion whose margins are smallest.

    None at all if no score decides about anything, since all capacities are 1.
    """
    # Routers report their margins in training, for the control of a target.
    with Setting("shift", 0.0).on(model):
        totals = model(**batch.arguments(model.embed.weight.device), mode="train", step=2**31).totals
    rows = [row for name, total in totals.items() if name.endswith("margins") and total.dim() == 2 for row in total]
    scales = [float(sizes / number) for number, sizes in rows if number]
    return [float(f"{factor * min(scales):.2g}") for factor in SHIFTS if scales]


def measure(
    loaded: LoadedModel,
    data: Mapping[str, str],
    setting: Setting,
    score: Callable[[], Mapping[str, float]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure the model under `setting`, by the causal rule.

    Args:
        data: prefixes of data sets by name.
        score: scores the model on tasks.
        options: those of `dataset_losses`.

    Returns:
        `rule`, `value`, `label`; `FIGURES` of each of the `sets` by name, and their means over the sets (FLOPs of a
        forward pass, what the head predicts for an exit rule included); and `tasks` if `score` is given.

    Raises:
        ConfigError: a router doesn't follow the bounds on the depth.
    """
    with setting.on(loaded.model):
        found = {name: dataset_losses(loaded, prefix, modes=["causal"], **options) for name, prefix in data.items()}
        tasks = {} if score is None else {"tasks": dict(score())}
    sets = {name: {key: figures[f"{key}_causal"] for key in FIGURES} for name, figures in found.items()}
    means = {key: fmean(figures[key] for figures in sets.values()) for key in FIGURES}
    missing = sum(min(stage.router.num_recursions, setting.value) for stage in loaded.model.stages.values())
    missing -= means["mean_depth"]
    if (setting.rule == "fixed_depth" and missing > 1e-6) or (setting.rule.endswith("_depth") and missing < -1e-6):
        raise ConfigError(f"{setting.rule} = {setting.value}: the router ignores bounds on the depth")
    value = None if setting.rule == "own" else setting.value
    return {"rule": setting.rule, "value": value, "label": setting.label, **means, "sets": sets, **tasks}
