"""Expert-choice routing: each recursion is an expert that picks its top-k tokens (paper section 2.2.1).

Top-k over a sequence compares a token with later ones, so it can be used in training only. The auxiliary loss (or
router) trains each score to predict, from its own token, whether the token is selected. The inference rule is that
prediction: recursion 0 always; a later one iff the token passed the one before and sigmoid(score) >= 0.5
(configurable).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.config import ExpertChoiceConfig
from megamor.routing.heads import build_head
from megamor.routing.plan import RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, RoutingContext
from megamor.routing.scored import ScoredRouter, ScoredSession


def warmed_up_capacity(capacity: float, step: int, warmup_steps: int) -> float:
    """Capacity at `step` of a cosine warm-up that starts at 1 (paper's appendix on capacity warm-up)."""
    if step >= warmup_steps:
        return capacity
    return capacity + (1 - capacity) * 0.5 * (1 + math.cos(math.pi * step / warmup_steps))


class ExpertChoiceRouter(ScoredRouter):
    """`aux_router` are separate heads for the inference rule; None unless `sampling: aux_router`."""

    config: ExpertChoiceConfig

    def __init__(self, config: ExpertChoiceConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.aux_router: nn.ModuleList | None = None
        if config.sampling == "aux_router":
            self.aux_router = nn.ModuleList(build_head(config.head, dim, 1) for _ in range(num_recursions))

    @property
    def inference_rule(self) -> InferenceRule:
        """sigmoid(score) >= threshold from the second recursion on."""
        score = "aux_router" if self.config.sampling == "aux_router" else "router"
        return InferenceRule("threshold", score=score, threshold=self.config.inference_threshold)

    @property
    def logit_threshold(self) -> float:
        """The score at the threshold."""
        threshold = self.config.inference_threshold
        return math.log(threshold / (1 - threshold))

    def begin(self, rows: Tensor, context: RoutingContext) -> ExpertChoiceSession:
        return ExpertChoiceSession(self, rows, context)


class ExpertChoiceSession(ScoredSession):
    """Expert-choice during one forward pass. `following` [T] are, in training, the tokens whose path is the rule's."""

    router: ExpertChoiceRouter

    def __init__(self, router: ExpertChoiceRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(router, context)
        if router.control is not None and context.mode == "train":
            self.following = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            self.totals["causal_choices"] = torch.zeros(router.num_recursions, 3, device=rows.device)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Top-k among the candidates in training, the threshold rule at inference."""
        z = self.router.score(recursion, rows)
        predictor = z
        if self.router.aux_router is not None:
            # Detached: the auxiliary router learns to predict the selection without shaping the hidden states for it.
            predictor = self.router.aux_router[recursion](rows.detach()).squeeze(-1)

        if self.context.mode == "causal":
            return self.router.plan(z, *self.select_causal(recursion, predictor, candidates))
        tokens, indices = self.select_top_k(recursion, z, candidates)
        chosen = torch.ones_like(z) if indices is None else torch.zeros_like(z).index_fill(0, indices, 1.0)
        if self.context.mode == "train":
            self.add_losses(z, predictor, chosen, candidates)
            self.measure(recursion, predictor, candidates)
        if recursion > 0:
            agreed = self.predicts(predictor) == chosen.bool()
            self.add_ratio("topk_causal_agreement", agreed.sum(), agreed.numel())
        return self.router.plan(z, tokens, indices)

    def select_top_k(self, recursion: int, z: Tensor, candidates: TokenSet) -> tuple[TokenSet, Tensor | None]:
        """The k = max(1, int(capacity · S)) highest scores of each sequence, in ascending order of position.

        S is the sequence's own number of tokens, whatever documents they belong to. Of an empty sequence k is 0.
        """
        capacity, context, num_candidates = self.router.capacity[recursion], self.context, candidates.max_length
        if context.mode == "train":
            capacity = warmed_up_capacity(capacity, context.step, self.router.config.capacity_warmup_steps)
        if candidates.counts is not None:
            lengths = context.everything.counts or ()
            numbers = [
                min(max(1, int(capacity * length)), count)
                for length, count in zip(lengths, candidates.counts, strict=True)
            ]
            return (candidates, None) if sum(numbers) == len(candidates) else candidates.top(z.detach(), numbers)
        k = min(max(1, int(capacity * context.seq_len)), num_candidates)
        if k == num_candidates:
            return candidates, None
        top = z.detach().view(candidates.batch, num_candidates).topk(k, dim=-1, sorted=False).indices
        chosen = top.sort(dim=-1).values
        return candidates.pick(chosen), (chosen + candidates.bounds(z.device)[:-1].unsqueeze(1)).flatten()

    def select_causal(self, recursion: int, predictor: Tensor, candidates: TokenSet) -> tuple[TokenSet, Tensor | None]:
        """All if the capacity is all (recursion 0 by default), else those predicted to be selected."""
        if recursion == 0 and self.router.capacity[0] >= 1:
            return candidates, None
        return candidates.where(self.bounded(recursion, self.predicts(predictor), candidates))

    def predicts(self, predictor: Tensor) -> Tensor:
        """Whether the inference rule selects each candidate, [N]: sigmoid(score) >= threshold, compared as logits."""
        return self.router.steered(predictor.detach()) >= self.router.logit_threshold

    def measure(self, recursion: int, predictor: Tensor, candidates: TokenSet) -> None:
        """Count what the inference rule would have selected, for the control."""
        if self.router.control is None:
            return
        # Of the tokens that the rule sends this far, only those that top-k has sent this far too are known here.
        following = candidates.gather(self.following)
        taking = following & (self.predicts(predictor) if recursion else torch.ones_like(following))
        self.following = candidates.scatter(self.following, taking)
        self.totals["causal_choices"][recursion] = torch.stack((following.sum(), taking.sum(), taking.sum()))
        if recursion:
            self.add_margins(self.router, recursion, self.router.steered(predictor) - self.router.logit_threshold)

    def add_losses(self, z: Tensor, predictor: Tensor, chosen: Tensor, candidates: TokenSet) -> None:
        """BCE of the predictor against the selection `chosen` [N] (mean over the candidates), and the z-loss."""
        weights = self.weights(candidates, z.dtype)
        reduction = "mean" if weights is None else "sum"
        bce = F.binary_cross_entropy_with_logits(predictor, chosen, weights, reduction=reduction)
        if self.router.aux_router is None:
            self.add_loss("aux_loss", self.router.config.aux_coeff * bce)
        else:
            # No coefficient: its gradient reaches only the auxiliary router, whose learning rate sets the scale.
            self.add_loss("aux_router_loss", bce)
        self.add_z_loss(z, candidates)
