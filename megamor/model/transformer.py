"""The model: embedding, prelude, recursion stage, coda, final norm, tied head. Vanilla is a prelude without a stage.

One token's way through it: its id becomes a row [dim] of the stream (`embed`); the prelude's blocks update the row,
attending to all earlier tokens; the stage applies the shared core to it as often as the router decides
(`model/recursion.py`); the coda's blocks and the final norm follow; the row times the embedding's transpose gives the
logits of the next token.

The model knows one device and no parallelism. It exports a `ParallelPlan` that says what may be sharded as one unit;
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
from megamor.config.depth import final_recursions
from megamor.model.blocks import Block, KeysValues, RMSNorm, ZeroLinear
from megamor.model.kv_cache import KVCache
from megamor.model.layouts import Geometry
from megamor.model.loss import IGNORE, linear_cross_entropy
from megamor.model.recompute import Recomputation
from megamor.model.recursion import RecursionStage, StageOutput
from megamor.model.sharing import layer_stack
from megamor.routing import DepthBounds, Mode, Ratio, Router, RoutingContext
from megamor.routing.random import text_keys


class ModelOutput(NamedTuple):
    """What a forward pass returns.

    Without labels, `logits` [B, S, vocab]; with labels, `loss_sum` (nats, summed) over `num_tokens` valid positions.
    `router_losses` are means over the micro-batch with their coefficients applied; `ratios` and `totals` are the
    router's statistics. `depth` [B, S] counts the recursions of each token (-1 for padding) and `work` [Nr, 2] is
    explained at `StageOutput`; both are None for vanilla. `pairs` (with labels) are the query-key pairs of a block that
    sees every token. In training with `train.z_loss_coeff`, `z_loss_sum` is the z-loss, whose gradient `loss_sum` has.
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
    z_loss_sum: Tensor | None = None


@dataclass(frozen=True)
class ParallelPlan:
    """How the model may be sharded and compiled.

    `units` are modules to shard as one group each, in forward order. The shared core is one of them, so that its
    weights are gathered once per pass; embedding and final norm stay with the root. `shared_core` is the module whose
    loop may run to different depths on different ranks. `compile_targets` are modules to compile one by one. The
    `router` computes with fp32 weights whatever the precision.
    """

    units: list[nn.Module]
    shared_core: nn.Module | None = None
    compile_targets: list[nn.Module] = field(default_factory=list)
    router: nn.Module | None = None


