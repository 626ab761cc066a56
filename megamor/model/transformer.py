"""The model: embedding, prelude, recursion stage, coda, final norm, tied head. Vanilla is a prelude without a stage.

The model knows one device and no parallelism; it exports a `ParallelPlan` that says what may be sharded as one unit,
and
`megamor/parallel` applies it from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.config import Config
from megamor.model.blocks import Block, KeysValues, RMSNorm, ZeroLinear
from megamor.model.kv_cache import KVCache
from megamor.model.layouts import Geometry
from megamor.model.loss import IGNORE, linear_cross_entropy
from megamor.model.pairs import visible_pairs
from megamor.model.recompute import Recomputation
from megamor.model.recursion import RecursionStage
from megamor.model.sharing import layer_stack
from megamor.routing import DepthBounds, Mode, Ratio, Router, RoutingContext, TokenSet


class ModelOutput(NamedTuple):
    """What a forward pass returns. `logits` [B, S, vocab] only without labels, `loss_sum` and `num_tokens` only with.

    `router_losses` have their coefficients applied and are means over the micro-batch. `depth` [B, S] counts
    recursions;
    `work` [Nr, 2] is explained at `StageOutput`, `pairs` (with labels) are the same of a block that sees every token;
    `ratios` and `totals` are the router's statistics.
    """

    logits: Tensor | None
    loss_sum: Tensor | None
    num_tokens: Tensor | None
    router_losses: dict[str, Tensor]
    ratios: dict[str, Ratio]
    totals: dict[str, Tensor]
    depth: Tensor | None
    work: Tensor | None
    pairs: Tensor | None = None


@dataclass(frozen=True)
class ParallelPlan:
    """How the model may be taken apart.

    `units`: modules to shard as one group each, in forward order; the shared core is one of them, so that its weights
    are gathered once per pass. Embedding and final norm stay with the root. `shared_core`: the module that holds the
    loop whose depth may differ between ranks. `compile_targets`: modules worth compiling one by one.
    """

    units: list[nn.Module]
    shared_core: nn.Module | None = None
    compile_targets: list[nn.Module] = field(default_factory=list)


class Transformer(nn.Module):
    """Mixture-of-Recursions language model; see the module docstring."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        plan = layer_stack(config)
        self.embed = nn.Embedding(config.model.vocab_size, config.model.dim)
        self.prelude = nn.ModuleList(Block(config.model) for _ in range(plan.num_prelude))
        self.stage = RecursionStage(config, plan) if plan.schedule else None
        self.coda = nn.ModuleList(Block(config.model) for _ in range(plan.num_coda))
        self.norm = RMSNorm(config.model.dim, config.model.norm_eps)
        self.recomputation = Recomputation()

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        mode: Mode = "train",
        step: int = 0,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        bounds: DepthBounds | None = None,
    ) -> ModelOutput:
        """inputs [B, S] token ids; labels [B, S] are the ids to predict at each position, -100 where none is.

        `mode` chooses training-time routing with losses ("train"), the same routing for evaluation ("topk"), or the
        router's inference rule ("causal"). `step` is the optimizer step (0-based), which drives warm-ups. `documents`
        [B, S] are ids that attention must not cross. With `cache`, inputs are the tokens that follow those in it, and
        its num_tokens grows by S; needs a causal mode and no documents. `bounds` limit the recursions of each token, in
        the causal mode.
        """
        assert cache is None or (documents is None and mode == "causal"), "a cache is for decoding single documents"
        start = 0 if cache is None else cache.num_tokens
        geometry = Geometry.of(inputs, self.config.model, self.embed.weight.dtype, documents, start)
        x = self.run_unshared("prelude", self.embed(inputs.flatten()), geometry, cache)
        routed = None
        if self.stage is not None:
            context = RoutingContext(geometry.batch, geometry.seq_len, mode, step, geometry.positions, bounds)
            routed = self.stage(x, geometry, context, cache)
            x = routed.stream
        x = self.norm(self.run_unshared("coda", x, geometry, cache))
        if cache is not None:
            cache.num_tokens += inputs.shape[1]
        everything = TokenSet.all(geometry.batch, geometry.seq_len)

        logits = loss_sum = num_tokens = None
        if labels is None:
            logits = F.linear(x, self.embed.weight).unflatten(0, inputs.shape)
        else:
            loss_sum = linear_cross_entropy(x, self.embed.weight, labels.flatten())
            num_tokens = (labels != IGNORE).sum()
        return ModelOutput(
            logits,
            loss_sum,
            num_tokens,
            routed.losses if routed else {},
            routed.ratios if routed else {},
            routed.totals if routed else {},
            routed.depth.view(inputs.shape) if routed else None,
            routed.work if routed else None,
            visible_pairs(everything, everything, geometry) if labels is not None else None,
        )

    def run_unshared(self, part: str, x: Tensor, geometry: Geometry, cache: KVCache | None) -> Tensor:
        """x [B·S, dim] through the blocks of `prelude` or `coda`, which see every token."""
        everything = TokenSet.all(geometry.batch, geometry.seq_len)
        keys_values, layout = KeysValues(), geometry.layout(everything, everything)
        for number, block in enumerate(getattr(self, part)):
            if cache is not None:
                keys_values, layout = cache.add((part, number), KeysValues(), everything, everything, geometry)
            x, _ = self.recomputation.block(block, in_core=False)(x, geometry.angles, layout, keys_values)
        return x

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, init_std) for matrices (projections, embedding, routers), ones for norms, zeros for
        buffers; routers initialise what else they have."""
        for buffer in self.buffers():
            buffer.zero_()
        for module in self.modules():
            if isinstance(module, ZeroLinear):
                module.weight.zero_()
            elif isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.model.init_std, generator=generator)
            elif isinstance(module, RMSNorm):
                for weight in (module.weight, *module.others):
                    weight.fill_(1.0)
            elif isinstance(module, Router):
                module.reset()
        if self.stage is not None and self.stage.recursion_embedding is not None:
            for parameter in self.stage.recursion_embedding:
                parameter.zero_()

    def set_activation_checkpointing(self, policy: str, selective_ops: Sequence[str] = ()) -> None:
        """Keep less for the backward pass and compute it again there: see `Recomputation`."""
        recomputation = Recomputation.of(policy, selective_ops)
        for module in self.modules():
            if isinstance(module, Transformer | RecursionStage | Block):
                module.recomputation = recomputation

    def parallel_plan(self) -> ParallelPlan:
        """Units for sharding and compilation; see `ParallelPlan`."""
        stage = [] if self.stage is None else [self.stage]
        core_blocks = [] if self.stage is None else list(self.stage.blocks)
        blocks = [*self.prelude, *core_blocks, *self.coda]
        return ParallelPlan([*self.prelude, *stage, *self.coda], self.stage, blocks)

    def num_parameters(self) -> int:
        """Unique parameters, embedding (tied with the head) included."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_model(config: Config, *, device: str | torch.device = "cpu", seed: int | None = None) -> Transformer:
    """The model of a validated config.

    On the meta device it has shapes only. Elsewhere its weights are drawn from `seed` (default: `run.seed`), always on
    the CPU, so that they are the same whatever the device.
    """
    with torch.device("meta"):
        model = Transformer(config)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(config.run.seed if seed is None else seed)
    model.init_weights(generator)
    return model.to(device)
