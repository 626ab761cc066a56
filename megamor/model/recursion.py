"""The recursion stage: a shared core of blocks applied up to Nr times, to the tokens that a router selects.

In each recursion, the router selects among the tokens that passed the recursion before; the selected rows are gathered;
the core runs on them alone; and the result is combined into the stream with the weights of the routing plan. Tokens
that are not selected are not in the tensor that the core sees, so their compute is really saved.

The stage is one module whose forward loops over the recursions. Sharded training therefore gathers its weights once per
pass, however many recursions run, and ranks whose tokens reach different depths still issue the same collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megamor.config.exits import ExitRule
from megamor.config.segments import Segment
from megamor.model.attention import Grid
from megamor.model.blocks import Block, Differences
from megamor.model.flops import recursion_costs
from megamor.model.kv_cache import KVCache
from megamor.model.kv_policy import CoreCall, KVPolicy
from megamor.model.layouts import Geometry
from megamor.model.recompute import Recomputation
from megamor.routing import Mix, Ratio, Router, RoutingContext, RoutingPlan, RoutingSession, TokenSet, build_router
from megamor.routing.confidence import ConfidenceSession

Blocks = Sequence[Callable[..., Any]]
"""The callables that run the core's blocks in one recursion."""
Exit = tuple[ExitRule, Callable[[Tensor], Tensor]]
"""An exit rule, and the function from states [N, dim] to logits [N, vocab] that it asks."""


class StageOutput(NamedTuple):
    """The stream [T, dim] after the stage, and what the router did.

    `depth` [T] counts the recursions that each token took. `work` [Nr, 2] holds, per recursion, the number of tokens
    that the core processed and the query-key pairs that attention cannot skip (causal, inside documents and windows),
    on average over its blocks; zeros where a recursion wasn't run. Both are None without a stage.
    """

    stream: Tensor
    losses: dict[str, Tensor]
    ratios: dict[str, Ratio]
    totals: dict[str, Tensor]
    depth: Tensor | None
    work: Tensor | None


