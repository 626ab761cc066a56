"""The recursion stage: a shared core of blocks applied up to Nr times, where a router decides token by token how deep.

Each recursion: the router selects among the tokens that passed the one before, the selected rows are gathered, the core
runs on them alone, and the result is combined into the stream with the weights of the plan. Tokens that are not
selected are not in the tensor that the core sees, so their compute is really saved.

The stage is one module whose forward loops over the recursions, so that sharded training gathers its weights once per
pass however many recursions run, and ranks whose tokens reach different depths still issue the same collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megamor.config import Config
from megamor.model.blocks import Block, Differences
from megamor.model.fan_out import fan_out
from megamor.model.kv_cache import KVCache
from megamor.model.kv_policy import CoreCall, KVPolicy
from megamor.model.layouts import Geometry
from megamor.model.pairs import visible_pairs
from megamor.model.recompute import Recomputation
from megamor.model.sharing import LayerStack
from megamor.routing import Mix, Ratio, Router, RoutingContext, RoutingPlan, TokenSet, build_router
from megamor.routing.plan import Weight


class StageOutput(NamedTuple):
    """The stage's result and what the routers did.

    `depth` [B·S] counts the recursions that each token took; `work` [Nr, 2] holds per recursion the tokens that the
    core has seen and the query-key pairs that attention may not skip (causal, inside documents).
    """

    stream: Tensor
    losses: dict[str, Tensor]
    ratios: dict[str, Ratio]
    totals: dict[str, Tensor]
    depth: Tensor
    work: Tensor


class RecursionStage(nn.Module):
    """Shared blocks and their router. See the module docstring."""

    def __init__(self, config: Config, plan: LayerStack) -> None:
        super().__init__()
        self.schedule = plan.schedule
        self.kv_policy = config.recursion.kv_policy
        recursion, num_recursions = config.recursion, len(plan.schedule)
        differences = Differences(num_recursions, recursion.separate_norms, recursion.lora_rank)
        self.blocks = nn.ModuleList(Block(config.model, differences) for _ in range(plan.num_core))
        self.recursion_embedding: nn.ParameterList | None = None
        if recursion.recursion_embedding:
            self.recursion_embedding = nn.ParameterList(torch.zeros(config.model.dim) for _ in range(num_recursions))
        self.router: Router = build_router(config.router, config.model.dim, num_recursions)
        self.adds_in_fp32 = config.train.add_shared_gradients_in_fp32
        self.recomputation = Recomputation()

    def forward(
        self, stream: Tensor, geometry: Geometry, context: RoutingContext, cache: KVCache | None = None
    ) -> StageOutput:
        """stream [B·S, dim] through up to Nr recursions."""
        session = self.router.begin(stream, context)
        policy = KVPolicy(self.kv_policy, cache)
        candidates = TokenSet.all(geometry.batch, geometry.seq_len)
        stage_input = rows = stream
        emitted: Tensor | None = None
        depth = torch.zeros(len(candidates), dtype=torch.int64, device=stream.device)
        work = []
        blocks = self.blocks_by_recursion()
        for recursion in range(self.router.num_recursions):
            plan = session.route(recursion, rows, candidates)
            x = rows if plan.indices is None else rows.index_select(0, plan.indices)
            y, keys = self.run_recursion(recursion, x, plan.tokens, geometry, policy, blocks[recursion])
            mix = session.mix(recursion, plan, y)
            if mix.emit is not None:
                emitted = torch.zeros_like(stream) if emitted is None else emitted
                emitted = plan.tokens.scatter_add(emitted, weighted(mix.emit, y))
            rows = combine(mix, x, y, stage_input, plan)
            stream = plan.tokens.scatter(stream, rows)
            if plan.idle is not None:
                idle = plan.idle.tokens
                stream = idle.scatter(stream, weighted(plan.idle.weight, idle.gather(stream)))
            if len(plan.tokens) == 0 and torch.is_grad_enabled():
                stream = self.touch_core(recursion, stream, geometry, blocks[recursion])
            candidates = plan.tokens
            depth = plan.tokens.scatter(depth, torch.full((len(candidates),), recursion + 1, device=depth.device))
            work.append(work_of(plan.tokens, keys, geometry))
        result = stream if emitted is None else emitted
        return StageOutput(result, session.losses, session.ratios, session.totals, depth, torch.stack(work))

    def blocks_by_recursion(self) -> list[Sequence[Callable[..., Any]]]:
        """[recursion][block]: what calls the core's blocks in each recursion."""
        if self.adds_in_fp32 and torch.is_grad_enabled():
            return [*fan_out(self.blocks, self.router.num_recursions)]
        return [list(self.blocks)] * self.router.num_recursions

    def run_recursion(
        self,
        recursion: int,
        x: Tensor,
        tokens: TokenSet,
        geometry: Geometry,
        policy: KVPolicy,
        blocks: Sequence[Callable[..., Any]],
    ) -> tuple[Tensor, TokenSet]:
        """The core's `blocks` in the order of `recursion` on x [N, dim], and the tokens whose keys they attended to."""
        order = self.schedule[recursion]
        if len(tokens) == 0:
            policy.pass_by(recursion, order, geometry)
            return x, tokens
        if self.recursion_embedding is not None:
            x = x + self.recursion_embedding[recursion]
        call = policy.core_call(recursion, order, tokens, geometry)
        run = self.recomputation.recursion(partial(self.run_blocks, call, blocks))
        y, *kept = run(x, *policy.inputs(call))
        policy.keep(call, kept)
        return y, policy.keys_of(call)

    def touch_core(
        self, recursion: int, stream: Tensor, geometry: Geometry, blocks: Sequence[Callable[..., Any]]
    ) -> Tensor:
        """`stream` unchanged, with gradient zero for what a recursion uses: where no token of this rank takes part in
        it.

        Sharded training needs the same parameters used on every rank (ZeRO-3 would even apply an old gradient).
        """
        alone = Geometry(1, 1, geometry.positions[:1], geometry.angles.select(torch.zeros_like(geometry.positions[:1])))
        policy = KVPolicy("recursion_wise", None)
        y, _ = self.run_recursion(recursion, stream[:1], TokenSet.all(1, 1), alone, policy, blocks)
        return stream + 0.0 * y.sum()

    def run_blocks(
        self, call: CoreCall, blocks: Sequence[Callable[..., Any]], x: Tensor, *stored: Tensor
    ) -> tuple[Tensor, ...]:
        """Blocks in order. `stored` are keys and values that come in; those that go out follow the result."""
        available = dict(zip(call.stored, zip(stored[0::2], stored[1::2], strict=True), strict=True))
        for place, block in enumerate(call.blocks):
            keys_values, layout = call.attention(place, available)
            run = self.recomputation.block(blocks[block], in_core=True)
            x, fresh = run(x, call.angles, layout, keys_values, call.recursion)
            if block in call.kept and block not in available:
                assert fresh is not None
                available[block] = fresh
        return x, *(tensor for block in call.kept for tensor in available[block])


def weighted(weight: Weight, values: Tensor) -> Tensor:
    """weight · values, where a tensor weight [N] applies row by row."""
    if isinstance(weight, Tensor):
        return weight.unsqueeze(-1) * values
    assert weight is not None
    return values if weight == 1.0 else weight * values


def combine(mix: Mix, x: Tensor, y: Tensor, stage_input: Tensor, plan: RoutingPlan) -> Tensor:
    """The selected rows after a recursion, [N, dim], in the type of the stream."""
    terms = []
    if mix.from_core is not None:
        terms.append(weighted(mix.from_core, y))
    if mix.from_stream is not None:
        terms.append(weighted(mix.from_stream, x))
    if mix.from_input is not None:
        terms.append(weighted(mix.from_input, plan.tokens.gather(stage_input)))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(x.dtype)


def work_of(tokens: TokenSet, keys: TokenSet, geometry: Geometry) -> Tensor:
    """[2]: tokens in the call, and the pairs of a query and a key that attention may not skip."""
    pairs = visible_pairs(tokens, keys, geometry)
    return torch.stack((torch.full_like(pairs, len(tokens)), pairs))
