"""Bounds on a token's depth: budgets hold, given depths are replayed, rows can be regrouped between recursions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamor.model import Transformer
from megamor.routing import DepthBounds, RoutingContext, TokenSet
from tests.combinations import BATCH, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens

NUM_TOKENS = BATCH * SEQ_LEN


def run(model: Transformer, least: Tensor | None = None, most: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits and depths [B·S] with bounds."""
    bounds = None
    if least is not None or most is not None:
        least = torch.zeros(NUM_TOKENS, dtype=torch.int64) if least is None else least
        bounds = DepthBounds(least, torch.full_like(least, 9) if most is None else most)
    with torch.no_grad():
        out = model(tokens(), mode="causal", bounds=bounds)
    return out.logits, out.depth.flatten()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_known_depth_is_replayed(router: str) -> None:
    model = lively_model(tiny_config(ROUTERS[router]))
    logits, depth = run(model)
    again, same_depth = run(model, depth, depth)
    assert torch.equal(same_depth, depth)
    torch.testing.assert_close(again, logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("router", ROUTERS)
def test_any_depth_can_be_required(router: str) -> None:
    model = lively_model(tiny_config(ROUTERS[router]))
    deepest = model.stage.router.num_recursions
    demanded = torch.randint(1, deepest + 1, (NUM_TOKENS,), generator=torch.Generator().manual_seed(5))
    _, depth = run(model, demanded, demanded)
    assert torch.equal(depth, demanded)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_budget_holds_and_changes_nothing_below_it(router: str) -> None:
    model = lively_model(tiny_config(ROUTERS[router]))
    most = torch.randint(1, 4, (NUM_TOKENS,), generator=torch.Generator().manual_seed(6))
    _, depth = run(model, most=most)
    assert bool((depth <= most).all())
    logits, free = run(model)
    unlimited, same = run(model, most=torch.full((NUM_TOKENS,), 9))
    assert torch.equal(free, same)
    torch.testing.assert_close(unlimited, logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("router", ROUTERS)
def test_rows_decide_the_same_when_regrouped(router: str) -> None:
    """Sessions for each half of the rows, merged before each recursion, select the same as one session for all."""
    stage = lively_model(tiny_config(ROUTERS[router])).stage
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(NUM_TOKENS, 32, generator=generator, dtype=torch.float64) for _ in range(4)]
    positions = torch.arange(NUM_TOKENS)

    def context(rows: Tensor) -> RoutingContext:
        return RoutingContext(len(rows), 1, "causal", 0, rows)

    whole = stage.router.begin(states[0], context(positions))
    halves = [stage.router.begin(states[0][rows], context(rows)) for rows in positions.split(NUM_TOKENS // 2)]
    state = {name: torch.cat([getattr(half, name) for half in halves]) for name in halves[0].per_row}
    alive, regrouped_alive = positions, positions
    for recursion in range(stage.router.num_recursions):
        if len(alive) == 0:
            break
        plan = whole.route(recursion, states[recursion][alive], TokenSet(NUM_TOKENS, 1, 1, alive, one_each(alive)))
        mix = whole.mix(recursion, plan, states[recursion + 1][plan.tokens.index])
        alive = plan.tokens.index

        order = torch.randperm(len(regrouped_alive), generator=generator)
        rows = regrouped_alive[order]
        session = halves[0].regrouped(context(rows), {name: value[rows] for name, value in state.items()})
        chosen = session.route(recursion, states[recursion][rows], TokenSet.all(len(rows), 1))
        again = session.mix(recursion, chosen, states[recursion + 1][chosen.tokens.gather(rows)])
        for name in session.per_row:
            state[name] = state[name].index_copy(0, rows, getattr(session, name))
        regrouped_alive, sorting = chosen.tokens.gather(rows).sort()
        assert torch.equal(regrouped_alive, alive)
        for one, other in zip((mix.from_core, mix.emit), (again.from_core, again.emit), strict=True):
            if isinstance(one, Tensor):
                torch.testing.assert_close(other[sorting], one, atol=1e-12, rtol=0)


def one_each(rows: Tensor) -> Tensor:
    """Lengths of `rows` sequences of one token."""
    return torch.zeros(NUM_TOKENS, dtype=torch.int64).index_fill(0, rows, 1)