class Transformer(nn.Module):
    """Mixture-of-Recursions language model; see the module docstring."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        layers = layer_stack(config)
        self.embed = nn.Embedding(config.model.vocab_size, config.model.dim)
        self.prelude = nn.ModuleList(Block(config.model) for _ in range(layers.num_prelude))
        self.stage = RecursionStage(config, layers) if layers.schedule else None
        self.coda = nn.ModuleList(Block(config.model) for _ in range(layers.num_coda))
        self.norm = RMSNorm(config.model.dim, config.model.norm_eps)
        self.recomputation = Recomputation()
        self.limit_recursions(None)

    def limit_recursions(self, most: int | None) -> None:
        """Run at most so many recursions from now on; None: as many as at the end of training."""
        self.recursions = most or final_recursions(self.config.recursion)
        if self.stage is not None:
            self.stage.limit_recursions(self.recursions)

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        mode: Mode = "train",
        step: int = 0,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        bounds: DepthBounds | None = None,
        lengths: tuple[int, ...] | None = None,
        first_sequence: int = 0,
    ) -> ModelOutput:
        """Logits of `inputs` [B, S] (token ids), or the loss against `labels` [B, S] (-100 at positions to ignore).

        `mode` selects training-time routing with losses ("train"), the same routing for evaluation ("topk"), or the
        router's inference rule ("causal"). `step` is the optimizer step (0-based), which drives warm-ups. `documents`
        [B, S] are ids that attention must not cross. With `cache`, `inputs` are the tokens that follow those in it, and
        its `num_tokens` grows by S; this needs the causal mode and no documents. `bounds` limit the recursions of each
        token, in the causal mode. Of sequence b, only the first `lengths[b]` tokens are real (None: all are). What
        follows is padding: it isn't computed, its logits are 0 and it has no influence on anything. `first_sequence` is
        the number of the first sequence in the batch of the step, over all ranks and micro-batches.
        """
        assert cache is None or (documents is None and mode == "causal"), "a cache is for decoding single documents"
        assert lengths is None or (cache is None and bounds is None), "decoding knows no padding"
        if lengths is not None and not any(lengths):
            return self.run_nothing(inputs, labels, mode, step)
        start = 0 if cache is None else cache.num_tokens
        geometry = Geometry.of(inputs, self.config.model, self.embed.weight.dtype, documents, start, lengths)
        # From here on a row [dim] per token: [T, dim]. Only attention needs to know the sequences (`Geometry`).
        window, everything = geometry.window, geometry.everything
        x = self.run_unshared("prelude", self.embed(window.unpad(inputs)), geometry, cache)
        routed = StageOutput(x, {}, {}, {}, None, None)
        if self.stage is not None:
            reads_text = self.stage.router.reads_text and mode != "train"
            context = RoutingContext(
                batch=inputs.shape[0],
                seq_len=inputs.shape[1],
                mode=mode,
                step=step,
                positions=geometry.positions,
                bounds=bounds,
                whole=everything if lengths is not None else None,
                seed=self.config.run.seed,
                first_sequence=first_sequence,
                text=self.text_keys(inputs, geometry, cache) if reads_text else None,
            )
            routed = self.stage(x, geometry, context, cache)
        x = self.norm(self.run_unshared("coda", routed.stream, geometry, cache))
        if cache is not None:
            cache.num_tokens += inputs.shape[1]

        logits = loss_sum = num_tokens = pairs = z_loss_sum = None
        if labels is None:
            # Inference. Training never builds the logits of all tokens: see `linear_cross_entropy`.
            logits = window.pad(F.linear(x, self.embed.weight))
        else:
            labels = window.unpad(labels)
            z_coeff = self.config.train.z_loss_coeff if mode == "train" else 0.0
            loss_sum, z_loss_sum = linear_cross_entropy(x, self.embed.weight, labels, z_coeff)
            z_loss_sum = z_loss_sum if z_coeff else None
            num_tokens = (labels != IGNORE).sum()
            pairs = geometry.visible_pairs(everything, everything)
        depth = None if routed.depth is None else window.pad(routed.depth, -1)
        _, losses, ratios, totals, _, work = routed
        return ModelOutput(logits, loss_sum, num_tokens, losses, ratios, totals, depth, work, pairs, z_loss_sum)

    def text_keys(self, inputs: Tensor, geometry: Geometry, cache: KVCache | None) -> Tensor:
        """`RoutingContext.text` of `inputs` [B, S], which follow the tokens in `cache`."""
        if cache is None:
            rows = geometry.everything.rows(inputs.device)
            order = geometry.order if geometry.begins is None else rows - geometry.begins
            return text_keys(geometry.window.unpad(inputs), order)
        whole = cache.tokens = inputs if cache.tokens is None else torch.cat((cache.tokens, inputs), 1)
        order = torch.arange(whole.shape[1], device=inputs.device).expand_as(whole)
        return text_keys(whole.flatten(), order.flatten()).view_as(whole)[:, -inputs.shape[1] :].flatten()

    def run_nothing(self, inputs: Tensor, labels: Tensor | None, mode: Mode, step: int) -> ModelOutput:
        """The output for `inputs` [B, S] that are padding alone: zeros that depend on the same parameters as any other.

        Ranks with tokens wait for this one in the collectives of their passes, so one row goes through the model.
        """
        # Not `self(...)`: the hooks of sharding have run already, around this call's caller.
        one = self.forward(
            inputs[:1, :1], None if labels is None else torch.full_like(labels[:1, :1], IGNORE), mode, step
        )
        return one._replace(
            logits=None if one.logits is None else 0 * one.logits.expand(*inputs.shape, -1),
            router_losses={name: 0 * loss for name, loss in one.router_losses.items()},
            ratios={name: Ratio(0 * ratio.numerator, 0 * ratio.denominator) for name, ratio in one.ratios.items()},
            totals={name: 0 * total for name, total in one.totals.items()},
            depth=None if one.depth is None else one.depth.new_full(inputs.shape, -1),
            work=None if one.work is None else 0 * one.work,
            pairs=None if one.pairs is None else 0 * one.pairs,
        )

    def run_unshared(self, group: str, x: Tensor, geometry: Geometry, cache: KVCache | None) -> Tensor:
        """x [T, dim] through the blocks of `group` ("prelude" or "coda"), which see every token."""
        everything = geometry.everything
        keys_values, layout = KeysValues(), geometry.layout(everything, everything)
        for number, block in enumerate(getattr(self, group)):
            if cache is not None:
                keys_values, layout = cache.view((group, number), everything, geometry, (KeysValues(), everything))
            x, _ = self.recomputation.block(block, in_core=False)(x, geometry.angles, layout, keys_values)
        return x

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters: Normal(0, init_std) for matrices (projections, embedding, routers), one for norms.

        Buffers and recursion embeddings become zero; routers initialise whatever else they have (`Router.reset`).
        """
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
        for parameters in () if self.stage is None else (self.stage.recursion_embedding, self.stage.injection):
            for parameter in parameters or ():
                parameter.zero_()

    def set_activation_checkpointing(self, policy: str, selective_ops: Sequence[str] = ()) -> None:
        """Keep less for the backward pass and recompute it there; see `Recomputation`."""
        recomputation = Recomputation.of(policy, selective_ops)
        for module in self.modules():
            if isinstance(module, Transformer | RecursionStage | Block):
                module.recomputation = recomputation

    def parallel_plan(self) -> ParallelPlan:
        """Units for sharding and compilation; see `ParallelPlan`."""
        stage = [] if self.stage is None else [self.stage]
        # One block at a time: the loop over recursions depends on the routing, which the compiler cannot trace.
        core_blocks = [] if self.stage is None else list(self.stage.blocks)
        blocks = [*self.prelude, *core_blocks, *self.coda]
        router = None if self.stage is None else self.stage.router
        return ParallelPlan([*self.prelude, *stage, *self.coda], self.stage, blocks, router)

    def num_parameters(self) -> int:
        """Unique parameters, embedding (tied with the head) included."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_model(config: Config, *, device: str | torch.device = "cpu", seed: int | None = None) -> Transformer:
    """The model of a validated config.

    On the meta device it has shapes only. Elsewhere the weights are drawn from `seed` (default: `run.seed`).
    """
    with torch.device("meta"):
        model = Transformer(config)
    if torch.device(device).type == "meta":
        return model
    # Drawn on the CPU whatever the device, so that a seed gives the same weights everywhere.
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(config.run.seed if seed is None else seed)
    model.init_weights(generator)
    return model.to(device)
