"""Skip, forward or recurse: before each recursion a token chooses one of three actions, with gradients through it.

skip: leave without taking the recursion (cost 0). forward: take it and leave (cost 1). recurse: take it and decide
again (cost 1 so far). Training samples the choice with straight-through Gumbel-softmax (arXiv 1611.01144); inference
takes the most probable one. The penalty is on the *expected* depth under the probabilities, which is differentiable, so
depth can be traded against loss or held at a target.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.config import SkipForwardRecurseConfig
from megamor.routing.heads import MLPHead
from megamor.routing.plan import Idle, Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, Router, RoutingContext, RoutingSession

SKIP, FORWARD, RECURSE = 0, 1, 2


class SkipForwardRecurseRouter(Router):
    """One network d → hidden → 3 for all recursions."""

    causal_in_training = True
    inference_rule = InferenceRule("argmax_choice", score="router")

    def __init__(self, config: SkipForwardRecurseConfig, dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.config = config
        self.head: nn.Module = MLPHead(dim, 3, config.hidden)

    def begin(self, rows: Tensor, context: RoutingContext) -> SkipForwardRecurseSession:
        """Draw the noise of all decisions at once, so that a token's noise does not depend on other tokens' choices."""
        return SkipForwardRecurseSession(self, rows, context)

    def temperature(self, step: int) -> float:
        """Gumbel-softmax temperature at an optimizer step."""
        config = self.config
        done = min(1.0, step / config.temperature_steps)
        return config.temperature_start + done * (config.temperature_end - config.temperature_start)


class SkipForwardRecurseSession(RoutingSession):
    """Decisions during one forward pass.

    `recursing` [T] says which tokens decide again; `reach` is the mean probability of reaching the next decision.
    """

    per_row = ("recursing",)

    def __init__(self, router: SkipForwardRecurseRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(context)
        self.router = router
        self.recursing = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.reach = torch.ones((), dtype=dtype, device=rows.device)
        self.expected_depth = torch.zeros((), dtype=dtype, device=rows.device)
        self.noise: Tensor | None = None
        if context.mode == "train":
            uniform = torch.rand(router.num_recursions, len(rows), 3, dtype=dtype, device=rows.device)
            self.noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Decide for the candidates that chose to recurse; select those that do not skip."""
        deciding, deciding_indices = candidates, None
        if recursion > 0:
            deciding, deciding_indices = candidates.where(candidates.gather(self.recursing))
            rows = rows.index_select(0, deciding_indices)
        logits = self.router.head(rows)
        probabilities, choice, chosen = self.choose(recursion, logits, deciding)
        self.add_expected_depth(recursion, probabilities)

        applies = choice != SKIP
        tokens, indices = deciding.where(applies)
        skipping, skipping_indices = deciding.where(~applies)
        self.recursing = deciding.scatter(self.recursing, choice == RECURSE)
        # In value, a selected row becomes the core's output and a skipping row stays unchanged. The one-hot weights
        # carry the gradient of the choice; for skipping tokens `Idle` does.
        mix = Mix(from_core=chosen[:, FORWARD:].sum(-1)[indices], from_stream=chosen[indices, SKIP])
        idle = Idle(skipping, chosen[skipping_indices, SKIP])
        if deciding_indices is not None:
            indices = deciding_indices[indices]
        return RoutingPlan(tokens, indices, mix, idle)

    def choose(self, recursion: int, logits: Tensor, deciding: TokenSet) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities [N, 3], choice [N], and one-hot choice [N, 3] with the gradient of the tempered softmax."""
        probabilities = logits.softmax(-1)
        if self.noise is None:
            choice = self.bound_choice(recursion, logits.argmax(-1), deciding)
            return probabilities, choice, F.one_hot(choice, 3).to(logits.dtype)
        noisy = (logits + deciding.gather(self.noise[recursion])) / self.router.temperature(self.context.step)
        soft = noisy.softmax(-1)
        choice = noisy.argmax(-1)
        return probabilities, choice, F.one_hot(choice, 3).to(soft.dtype) + soft - soft.detach()

    def bound_choice(self, recursion: int, choice: Tensor, deciding: TokenSet) -> Tensor:
        """`choice` [N] corrected by the bounds on each token's depth."""
        bounds = self.context.bounds
        if bounds is None:
            return choice
        choice = torch.where(self.bounded(recursion, choice != SKIP, deciding), choice.clamp_min(FORWARD), SKIP)
        return torch.where(deciding.gather(bounds.least) > recursion + 1, RECURSE, choice)

    def add_expected_depth(self, recursion: int, probabilities: Tensor) -> None:
        """Add recursion r's term of the expected depth a_0 + b_0·(a_1 + b_1·(a_2 + …)); after the last, the loss.

        a_r and b_r are the mean probabilities of taking the recursion and of recursing, among the tokens that decide at
        r. Those that decide at r + 1 are a sample of them, drawn by the same probabilities.
        """
        num_deciding = max(1, len(probabilities))
        self.expected_depth = self.expected_depth + self.reach * (1 - probabilities[:, SKIP]).sum() / num_deciding
        self.reach = self.reach * probabilities[:, RECURSE].sum() / num_deciding
        if recursion == self.router.num_recursions - 1 and self.context.mode == "train":
            config = self.router.config
            penalty = self.expected_depth
            if config.target_depth is not None:
                penalty = (self.expected_depth - config.target_depth).square()
            self.add_loss("depth_loss", config.depth_coeff * penalty)
            self.add_ratio("expected_depth", self.expected_depth, 1.0)
