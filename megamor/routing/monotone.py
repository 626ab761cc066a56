"""Monotone gates: a token's weight falls from recursion to recursion, and once it is at zero the token has left.

Before each recursion r, a token gets a gate g_r in (0, 1), and c_r is the product of its gates so far, which can only
fall. It continues while c_r is above the threshold t, and the recursion's result replaces the stream
with the weight (c_r - t) / (1 - t). This reaches zero exactly where the token leaves, so the result does not jump
there, and the gradient of the weight is that of the decision too. The language-model loss alone would open all gates;
the depth loss, on the mean of c_1 + c_2 + …, closes those that are of no use. Made for `recursion.kv_policy:
halted_reuse`, under which the keys of tokens that have left stay visible (after arXiv 2603.01914).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megamor.config import MonotoneConfig
from megamor.routing.control import DepthControl
from megamor.routing.heads import RouterLinear, full_precision
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, Router, RoutingContext, RoutingSession

INITIAL_BIAS = 2.0
"""At first, gates are 0.88."""


class MonotoneRouter(Router):
    """A linear gate with a bias for each recursion."""

    causal_in_training = True

    def __init__(self, config: MonotoneConfig, dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions, DepthControl.of(config, num_recursions))
        self.config = config
        self.heads = nn.ModuleList(RouterLinear(dim, 1) for _ in range(num_recursions))
        self.bias = nn.Parameter(torch.empty(num_recursions))

    def reset(self) -> None:
        """Set the biases to their initial value."""
        nn.init.constant_(self.bias, INITIAL_BIAS)

    @property
    def inference_rule(self) -> InferenceRule:
        """As in training: continue while the product of the gates is above the threshold."""
        return InferenceRule("monotone_gate", score="router", threshold=self.config.threshold)

    @property
    def threshold(self) -> Tensor | float:
        """The product of gates at which a token leaves. A target shifts its logit, and the weights follow."""
        threshold = self.config.threshold
        return threshold if self.control is None else torch.sigmoid(math.log(threshold / (1 - threshold)) - self.shift)

    def begin(self, rows: Tensor, context: RoutingContext) -> MonotoneSession:
        return MonotoneSession(self, rows, context)


class MonotoneSession(RoutingSession):
    """Monotone gates during one forward pass. `survival` [T] is the product of each token's gates so far."""

    per_row = ("survival",)

    def __init__(self, router: MonotoneRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(context)
        self.router = router
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.survival = torch.ones(len(rows), dtype=dtype, device=rows.device)
        self.soft_depth = torch.zeros((), dtype=dtype, device=rows.device)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """The candidates whose product of gates is above the threshold."""
        router, threshold = self.router, self.router.threshold
        logits = router.heads[recursion](rows).squeeze(-1)
        gate = torch.sigmoid(logits + full_precision(router, "bias", logits.dtype)[recursion])
        survival = candidates.gather(self.survival) * gate
        self.survival = candidates.scatter(self.survival, survival)
        self.soft_depth = self.soft_depth + survival.sum() / len(self.survival)
        if recursion == router.num_recursions - 1 and self.context.mode == "train":
            self.add_ratio("soft_depth", self.soft_depth * self.context.fill, self.context.fill)
            if router.control is None:
                self.add_loss("depth_loss", router.config.depth_coeff * self.soft_depth)
        if isinstance(threshold, Tensor):
            self.add_margins(router, recursion, torch.logit(survival, eps=1e-7) - torch.logit(threshold))
        tokens, indices = candidates.where(self.bounded(recursion, survival > threshold, candidates))
        # A token below the threshold takes the recursion only if it is made to (`bounded`), and then without effect.
        weight = ((tokens.gather(self.survival) - threshold) / (1 - threshold)).clamp_min(0)
        return RoutingPlan(tokens, indices, Mix(from_stream=1 - weight, from_core=weight))
