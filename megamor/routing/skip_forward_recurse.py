"""Skip, forward or recurse: before each recursion a token chooses one of three actions, with gradients through it.

skip: leave without taking the recursion (cost 0). forward: take it and leave (cost 1). recurse: take it and decide
again (cost 1 so far). Training samples the choice with the Gumbel-max trick; inference takes the most probable one.

The result of a token is that of the sampled path. Its gradient is that of the mixture over the points at which the
token could have stopped and that were computed: with the relaxed probabilities P of Gumbel-softmax (arXiv 1611.01144),
stopping before a recursion weighs P_skip, after it P_forward, and everything later P_recurse.

The penalty is on the *expected* depth under the probabilities, which is differentiable, so depth can be traded against
loss or held at a target; so can the fraction of decisions that are to recurse. The most probable choices have another
mean depth. With a target, training therefore measures the depth of the inference rule too, and shifts the logits of
that rule until it is at the target.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.config import SkipForwardRecurseConfig
from megamor.routing.control import DepthControl, taken_shares
from megamor.routing.heads import HistoryAttention, MLPHead, full_precision
from megamor.routing.plan import Incoming, Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, Router, RoutingContext, RoutingSession

SKIP, FORWARD, RECURSE = 0, 1, 2
ACTIONS = ("skip", "forward", "recurse")
SAMPLED, LIKELIEST = 0, 1


class SkipForwardRecurseRouter(Router):
    """One network d → hidden → 3 for all recursions, or one for each.

    `shifts` [2], with a target depth, are what is added to the logit of recursing and subtracted from that of skipping:
    where the choice is sampled, and where it is the most probable one.
    """

    causal_in_training = True
    shifts: Tensor | None

    def __init__(self, config: SkipForwardRecurseConfig, dim: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.config = config
        self.control = DepthControl.of(config, num_recursions)
        new = MLPHead if config.gate == "mlp" else HistoryAttention
        shared = config.routers == "shared"
        heads = [new(dim, 3, config.hidden) for _ in range(1 if shared else num_recursions)]
        self.head: nn.Module = heads[0] if shared else nn.ModuleList(heads)
        self.recursion_embedding = nn.Embedding(num_recursions, dim) if config.recursion_input else None
        self.register_buffer("shifts", None if self.control is None else torch.zeros(2))

    @property
    def inference_rule(self) -> InferenceRule:
        """`choose`; a threshold is on the probability of recursing."""
        return InferenceRule("argmax_choice", score="router", threshold=self.config.inference_threshold)

    def begin(self, rows: Tensor, context: RoutingContext) -> SkipForwardRecurseSession:
        """Draw the noise of all decisions at once, so that a token's noise does not depend on other tokens' choices."""
        return SkipForwardRecurseSession(self, rows, context)

    def temperature(self, step: int) -> float:
        """Gumbel-softmax temperature at an optimizer step."""
        config = self.config
        done = min(1.0, step / config.temperature_steps)
        return config.temperature_start + done * (config.temperature_end - config.temperature_start)

    def shifted(self, logits: Tensor, rule: int) -> Tensor:
        """`logits` [N, 3] under the shift of `rule`, SAMPLED or LIKELIEST."""
        if self.shifts is None:
            return logits
        return logits + self.shifts[rule] * torch.arange(-1.0, 2.0, device=logits.device)

    def choose(self, logits: Tensor) -> Tensor:
        """What tokens with `logits` [N, 3] choose at inference, [N]."""
        logits, threshold = self.shifted(logits, LIKELIEST), self.config.inference_threshold
        if threshold is None:
            return logits.argmax(-1)
        return torch.where(logits.softmax(-1)[:, RECURSE] >= threshold, RECURSE, logits[:, :RECURSE].argmax(-1))

    @torch.no_grad()
    def update(self, totals: dict[str, Tensor]) -> None:
        """Move the shifts towards the target depth, by the depths that the two rules had in this step."""
        if self.shifts is None or self.num_recursions < self.full_depth:
            return  # the target is one of full depth
        assert self.control is not None
        number, total, squares, expected = totals["margins"]
        sampled, variance = expected / number, squares / number - (total / number).square()
        if self.control.in_flops:
            sampled = self.control.measured(totals, taken_shares(totals))
        # Margins are half the differences, which decide. Noise decides too where the choice is sampled: the variance of
        # the difference of two Gumbel variables.
        scale = torch.stack((variance + math.pi**2 / 12, variance.clamp_min(1e-8))).sqrt()
        errors = self.control.target - torch.stack((sampled, self.control.measured(totals)))
        self.shifts += self.control.move(errors, scale / 2).to(self.shifts)


class SkipForwardRecurseSession(RoutingSession):
    """Decisions during one forward pass. `means` [T, d] are what decides at the granularity of sequences, and `history`
    [T, Nr + 1, 2 · hidden] the keys and values of an attention gate.

    `recursing` [T] says which tokens decide again; `reach` is the mean probability of reaching the next decision. In
    training, `arriving` [T] is each token's relaxed probability of what it has sampled so far, and `likely` [T] the
    weight with which it stands for tokens that follow the inference rule: 0, or 1 over the probability of its path.
    """

    def __init__(self, router: SkipForwardRecurseRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(context)
        self.router = router
        self.per_row = ("recursing",)
        self.recursing = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.reach = torch.ones((), dtype=dtype, device=rows.device)
        self.expected_depth, self.decisions = torch.zeros(2, dtype=dtype, device=rows.device).unbind()
        self.sizes: Incoming | None = None
        self.selected: TokenSet | None = None
        self.means: Tensor | None = None
        if router.config.granularity == "sequence":
            everything, begins = context.everything, context.begins
            if begins is None:
                begins = everything.bounds(rows.device)[everything.sequences(rows.device)]
            self.means = prefix_means(rows.to(dtype), begins, context, router)
            self.per_row += ("means",)
        if router.config.gate == "attention":
            self.per_row += ("history",)
            self.history = rows.new_zeros(len(rows), router.num_recursions + 1, 2 * router.config.hidden, dtype=dtype)
        self.noise: Tensor | None = None
        # (tokens, weight [n] in the mixture, their state there [n, d]) of every point at which a token could stop.
        self.stops: list[tuple[TokenSet, Tensor, Tensor]] = []
        if context.mode == "train":
            uniform = torch.rand(router.num_recursions, len(rows), 3, dtype=dtype, device=rows.device)
            self.noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
            if self.means is not None:
                self.noise = self.noise[:, begins]  # a document chooses as a whole
            self.arriving = self.likely = torch.ones(len(rows), dtype=dtype, device=rows.device)
            if router.shifts is not None:
                self.totals["causal_choices"] = torch.zeros(router.num_recursions, 3, dtype=dtype, device=rows.device)

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Decide for the candidates that chose to recurse; select those that do not skip."""
        deciding, deciding_indices = candidates, None
        if recursion > 0:
            # An exit rule may have taken some out.
            size = self.sizes.tolist()[1] if self.sizes is not None and candidates is self.selected else None
            deciding, deciding_indices = candidates.where(candidates.gather(self.recursing), size)
            rows = rows.index_select(0, deciding_indices)
        logits = self.logits(recursion, rows, deciding)
        sampled = self.router.shifted(logits, SAMPLED)
        probabilities = sampled.softmax(-1)
        self.add_expected_depth(recursion, probabilities)
        if self.noise is None:
            choice = self.bound_choice(recursion, self.router.choose(logits), deciding)
        else:
            noisy = sampled + deciding.gather(self.noise[recursion])
            choice = noisy.argmax(-1)
            self.add_rates(recursion, choice)
            self.measure(recursion, logits, probabilities, choice, deciding)
            relaxed = (noisy / self.router.temperature(self.context.step)).softmax(-1)
            relaxed = relaxed * deciding.gather(self.arriving).unsqueeze(-1)
            self.stops.append((deciding, relaxed[:, SKIP], rows.detach()))
            self.arriving = deciding.scatter(self.arriving, relaxed[:, RECURSE])
            last = recursion == self.router.num_recursions - 1  # where recursing is another word for stopping
            self.leaving = relaxed[:, FORWARD] + (relaxed[:, RECURSE] if last else 0.0)

        # Who decides again is known now too: one wait for both sizes, instead of another one before the next decision.
        self.sizes = deciding.sizes(torch.stack((choice != SKIP, choice == RECURSE), dim=1))
        size = None if self.sizes is None else self.sizes.tolist()[0]
        tokens, indices = deciding.where(choice != SKIP, size)
        self.selected = tokens
        if self.noise is not None:
            self.leaving = self.leaving.index_select(0, indices)
        self.recursing = deciding.scatter(self.recursing, choice == RECURSE)
        if deciding_indices is not None:
            indices = deciding_indices[indices]
        return RoutingPlan(tokens, indices, Mix())

    def logits(self, recursion: int, rows: Tensor, deciding: TokenSet) -> Tensor:
        """The logits [N, 3] of tokens in the states `rows` [N, d]."""
        router, head = self.router, self.router.head
        if self.means is not None:
            rows = deciding.gather(self.means)
        if router.recursion_embedding is not None:
            rows = rows + full_precision(router.recursion_embedding, "weight", self.reach.dtype)[recursion]
        head = head[recursion] if isinstance(head, nn.ModuleList) else head
        if not isinstance(head, HistoryAttention):
            return head(rows)  # type: ignore[no-any-return]
        new = F.pad(head.key_value(rows).unsqueeze(1), (0, 0, recursion, router.num_recursions - recursion))
        history = deciding.gather(self.history) + new
        self.history = deciding.scatter(self.history, history)
        return head(rows, history)  # type: ignore[no-any-return]

    def mix(self, recursion: int, plan: RoutingPlan, core_output: Tensor) -> Mix:
        """The core's output replaces the stream."""
        if self.noise is not None:
            self.stops.append((plan.tokens, self.leaving, core_output.detach()))
        return plan.mix

    def finish(self, result: Tensor) -> Tensor:
        """`result`, unchanged in value, with the gradient of the mixture for the router."""
        sampled = result.detach()
        for tokens, weight, states in self.stops:
            # Points that were not computed count as if they had the sampled value. So only differences to it matter:
            # with weights for the states themselves, a point would seem good or bad for what all points have in common.
            difference = states - tokens.gather(sampled)
            result = tokens.scatter_add(result, (weight - weight.detach()).unsqueeze(-1) * difference)
        return result

    def bound_choice(self, recursion: int, choice: Tensor, deciding: TokenSet) -> Tensor:
        """`choice` [N] corrected by the bounds on each token's depth."""
        bounds = self.context.bounds
        if bounds is None:
            return choice
        choice = torch.where(self.bounded(recursion, choice != SKIP, deciding), choice.clamp_min(FORWARD), SKIP)
        return torch.where(deciding.gather(bounds.least) > recursion + 1, RECURSE, choice)

    @torch.no_grad()
    def measure(
        self, recursion: int, logits: Tensor, probabilities: Tensor, choice: Tensor, deciding: TokenSet
    ) -> None:
        """Count what the inference rule would have chosen, for `SkipForwardRecurseRouter.update`."""
        if self.router.shifts is None:
            return
        # Only tokens whose sampled path is that of the rule so far know its states. Each of them stands for those whose
        # sample left the path: it counts 1 / (its probability of staying on it).
        likeliest, weight = self.router.choose(logits), deciding.gather(self.likely)
        marks = torch.stack((torch.ones_like(weight), likeliest != SKIP, likeliest == RECURSE), dim=1)
        self.totals["causal_choices"][recursion] = (weight.unsqueeze(1) * marks).sum(0)
        stays = (likeliest == RECURSE) & (choice == RECURSE)
        self.likely = deciding.scatter(self.likely, torch.where(stays, weight / probabilities[:, RECURSE], 0.0))
        if recursion == 0:
            margin = (logits[:, RECURSE] - logits[:, SKIP]) / 2
            zero, one = torch.zeros_like(margin), torch.ones_like(margin)
            self.totals["margins"] = torch.stack((one, margin, margin.square(), zero)).sum(1)

    def add_rates(self, recursion: int, choice: Tensor) -> None:
        """Count the actions chosen [N], overall and at this recursion. In the last, recursing is forwarding."""
        if recursion == self.router.num_recursions - 1:
            choice = choice.clamp_max(FORWARD)
        for action, name in enumerate(ACTIONS):
            for suffix in ("", f"_{recursion + 1}"):
                self.add_ratio(f"{name}_rate{suffix}", (choice == action).sum(), len(choice))

    def add_expected_depth(self, recursion: int, probabilities: Tensor) -> None:
        """Add recursion r's term of the expected depth a_0 + b_0·(a_1 + b_1·(a_2 + …)); after the last, the loss.

        a_r and b_r are the mean probabilities of taking the recursion and of recursing, among the tokens that decide at
        r. Those that decide at r + 1 are a sample of them, drawn by the same probabilities.
        """
        num_deciding = max(1, len(probabilities))
        self.decisions = self.decisions + self.reach
        self.expected_depth = self.expected_depth + self.reach * (1 - probabilities[:, SKIP]).sum() / num_deciding
        self.reach = self.reach * probabilities[:, RECURSE].sum() / num_deciding
        if recursion == self.router.num_recursions - 1 and self.context.mode == "train":
            config = self.router.config
            penalty = self.expected_depth
            target = config.depth(self.router.full_depth)
            if target is not None:
                # The target is one of full depth. With fewer recursions, aiming at it would only teach to recurse.
                at_full_depth = self.router.num_recursions == self.router.full_depth
                penalty = (self.expected_depth - target).square() * at_full_depth
            if config.recursion_rate is not None:
                # Each decision of a token but its first follows a choice to recurse.
                penalty = (1 - 1 / self.decisions - config.recursion_rate).square()
            self.add_loss("depth_loss", config.depth_coeff * penalty)
            if "margins" in self.totals:
                self.totals["margins"][3] = self.expected_depth.detach() * len(self.arriving)
            self.add_ratio("expected_depth", self.expected_depth * self.context.fill, self.context.fill)


def prefix_means(rows: Tensor, begins: Tensor, context: RoutingContext, router: nn.Module) -> Tensor:
    """Means of `rows` [T, d] over each token's document up to the token, from the row `begins` [T] on."""
    # Sums over windows that double until they reach the document's beginning. Differences of one cumulative sum would
    # do, but for rounding, which would let documents have an influence on those after them.
    rank = torch.arange(len(rows), device=rows.device) - begins
    total, length = rows, 1
    while length < context.everything.max_length:
        earlier = F.pad(total, (0, 0, length, 0))[: len(rows)]
        total = total + torch.where((rank >= length).unsqueeze(1), earlier, 0.0)
        length *= 2
    if context.memory is not None:
        # Decoding: each sequence's new tokens are added to the sum over its old ones.
        everything, rank = context.everything, context.positions_of(rows.device)
        before = context.memory.get(router, total.new_zeros(context.batch, total.shape[1]))
        total = total + before[everything.sequences(rows.device)]
        ends = everything.bounds(rows.device)
        context.memory[router] = torch.where(ends.diff().unsqueeze(1) > 0, total[ends[1:] - 1], before)
    return total / (rank + 1).unsqueeze(1)
