"""Random routing: the control that shows whether a router has learned anything (paper, ablation of routing).

Tokens are selected at random, and by default their gates are open: they have the value that expert-choice's auxiliary
loss drives the gates of selected tokens to. Learned gates have nothing that holds them open here, so they close, the
later recursions turn into no-ops, and learned routing looks better than it is.

Each token draws a number; recursion r takes the tokens whose number is below its capacity. The numbers of a *block* of
32 neighbouring tokens are spread evenly over [0, 1) in random order, so capacities hold within a token or two in any
text. A number is a hash of what is known about its block. In training that is the run's seed, the step, and where the
block is in the step's batch, whatever ranks and micro-batches share it. At inference it is the text from the document's
beginning to the block's first token: different texts have different patterns, and the same text always has the same.
Several recursion stages have a pattern each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megamor.config import RandomConfig
from megamor.routing.plan import Mix, RoutingPlan, TokenSet
from megamor.routing.router import InferenceRule, RoutingContext
from megamor.routing.scored import ScoredRouter, ScoredSession

BLOCK = 32
"""Neighbouring tokens whose numbers are spread evenly. Each number costs as many hashes."""
_ROUNDS = ((-7046029254386353131, 31), (-4417276706812531889, 29), (-8663945395140668459, 32))


class Blocks(NamedTuple):
    """The block of each token: a `key` [T] that identifies it, and the token's `place` [T] in it."""

    key: Tensor
    place: Tensor


class RandomRouter(ScoredRouter):
    """`gates: learned` uses scores for the gates; without it, the router has no parameters."""

    causal_in_training = True
    reads_text = True
    inference_rule = InferenceRule("random")
    config: RandomConfig

    def __init__(self, config: RandomConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        if config.gates == "open":
            del self.heads

    def begin(self, rows: Tensor, context: RoutingContext) -> RandomSession:
        """Draw one number per token."""
        return RandomSession(self, rows, context)


class RandomSession(ScoredSession):
    """Random routing during one forward pass. `draw` [T] is each token's number in [0, 1)."""

    router: RandomRouter
    per_row = ("draw",)

    def __init__(self, router: RandomRouter, rows: Tensor, context: RoutingContext) -> None:
        super().__init__(router, context)
        self.draw = evenly_spread(blocks_of(context, rows.device))

    def route(self, recursion: int, rows: Tensor, candidates: TokenSet) -> RoutingPlan:
        """Candidates whose number is below the capacity."""
        config, capacity = self.router.config, self.router.capacity[recursion]
        if capacity >= 1.0:
            tokens, indices = self.take_all(recursion, candidates)
        else:
            chosen = candidates.gather(self.draw) < capacity
            tokens, indices = candidates.where(self.bounded(recursion, chosen, candidates))
        if config.gates == "open":
            gate = 1.0 if config.gating == "additive" else config.alpha
            return RoutingPlan(tokens, indices, Mix(from_stream=1.0, from_core=gate))
        z = self.router.score(recursion, rows)
        self.add_z_loss(z, candidates)
        return self.router.plan(z, tokens, indices)


def blocks_of(context: RoutingContext, device: torch.device) -> Blocks:
    """The blocks of all tokens; see the module docstring."""
    if context.mode == "train":
        whole = context.everything
        order, sequence = whole.rank_of(whole, device), context.first_sequence + whole.sequences(device)
        step = mixed(torch.full_like(order, context.seed)) + context.step + (context.stage << 32)
        return Blocks(mixed(mixed(step) + sequence) + order // BLOCK, order % BLOCK)
    positions = context.positions_of(device)
    # A context that someone made without a text has positions at least.
    key = positions // BLOCK if context.text is None else context.text
    if context.begins is not None:  # positions may continue from the document before
        positions = torch.arange(len(positions), device=device) - context.begins
    return Blocks(key + (context.stage << 32), positions % BLOCK)


def text_keys(tokens: Tensor, order: Tensor) -> Tensor:
    """Keys [T] for `Blocks` of `tokens` [T], ids of whole documents one after another.

    `order` [T] counts the tokens of each document from 0. A key is a hash of the document up to its block's first token
    (included), so that it can be computed before the rest of the block is known.
    """
    total = mixed(mixed(tokens) + order).cumsum(0)
    rows = torch.arange(len(tokens), device=tokens.device)
    begins = rows - order
    before = torch.where(begins > 0, total[(begins - 1).clamp_min(0)], 0)
    return total[rows - order % BLOCK] - before


def evenly_spread(blocks: Blocks) -> Tensor:
    """Numbers [T] in [0, 1): each block has one in each of `BLOCK` equal intervals, in random order."""
    base = mixed(blocks.key).unsqueeze(1)
    ranked = mixed(base + torch.arange(BLOCK, device=base.device))
    own = ranked.gather(1, blocks.place.unsqueeze(1))
    return ((ranked < own).sum(1) + uniform_hash(own.squeeze(1))) / BLOCK


def uniform_hash(keys: Tensor) -> Tensor:
    """Pseudo-random numbers in [0, 1), one for each int64 key."""
    return ((mixed(keys) >> 11) & ((1 << 53) - 1)).to(torch.float64) / (1 << 53)


def mixed(keys: Tensor) -> Tensor:
    """Pseudo-random int64 numbers, one for each int64 key: a multiply-xorshift mixer with wrap-around."""
    x = keys.to(torch.int64)
    for multiplier, shift in _ROUNDS:
        x = (x + 1).mul_(multiplier)
        x ^= (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)
    return x


def uniform_array(keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """As `uniform_hash`, in a third of its time on a CPU."""
    x = keys.astype(np.uint64)
    shifted = np.empty_like(x)
    for multiplier, shift in _ROUNDS:
        x += np.uint64(1)
        x *= np.uint64(multiplier % 2**64)
        x ^= np.right_shift(x, np.uint64(shift), out=shifted)
    uniform: NDArray[np.float64] = (x >> np.uint64(11)) * np.float64(2.0**-53)
    return uniform
