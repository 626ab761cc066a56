"""Alarms for failures of Mixture-of-Recursions training that the loss alone doesn't show.

Each alarm is `off`, `warn` or `stop`, and is raised when its symptom is seen in `diagnosis.steps` consecutive steps.
All figures are sums over ranks, so every rank reaches the same conclusion by itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamor.config import (
    Alarm,
    Config,
    CustomRouterConfig,
    FixedDepthConfig,
    HaltingConfig,
    LearnedThresholdConfig,
    MonotoneConfig,
    RandomConfig,
    SkipForwardRecurseConfig,
    TokenChoiceConfig,
)
from megamor.config.segments import stages
from megamor.data.loader import MicroBatch
from megamor.errors import TrainingError
from megamor.model.loss import IGNORE
from megamor.train.guard import Guard
from megamor.train.step_statistics import StepSummary

LEARNS_DEPTH = (
    TokenChoiceConfig, LearnedThresholdConfig, SkipForwardRecurseConfig, HaltingConfig, MonotoneConfig,
    CustomRouterConfig,
)  # fmt: skip
"""Routers that choose depths freely; with the others, the depth histogram follows from their capacity."""

ADVICE = {
    "dead_router": (
        "no gradient reaches the router's scores: check router.alpha and router.gating; if the scores are so large "
        "that the activation is flat, lower optim.lr or set router.z_coeff above 0"
    ),
    "pinned_depth": (
        "all tokens take the same number of recursions: raise what spreads depths (balance_coeff, target_depth), lower "
        "what penalises depth (depth_coeff, ponder_coeff), or lower optim.lr"
    ),
    "unigram_plateau": (
        "the model has learned token frequencies and nothing more: check the data (order, tokenizer, documents) and "
        "optim.lr, which may be too high or too low"
    ),
    "stream_norm": (
        "the recursions make hidden states grow, until bf16 rounds away what they add: set recursion.residual_scaling, "
        "model.qk_norm or a lower optim.lr"
    ),
    "exploding_norm": "training is about to diverge: lower optim.lr, or lengthen optim.warmup_steps",
}


class Diagnosis:
    """Watches the steps of a run. `routers` are those of the recursion stages, by `Segment.prefix`."""

    def __init__(self, config: Config, routers: Mapping[str, nn.Module], device: torch.device) -> None:
        self.config = config.diagnosis
        self.actions: dict[str, Alarm] = {
            "dead_router": self.config.dead_router,
            "pinned_depth": self.config.pinned_depth,
            "unigram_plateau": self.config.unigram_plateau,
            "exploding_norm": self.config.exploding_norm,
            "stream_norm": self.config.stream_norm,
        }
        self.stages = stages(config)
        kinds = {stage.prefix: stage.config.router for stage in self.stages}
        self.learns_depth = {prefix for prefix, kind in kinds.items() if isinstance(kind, LEARNS_DEPTH)}
        # Controls have nothing to learn: no gradient reaches them, or whatever does is not what they are there for.
        watched = {
            prefix: router
            for prefix, router in routers.items()
            if self.actions["dead_router"] != "off" and not isinstance(kinds[prefix], FixedDepthConfig | RandomConfig)
        }
        # All tokens take full depth until then, by order.
        self.free_after = max(
            (kind.balance_warmup_steps for kind in kinds.values() if isinstance(kind, TokenChoiceConfig)), default=0
        )
        self.gradient = ScoreGradients(watched, device) if watched else None
        self.tokens = TokenCounts(config.model.vocab_size) if self.actions["unigram_plateau"] != "off" else None
        self.in_a_row = dict.fromkeys(ADVICE, 0)
        self.warnings: list[str] = []

    def observe(
        self, step: int, summary: StepSummary, guard: Guard, batches: list[MicroBatch], recursions: int | None = None
    ) -> list[str]:
        """Look at step number `step`, of at most `recursions`, and return warnings.

        Collective every `diagnosis.steps` steps.

        Raises:
            TrainingError: on every rank, for an alarm that is set to `stop`.
        """
        if self.tokens is not None:
            self.tokens.add(batches)
        self.warnings = []
        grad_norm = summary.grad_norm
        if not math.isfinite(grad_norm):
            return []
        if recursions != 1:  # with one there is nothing to choose, and such a step says nothing about the router
            watched = self.gradient.watched if self.gradient is not None else []
            dead = [prefix for prefix, found in zip(watched, summary.score_gradients, strict=False) if found == 0.0]
            self._note("dead_router", step, bool(dead), f"gradient 0 in {self.config.steps} steps{_where(dead)}")
            pinned = self._pinned(summary) if step > self.free_after else {}
            shown = f"depth {', '.join(map(str, pinned.values()))} in {self.config.steps} steps{_where(pinned)}"
            self._note("pinned_depth", step, bool(pinned), shown)
        grown = self._grown(summary)
        factors = ", ".join(f"{factor:.3g}" for factor in grown.values())
        self._note("stream_norm", step, bool(grown), f"the stream's RMS grows {factors}-fold{_where(grown)}")
        usual = statistics.median(guard.grad_norms) if guard.grad_norms else math.inf
        limit = self.config.norm_factor * usual
        self._note("exploding_norm", step, grad_norm > limit, f"gradient norm {grad_norm:.3g}, usually {usual:.3g}")
        if self.tokens is not None and step % self.config.steps == 0:
            self._look_at_plateau(guard, step, self.tokens.entropy())
        return self.warnings

    def state_dict(self) -> dict[str, Any]:
        """Plain data (JSON). Token counts aren't saved: they start over with each launch."""
        return {"in_a_row": dict(self.in_a_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.in_a_row = {name: state["in_a_row"].get(name, 0) for name in ADVICE}

    def _grown(self, summary: StepSummary) -> dict[str, float]:
        """By how much the recursions of a stage make the stream grow, for each stage where that is too much."""
        found = {}
        for stage in self.stages:
            names = [f"{stage.prefix}stream_rms_{number}" for number in range(len(stage.schedule) + 1)]
            before, *after = (summary.ratios.get(name, 0.0) for name in names)
            if max(after) > self.config.stream_factor * before:
                found[stage.prefix] = max(after) / before if before else math.inf
        return found

    def _pinned(self, summary: StepSummary) -> dict[str, int]:
        """The depth that nearly all tokens take, for each stage that has one and whose router could choose another."""
        found = {}
        for prefix, counts in summary.counts_by_stage(self.stages).items():
            depth = max(range(len(counts)), key=counts.__getitem__)
            if prefix in self.learns_depth and counts[depth] >= self.config.pinned_share * sum(counts):
                found[prefix] = depth
        return found

    def _look_at_plateau(self, guard: Guard, step: int, entropy: float) -> None:
        """Compare the mean of recent losses with the entropy of single tokens."""
        recent = list(guard.losses)[-self.config.steps :]
        if not recent or step < self.config.plateau_after_step:
            return
        loss = statistics.fmean(recent)
        stuck = abs(loss - entropy) <= self.config.plateau_margin
        was_stuck = self.in_a_row["unigram_plateau"] >= self.config.steps
        if stuck and not was_stuck:
            # The mean is over `diagnosis.steps` steps already, so one look is enough.
            self.in_a_row["unigram_plateau"] = self.config.steps - 1
        self._note("unigram_plateau", step, stuck, f"loss {loss:.3f}, entropy of single tokens {entropy:.3f} nats")

    def _note(self, alarm: str, step: int, seen: bool, what: str) -> None:
        """Count a symptom; when it has been seen in `diagnosis.steps` steps in a row, warn or raise."""
        action = self.actions[alarm]
        self.in_a_row[alarm] = self.in_a_row[alarm] + 1 if seen and action != "off" else 0
        if self.in_a_row[alarm] < self.config.steps:
            return
        message = f"step {step}: {alarm.replace('_', ' ')} ({what}): {ADVICE[alarm]}"
        if action == "stop":
            raise TrainingError(f"{message}. To continue anyway: diagnosis.{alarm}=warn")
        if self.in_a_row[alarm] == self.config.steps:  # warn once, until the symptom has passed
            self.warnings.append(message)


def _where(prefixes: Iterable[str]) -> str:
    """` in layers_3, layers_5`; nothing for a model's only stage."""
    names = [prefix.rstrip("/") for prefix in prefixes if prefix]
    return f" in {', '.join(names)}" if names else ""


class ScoreGradients:
    """Largest absolute gradient at the outputs of each router's layers. `watched` names the routers that have any.

    Gradients of the layers' parameters wouldn't do: backends shard, reduce and free them in their own ways.
    """

    def __init__(self, routers: Mapping[str, nn.Module], device: torch.device) -> None:
        self.watched: list[str] = []
        for name, router in routers.items():
            for module in router.modules():
                # Leaf modules with parameters: the layers that compute the scores.
                if not [*module.children()] and any(parameter.requires_grad for parameter in module.parameters()):
                    self.watched = [*dict.fromkeys([*self.watched, name])]
                    module.register_forward_hook(partial(self._on_output, len(self.watched) - 1))
        self.largest = [torch.zeros((), device=device) for _ in self.watched]

    def take(self) -> Tensor:
        """The largest in the backward passes since the last call, fp32 [watched]."""
        taken, self.largest = self.largest, [torch.zeros_like(largest) for largest in self.largest]
        return torch.stack(taken) if taken else torch.zeros(0)

    def _on_output(self, number: int, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(self._on_gradient, number))  # type: ignore[no-untyped-call]

    def _on_gradient(self, number: int, gradient: Tensor) -> None:
        if gradient.numel():
            self.largest[number] = torch.maximum(self.largest[number], gradient.detach().abs().amax().float())


class TokenCounts:
    """How often each token was a label in this launch."""

    def __init__(self, vocab_size: int) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.int64)

    def add(self, batches: list[MicroBatch]) -> None:
        """Count this rank's labels. `batches` are on the host."""
        for batch in batches:
            labels = batch.labels[batch.labels != IGNORE]
            self.counts += torch.bincount(labels, minlength=len(self.counts))

    def entropy(self) -> float:
        """Entropy of the labels of all ranks, in nats. Collective."""
        total = self.counts.clone()
        if dist.is_initialized():
            dist.all_reduce(total)  # over gloo, since the counts are on the host
        shares = total[total > 0].double() / total.sum()
        return float(-(shares * shares.log()).sum())