class RecursionStage(nn.Module):
    """Shared blocks and their router; see the module docstring."""

    sliding: tuple[int, ...] = ()
    """The blocks that have a sliding window."""
    observe: Callable[[RoutingSession, Tensor], RoutingSession] | None = None
    """Given the session of a forward pass and the stage's input, returns one that passes its results on."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        config = segment.config
        self.name, self.schedule, self.sliding = segment.name, segment.schedule, segment.sliding
        self.kv_policy = config.recursion.kv_policy
        recursion, num_recursions = config.recursion, len(segment.schedule)
        differences = Differences(
            num_recursions, recursion.separate_norms, recursion.lora_rank, recursion.residual_scaling
        )
        self.blocks = nn.ModuleList(Block(config.model, differences) for _ in range(segment.num_blocks))
        self.recursion_embedding: nn.ParameterList | None = None
        if recursion.recursion_embedding:
            self.recursion_embedding = nn.ParameterList(torch.zeros(config.model.dim) for _ in range(num_recursions))
        # a - 1 and b rather than a and b: bf16, in which sharded training computes, has few numbers near 1.
        self.injection: nn.ParameterList | None = None
        if recursion.input_injection:
            self.injection = nn.ParameterList(torch.zeros(2) for _ in range(num_recursions))
        self.backprop_recursions = recursion.backprop_recursions or num_recursions
        self.router: Router = build_router(config.router, config.model.dim, num_recursions)
        if self.router.control is not None:
            self.router.control.costs = recursion_costs(segment)
        self.adds_in_fp32 = config.train.add_shared_gradients_in_fp32
        self.recomputation = Recomputation()
        self.combination = Combination()
        self.exit: Exit | None = None

    def forward(
        self,
        stream: Tensor,
        geometry: Geometry,
        context: RoutingContext,
        cache: KVCache | None = None,
        states: list[Tensor] | None = None,
    ) -> StageOutput:
        """stream [T, dim] through up to Nr recursions; `states` as in `Transformer.forward`."""
        session = self.begin(stream, context)
        if self.observe is not None:
            session = self.observe(session, stream)
        policy = KVPolicy(self.kv_policy, cache, self.name, self.sliding)
        # `stream` has a row for every token; `rows` are those of the candidates, the tokens that passed the recursion
        # before. A token that drops out keeps its row of the stream as it is.
        candidates = geometry.everything
        stage_input = rows = stream
        emitted: Tensor | None = None
        depth = torch.zeros(len(candidates), dtype=torch.int64, device=stream.device)
        work, unused = [], []
        blocks = self.blocks_by_recursion()
        add_stream_norm(session, 0, stream)
        for recursion in range(self.router.num_recursions):
            plan = session.route(recursion, rows, candidates)
            x = rows if plan.indices is None else rows.index_select(0, plan.indices)
            entering = x
            if len(plan.tokens):
                # Not for no tokens: ZeRO reduces wrongly what a rank uses there and once more in `touch_core`.
                first = stage_input if self.injection is None else plan.tokens.gather(stage_input)
                entering = self.core_input(recursion, x, first)
            y, keys = self.run_recursion(recursion, entering, plan.tokens, geometry, policy, blocks[recursion])
            # Halting decides here, after the core has run; the other routers return the plan's own weights.
            mix = session.mix(recursion, plan, y)
            if mix.emit is not None and emitted is None:
                emitted = torch.zeros_like(stream)
            # A graph is for one size, or for any from 2 on.
            combination = self.combination if len(plan.tokens) > 1 else self.combination.forward
            rows, stream, emitted = combination(plan, mix, x, y, stage_input, stream, emitted)
            if len(plan.tokens) == 0 and torch.is_grad_enabled():
                # `len` is known to the host: the router has already read the size where the set is ragged.
                unused.append(recursion)
            add_gates(session, recursion, mix, y)
            add_stream_norm(session, recursion + 1, rows)
            last = recursion == self.router.num_recursions - 1
            add_state(states, geometry.window, emitted if last and emitted is not None else stream)
            candidates = plan.tokens
            depth = plan.tokens.scatter(depth, torch.full((len(candidates),), recursion + 1, device=depth.device))
            slides = [block in self.sliding for block in self.schedule[recursion]]
            pairs = geometry.mean_pairs(plan.tokens, keys, slides)
            work.append(torch.stack((torch.full_like(pairs, len(plan.tokens)), pairs)))
        for recursion in range(len(work), len(self.schedule)):
            work.append(torch.zeros_like(work[0]))
            session.add_ratio(f"gate_{recursion + 1}", stream.new_zeros(()), 0.0)
        result = session.finish(stream if emitted is None else emitted)
        at_full_depth = self.router.num_recursions == self.router.full_depth
        if self.router.control is not None and at_full_depth and "margins" in session.totals:
            everything = geometry.everything
            slides = [block in self.sliding for block in range(len(self.blocks))]
            pairs = geometry.mean_pairs(everything, everything, slides)
            work_of_all = torch.stack((torch.full_like(pairs, len(everything)), pairs))
            self.router.control.report(session, torch.stack((*work, work_of_all)))
        for recursion in unused:
            result = self.touch_core(recursion, result, geometry, blocks[recursion])
        return StageOutput(result, session.losses, session.ratios, session.totals, depth, torch.stack(work))

    def begin(self, rows: Tensor, context: RoutingContext) -> RoutingSession:
        """The router's session for rows [T, dim], the stage's input; under `exit`, which the causal mode obeys."""
        if self.exit is None or context.mode != "causal":
            return self.router.begin(rows, context)
        session = self.router.begin(rows, replace(context, exits=True))
        return ConfidenceSession(*self.exit, session, rows, self.router.num_recursions)

    def limit_recursions(self, most: int) -> None:
        """Run at most so many recursions from now on. The parameters of later ones then have no gradient."""
        self.router.num_recursions = min(most, self.router.full_depth)

    def core_input(self, recursion: int, x: Tensor, first: Tensor) -> Tensor:
        """What the core sees of rows x [N, dim] of the stream, which were `first` [N, dim] before the stage."""
        if self.injection is not None:
            from_stream, from_input = self.injection[recursion].to(x.dtype)
            x = x + from_stream * x + from_input * first
        return x if self.recursion_embedding is None else x + self.recursion_embedding[recursion]

    def blocks_by_recursion(self) -> list[Blocks]:
        """The core's blocks in each recursion."""
        if self.adds_in_fp32 and torch.is_grad_enabled():
            return fan_out(self.blocks, self.router.num_recursions)
        return [list(self.blocks)] * self.router.num_recursions

    def run_recursion(
        self, recursion: int, x: Tensor, tokens: TokenSet, geometry: Geometry, policy: KVPolicy, blocks: Blocks
    ) -> tuple[Tensor, TokenSet]:
        """The core on its input x [N, dim]: its output [N, dim], and the tokens whose keys it attended to."""
        order = self.schedule[recursion]
        if len(tokens) == 0:
            policy.skip(recursion, order, geometry)
            return x, tokens
        call = policy.core_call(recursion, order, tokens, geometry)
        run = self.recomputation.recursion(partial(self.run_blocks, call, blocks))
        truncated = torch.is_grad_enabled() and recursion < self.router.num_recursions - self.backprop_recursions
        with torch.no_grad() if truncated else nullcontext():
            y, *kept = run(x, *policy.inputs(call))
        if truncated:
            # The blocks' own residuals make the identity the first-order term of the core's derivative. So what comes
            # before the stage still learns.
            y = y + (x - x.detach())
        policy.keep(call, kept)
        # FLOPs are counted for all blocks from the keys that the first one attended to.
        return y, call.shared_of(order[0]).keys

    def touch_core(self, recursion: int, stream: Tensor, geometry: Geometry, blocks: Blocks) -> Tensor:
        """`stream` unchanged in value, with a gradient of zero for the parameters of a recursion that no token took."""
        # Sharded training needs every rank to use the same parameters in a step. A rank that skips a recursion would
        # not join the reduction of its gradients, and ZeRO-3 would even apply the gradient of an earlier step. One row
        # is enough; it has a policy of its own, so that no other token sees its keys.
        one, position = TokenSet.all(1, 1), geometry.positions[:1]
        alone = Geometry(one, Grid.of(one), position, position, geometry.angles.select(torch.zeros_like(position)))
        policy = KVPolicy(self.kv_policy, None)
        if self.kv_policy == "share_first":  # which has no use for the projections of keys once there are stored ones
            attention: Any = self.blocks[0].attention
            keys = stream.new_zeros(1, attention.k_proj.out_features // attention.head_dim, attention.head_dim)
            policy.store = {block: ((keys, keys), one) for order in self.schedule[:recursion] for block in order}
        entering = self.core_input(recursion, stream[:1], stream[:1])
        y, _ = self.run_recursion(recursion, entering, one, alone, policy, blocks)
        return stream + 0.0 * y.sum()

    def run_blocks(self, call: CoreCall, blocks: Blocks, x: Tensor, *stored: Tensor) -> tuple[Tensor, ...]:
        """The blocks of `call` in order, on x [N, dim].

        `stored` are the keys and values that enter (`CoreCall.shared`); those that leave (`CoreCall.kept`) follow the
        result.
        """
        # Activation checkpointing may run this a second time in the backward pass: it depends on its arguments alone,
        # and everything that the rest of the stage needs from it is a tensor in its result.
        available = dict(zip(call.shared, zip(stored[0::2], stored[1::2], strict=True), strict=True))
        for layer, block in enumerate(call.blocks):
            keys_values, layout = call.attention(layer, available)
            run = self.recomputation.block(blocks[block], in_core=True)
            x, merged = run(x, call.sights[block].angles, layout, keys_values, call.recursion)
            if block in call.kept and (block not in available or call.policy == "halted_reuse"):
                assert merged is not None
                available[block] = merged
        return x, *(tensor for block in call.kept for tensor in available[block])


def add_state(states: list[Tensor] | None, window: Grid, x: Tensor) -> None:
    """Add the stream x [T, dim] to `states`, if these are wanted."""
    if states is not None:
        states.append(window.pad(x))


def weighted(weight: Tensor | float, values: Tensor) -> Tensor:
    """weight · values; a tensor weight [N] applies row by row."""
    if isinstance(weight, Tensor):
        return weight.unsqueeze(-1) * values
    return values if weight == 1.0 else weight * values


def add_gates(session: RoutingSession, recursion: int, mix: Mix, y: Tensor) -> None:
    """Report the mean weight of the core's output y [N, dim], unless the router has reported its gates itself."""
    name, weight = f"gate_{recursion + 1}", mix.from_core if mix.emit is None else mix.emit
    if name not in session.ratios:
        weights = weight if isinstance(weight, Tensor) else torch.full((len(y),), weight or 0.0, device=y.device)
        session.add_ratio(name, weights.sum(), len(y))


def add_stream_norm(session: RoutingSession, recursion: int, rows: Tensor) -> None:
    """In training, report the RMS of the stream's rows [N, dim] after `recursion` (from 1; 0: before the first)."""
    if session.context.mode == "train":
        dtype = torch.promote_types(rows.dtype, torch.float32)
        norms = torch.linalg.vector_norm(rows.detach(), dim=-1, dtype=dtype)
        session.add_ratio(f"stream_rms_{recursion}", norms.sum() / rows.shape[-1] ** 0.5, len(rows))


class Combination(nn.Module):
    """The core's output y [N, dim] into the rows x [N, dim], the stream, and what is emitted, [T, dim] each; returns
    these three. A region for the compiler."""

    def forward(
        self, plan: RoutingPlan, mix: Mix, x: Tensor, y: Tensor, stage_input: Tensor, stream: Tensor, out: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if out is not None and mix.emit is not None:
            out = plan.tokens.scatter_add(out, weighted(mix.emit, y))
        rows = combine(mix, x, y, stage_input, plan)
        return rows, plan.tokens.scatter(stream, rows), out


def combine(mix: Mix, x: Tensor, y: Tensor, stage_input: Tensor, plan: RoutingPlan) -> Tensor:
    """The selected rows after a recursion, [N, dim], in the type of the stream."""
    x_in = x if mix.from_input is None else plan.tokens.gather(stage_input)
    terms = ((mix.from_core, y), (mix.from_stream, x), (mix.from_input, x_in))
    return reduce(torch.add, (weighted(weight, rows) for weight, rows in terms if weight is not None)).to(x.dtype)


class _FanOut(torch.autograd.Function):
    """A weight as `count` views of itself, whose gradients are summed in fp32 and rounded once."""

    # Without it, autograd sums the recursions' gradients in the type of the weights they used. In mixed precision that
    # is bf16, where the sum of many small terms loses them.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, count: int) -> tuple[Tensor, ...]:
        # A recursion that did not use the weight then has None for a gradient instead of a tensor of zeros.
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        present = [grad for grad in grads if grad is not None]
        if not present:
            return None, None
        total = present[0].to(torch.promote_types(present[0].dtype, torch.float32), copy=True)
        for grad in present[1:]:
            total += grad
        return total.to(present[0].dtype), None


def fan_out(blocks: nn.ModuleList, count: int) -> list[Blocks]:
    """The blocks in each of `count` recursions, which have their own views of all weights."""
    apply: Callable[[Tensor, int], tuple[Tensor, ...]] = _FanOut.apply
    views = [{name: apply(weight, count) for name, weight in block.named_parameters()} for block in blocks]
    return [
        [
            partial(_call_with, block, {name: weights[recursion] for name, weights in own.items()})
            for block, own in zip(blocks, views, strict=True)
        ]
        for recursion in range(count)
    ]


def _call_with(block: nn.Module, weights: dict[str, Tensor], *args: Any) -> Any:
    return functional_call(block, weights, args)
