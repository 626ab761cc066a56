"""Alarms for failures of Mixture-of-Recursions training that the loss alone doesn't show.

Each alarm is `off`, `warn` or `stop`, and is raised when its symptom is seen in `diagnosis.steps` consecutive steps.
All figures are sums over ranks, so every rank reaches the same conclusion by itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
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
    RandomConfig,
    SkipForwardRecurseConfig,
    TokenChoiceConfig,
)
from megamor.data.loader import MicroBatch
from megamor.errors import TrainingError
from megamor.model.loss import IGNORE
from megamor.train.guard import Guard
from megamor.train.step_statistics import StepSummary

LEARNS_DEPTH = (TokenChoiceConfig, SkipForwardRecurseConfig, HaltingConfig, CustomRouterConfig)
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
    """Watches the steps of a run. `router` is the module whose scores' gradients are watched; None if there is none."""

    def __init__(self, config: Config, router: nn.Module | None, device: torch.device) -> None:
        self.config = config.diagnosis
        self.actions: dict[str, Alarm] = {
            "dead_router": self.config.dead_router,
            "pinned_depth": self.config.pinned_depth,
            "unigram_plateau": self.config.unigram_plateau,
            "exploding_norm": self.config.exploding_norm,
            "stream_norm": self.config.stream_norm,
        }
        self.learns_depth = isinstance(config.router, LEARNS_DEPTH) and router is not None
        # Controls have nothing to learn: no gradient reaches them, or whatever does is not what they are there for.
        learns = not isinstance(config.router, FixedDepthConfig | RandomConfig)
        watched = router if self.actions["dead_router"] != "off" and learns else None
        # All tokens take full depth until then, by order.
        self.free_after = config.router.balance_warmup_steps if isinstance(config.router, TokenChoiceConfig) else 0
        self.gradient = None if watched is None else ScoreGradient(watched, device)
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
            dead = self.gradient is not None and summary.score_gradient == 0.0
            self._note("dead_router", step, dead, f"gradient 0 in {self.config.steps} steps")
            pinned = self._pinned(summary) if step > self.free_after else None
            self._note("pinned_depth", step, pinned is not None, f"depth {pinned} in {self.config.steps} steps")
        before, after = self._stream_norms(summary.ratios)
        blown_up = after > self.config.stream_factor * before
        self._note("stream_norm", step, blown_up, f"RMS {after:.3g} after the recursions, {before:.3g} before")
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

    def _stream_norms(self, ratios: Mapping[str, float]) -> tuple[float, float]:
        """RMS of the stream before the first recursion and its largest after one; zeros without recursions."""
        # Of several stages, each has its own prefix: the worst one counts.
        found: dict[str, list[float]] = {}
        for name, value in ratios.items():
            stage, _, number = name.rpartition("stream_rms_")
            if number.isdigit():
                found.setdefault(stage, []).append(value)
        pairs = [(first, max(later)) for first, *later in found.values() if later]
        return max(pairs, key=lambda pair: pair[1] / pair[0] if pair[0] else math.inf, default=(0.0, 0.0))

    def _pinned(self, summary: StepSummary) -> int | None:
        """The depth that nearly all tokens take, if there is one and the router was free to choose another."""
        tokens = sum(summary.depth_counts)
        if not (self.learns_depth and tokens):
            return None
        depth = max(range(len(summary.depth_counts)), key=summary.depth_counts.__getitem__)
        return depth if summary.depth_counts[depth] >= self.config.pinned_share * tokens else None

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


class ScoreGradient:
    """Largest absolute gradient at the outputs of the router's layers.

    Gradients of the layers' parameters wouldn't do: backends shard, reduce and free them in their own ways.
    """

    def __init__(self, router: nn.Module, device: torch.device) -> None:
        self.largest = torch.zeros((), device=device)
        self.watches = False
        for module in router.modules():
            # Leaf modules with parameters: the layers that compute the scores.
            if not [*module.children()] and any(parameter.requires_grad for parameter in module.parameters()):
                module.register_forward_hook(self._on_output)
                self.watches = True

    def take(self) -> Tensor | None:
        """The largest in the backward passes since the last call, an fp32 scalar; None if there is nothing to watch."""
        if not self.watches:
            return None
        taken, self.largest = self.largest, torch.zeros_like(self.largest)
        return taken

    def _on_output(self, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def _on_gradient(self, gradient: Tensor) -> None:
        if gradient.numel():
            self.largest = torch.maximum(self.largest, gradient.detach().abs().amax().float())


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
