"""The model: embedding, segments, final norm, head.

One token's way through it: its id becomes a row [dim] of the stream (`embed`); the segments update the row one after
another; the final norm follows; the row times the head's transpose gives the logits of the next token. The head is the
embedding, unless the model has one of its own. A segment is either unshared blocks, in which the token attends to all
earlier ones, or a recursion stage, which applies its shared blocks to it as often as the router decides
(`model/recursion.py`). Most models have a prelude, one stage and a coda.

The model knows one device and no parallelism. It exports a `ParallelPlan` that says what may be sharded as one unit;
`megamor/parallel` applies it from outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.config import Config
from megamor.config.depth import final_recursions
from megamor.config.exits import ExitRule
from megamor.config.segments import Segment, segments, uses_everything
from megamor.errors import ConfigError
from megamor.model.attention import AttentionLayout
from megamor.model.blocks import Block, KeysValues, RMSNorm, ZeroLinear
from megamor.model.kv_cache import KVCache
from megamor.model.layouts import Geometry
from megamor.model.loss import IGNORE, Teacher, TokenScores, choose_loss, linear_cross_entropy, token_scores
from megamor.model.recompute import Recomputation
from megamor.model.recursion import Combination, RecursionStage, StageOutput, add_state
from megamor.routing import DepthBounds, Mode, Ratio, Router, RoutingContext
from megamor.routing.confidence import PROBES
from megamor.routing.random import text_keys


class ModelOutput(NamedTuple):
    """What a forward pass returns.

    Without labels, `logits` [B, S, vocab]; with labels, `loss_sum` (nats, summed) over `num_tokens` valid positions.
    `router_losses` are means over the micro-batch with their coefficients applied; `ratios` and `totals` are the
    router's statistics. `depth` [B, S] counts the recursions of each token (-1 for padding) and `work` [Nr, 2] is
    explained at `StageOutput`; both are None for vanilla. `pairs` (with labels) are the query-key pairs of a block that
    sees every token, on average over the unshared blocks. In training with `train.z_loss_coeff`, `z_loss_sum` is the
    z-loss, whose gradient `loss_sum` has. `scores` [B, S] exist where they were asked for. With a teacher,
    `distill_loss_sum` is the loss of learning from it, whose gradient `loss_sum` has. `hidden` [T, dim] are the rows
    that the head would be given.
    With several stages, losses of one name and depths are added up, `work` has the recursions of all stages, and the
    names of `ratios` and `totals` begin with `Segment.prefix`.
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
    scores: TokenScores | None = None
    distill_loss_sum: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def probes(self) -> Tensor:
        """Rows that the head predicted for an exit rule, a scalar."""
        counts = [ratio.numerator for name, ratio in self.ratios.items() if name.endswith(PROBES)]
        return torch.stack(counts).sum() if counts else torch.zeros(())


@dataclass(frozen=True)
class ParallelPlan:
    """How the model may be sharded and compiled.

    `units` are modules to shard as one group each, in forward order. A recursion stage is one of them, so that its
    weights are gathered once per pass; embedding, norm and head stay with the root. `stages` are the modules whose
    loops may run to different depths on different ranks. `compile_targets` are modules to compile one by one. The
    `routers` compute with fp32 weights whatever the precision. `uses_everything`: every forward pass uses every
    parameter, whatever the routing.
    """

    units: list[nn.Module]
    stages: list[nn.Module] = field(default_factory=list)
    compile_targets: list[nn.Module] = field(default_factory=list)
    routers: list[nn.Module] = field(default_factory=list)
    uses_everything: bool = False


class Transformer(nn.Module):
    """Mixture-of-Recursions language model; see the module docstring.

    `segments` describe its parts, which are the modules of these names. The attributes `prelude`, `stage` and `coda`
    exist in models that have at most one stage; without one, `stage` is None.
    """

    prelude: nn.ModuleList
    stage: RecursionStage | None
    coda: nn.ModuleList

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.segments = config, segments(config)
        self.embed = nn.Embedding(config.model.vocab_size, config.model.dim)
        for segment in self.segments:
            unshared = (Block(config.model) for _ in range(segment.num_blocks))
            self.add_module(segment.name, RecursionStage(segment) if segment.schedule else nn.ModuleList(unshared))
        if not self.stages:
            self.stage = None
        self.norm = RMSNorm(config.model.dim, config.model.norm_eps)
        own_head = None if config.model.tied_head else nn.Linear(config.model.dim, config.model.vocab_size, bias=False)
        self.head: nn.Linear | None = own_head
        self.recomputation = Recomputation()
        self.loss_kernel: str = config.train.loss_kernel
        self.exit: ExitRule | None = None
        self.depth_bounds: tuple[int, int] | None = None
        """In the causal mode, fewest and most recursions of a token in each stage, unless `bounds` are given."""
        self.limit_recursions(None)

    def limit_recursions(self, most: int | None) -> None:
        """Run at most so many recursions from now on; None: as many as at the end of training."""
        self.recursions = most or final_recursions(self.config)
        for stage in self.stages.values():
            stage.limit_recursions(self.recursions)

    @property
    def head_weight(self) -> Tensor:
        """The output head [vocab, dim]: the embedding's weight, or the head's own."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def embedding_scale(self) -> float:
        """Factor on embedded tokens."""
        return self.config.model.dim**0.5 if self.config.model.scale_embedding else 1.0

    def embedded(self, inputs: Tensor) -> Tensor:
        """Token ids [N], or their rows [N, dim] of the embedding, as rows of the stream, [N, dim]."""
        rows: Tensor = inputs if inputs.is_floating_point() else self.embed(inputs)
        return rows * self.embedding_scale if self.config.model.scale_embedding else rows

    @property
    def stages(self) -> dict[str, RecursionStage]:
        """The recursion stages by the prefix of their statistics, in forward order."""
        return {s.prefix: self.get_submodule(s.name) for s in self.segments if s.schedule}  # type: ignore[misc]

    def update_routers(self, totals: Mapping[str, Tensor]) -> None:
        """Let the routers adjust buffers, once per optimizer step; `totals` are summed over micro-batches and ranks."""
        for prefix, stage in self.stages.items():
            own = {name.removeprefix(prefix): total for name, total in totals.items() if name.startswith(prefix)}
            stage.router.update(own)

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
        score_tokens: bool = False,
        columns: tuple[int, ...] | None = None,
        states: list[Tensor] | None = None,
        teacher: Teacher | None = None,
        predict: bool = True,
        num_documents: int | None = None,
    ) -> ModelOutput:
        """Logits of `inputs` [B, S] (token ids), or the loss against `labels` [B, S] (-100 at positions to ignore).

        `mode` selects training-time routing with losses ("train"), the same routing for evaluation ("topk"), or the
        router's inference rule ("causal"). `step` is the optimizer step (0-based), which drives warm-ups. `documents`
        [B, S] are ids that attention must not cross. With `cache`, `inputs` are the tokens that follow those in it, and
        its `num_tokens` grows by S; this needs the causal mode and no documents. `bounds` limit the recursions of each
        token, in the causal mode. Of sequence b, only `lengths[b]` tokens are real (None: all are): those from
        `columns[b]` on (None: the first; with a cache they must be the last). The rest is padding: it isn't computed,
        its logits are 0 and it has no influence on anything. `first_sequence` is the number of the first sequence in
        the batch of the step, over all ranks and micro-batches. `score_tokens` adds the `scores` of single labels,
        without gradients. `inputs` may also be rows of the embedding [B, S, dim], unless a router reads the text.
        `states` receives the stream [B, S, dim] after the embedding and after each unshared block and each recursion;
        instead of the last one, that after the final norm. The loss also has that of learning from a `teacher`, whose
        rows are the real tokens of this pass. Without `predict`, the result is `hidden` instead of logits.
        `num_documents` is the number of `documents` in all sequences, or more; without it, a GPU is asked for it.
        """
        assert mode in get_args(Mode), f"mode = {mode!r}: give train, topk or causal"
        assert cache is None or (documents is None and mode == "causal"), "a cache is for decoding single documents"
        if lengths is not None and not any(lengths):
            assert cache is None, "nothing but padding to decode"
            return self.run_nothing(inputs, labels, mode, step, score_tokens, teacher is not None)
        start = 0 if cache is None else cache.begin(inputs.shape[1], lengths)
        dtype = self.embed.weight.dtype
        geometry = Geometry.of(inputs, self.config.model, dtype, documents, start, lengths, columns, num_documents)
        # From here on a row [dim] per token: [T, dim]. Only attention needs to know the sequences (`Geometry`).
        window, everything = geometry.window, geometry.everything
        if self.depth_bounds and bounds is None and mode == "causal":
            bounds = DepthBounds(*(torch.full((len(everything),), n, device=inputs.device) for n in self.depth_bounds))
        reads_text = mode != "train" and any(stage.router.reads_text for stage in self.stages.values())
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
            begins=geometry.begins,
            memory=None if cache is None else cache.memory,
        )
        x, outputs = self.embedded(window.unpad(inputs)), {}
        add_state(states, window, x)
        for segment in self.segments:
            if segment.schedule:
                outputs[segment.prefix] = self.get_submodule(segment.name)(x, geometry, context, cache, states)
                x = outputs[segment.prefix].stream
                context = replace(context, stage=context.stage + 1)
            else:
                x = self.run_unshared(segment, x, geometry, cache, states)
        x = self.norm(x)
        if states:
            states[-1] = window.pad(x)
        logits = loss_sum = num_tokens = pairs = z_loss_sum = scores = distill_loss_sum = None
        if labels is None and predict:
            # Inference. Training never builds the logits of all tokens: see `linear_cross_entropy`.
            logits = window.pad(self.unembedded(x))
        elif labels is not None:
            labels = window.unpad(labels)
            if score_tokens:
                scores = TokenScores(*map(window.pad, token_scores(x, self.head_weight, labels)))
            z_coeff = self.config.train.z_loss_coeff if mode == "train" else 0.0
            # A model may be evaluated where the kernel of its training doesn't exist.
            wanted = self.loss_kernel if mode == "train" else "auto"
            kernel = choose_loss(x.device.type, wanted, teacher is not None)
            loss_sum, z_loss, distill_loss = linear_cross_entropy(x, self.head_weight, labels, z_coeff, teacher, kernel)
            z_loss_sum = z_loss if z_coeff else None
            distill_loss_sum = None if teacher is None else distill_loss
            num_tokens = (labels != IGNORE).sum()
        if labels is not None or not predict:
            unshared = [segment for segment in self.segments if not segment.schedule]
            slides = [block in segment.sliding for segment in unshared for block in range(segment.num_blocks)]
            pairs = geometry.mean_pairs(everything, everything, slides)
        _, losses, ratios, totals, depth, work = joined(x, outputs)
        depth = None if depth is None else window.pad(depth, -1)
        if cache is not None:
            cache.advance(depth, inputs.shape[1])
        found = logits, loss_sum, num_tokens, losses, ratios, totals, depth, work, pairs, z_loss_sum, scores
        return ModelOutput(*found, distill_loss_sum, None if predict else x)

    def text_keys(self, inputs: Tensor, geometry: Geometry, cache: KVCache | None) -> Tensor:
        """`RoutingContext.text` of `inputs` [B, S], which follow the tokens in `cache`."""
        if cache is None:
            rows = geometry.everything.rows(inputs.device)
            order = geometry.order if geometry.begins is None else rows - geometry.begins
            return text_keys(geometry.window.unpad(inputs), order)
        whole = cache.tokens = inputs if cache.tokens is None else torch.cat((cache.tokens, inputs), 1)
        order = torch.arange(whole.shape[1], device=inputs.device).expand_as(whole)
        if cache.padding is not None:
            order = (order - cache.padding.unsqueeze(1)).clamp_min(0)
        return geometry.window.unpad(text_keys(whole.flatten(), order.flatten()).view_as(whole)[:, -inputs.shape[1] :])

    def run_nothing(
        self, inputs: Tensor, labels: Tensor | None, mode: Mode, step: int, score_tokens: bool, distills: bool
    ) -> ModelOutput:
        """The output for `inputs` [B, S] that are padding alone: zeros that depend on the same parameters as any other.

        Ranks with tokens wait for this one in the collectives of their passes, so one row goes through the model.
        """
        # Not `self(...)`: the hooks of sharding have run already, around this call's caller.
        ignored = None if labels is None else torch.full_like(labels[:1, :1], IGNORE)
        one = self.forward(inputs[:1, :1], ignored, mode, step, score_tokens=score_tokens)
        return one._replace(
            logits=None if one.logits is None else 0 * one.logits.expand(*inputs.shape, -1),
            router_losses={name: 0 * loss for name, loss in one.router_losses.items()},
            ratios={name: Ratio(0 * ratio.numerator, 0 * ratio.denominator) for name, ratio in one.ratios.items()},
            totals={name: 0 * total for name, total in one.totals.items()},
            depth=None if one.depth is None else one.depth.new_full(inputs.shape, -1),
            work=None if one.work is None else 0 * one.work,
            pairs=None if one.pairs is None else 0 * one.pairs,
            distill_loss_sum=0 * one.loss_sum.detach() if distills and one.loss_sum is not None else None,
            scores=one.scores and TokenScores(*(0 * score.expand(inputs.shape) for score in one.scores)),
        )

    def run_unshared(
        self, segment: Segment, x: Tensor, geometry: Geometry, cache: KVCache | None, states: list[Tensor] | None = None
    ) -> Tensor:
        """x [T, dim] through the unshared blocks of `segment`, to which all tokens come."""
        everything, keys_values = geometry.everything, KeysValues()
        layouts: dict[bool, AttentionLayout] = {}
        for number, block in enumerate(self.get_submodule(segment.name).children()):
            slides = number in segment.sliding
            sight = geometry.seen_by(slides)
            if cache is not None:
                key = segment.name, number
                keys_values, layouts[slides] = cache.view(key, everything, sight, (KeysValues(), everything))
            elif slides not in layouts:
                layouts[slides] = sight.layout(everything, everything)
            x, _ = self.recomputation.block(block, in_core=False)(x, sight.angles, layouts[slides], keys_values)
            add_state(states, geometry.window, x)
        return x

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters: Normal(0, init_std) for matrices (projections, embedding, routers), one for norms.

        An embedding that is scaled has this deviation after scaling, so that a tied head's first logits stay small.

        Buffers and recursion embeddings become zero; routers initialise whatever else they have (`Router.reset`).
        """
        for buffer in self.buffers():
            buffer.zero_()
        for module in self.modules():
            if isinstance(module, ZeroLinear):
                module.weight.zero_()
            elif isinstance(module, nn.Linear | nn.Embedding):
                scale = self.embedding_scale if module is self.embed else 1.0
                module.weight.normal_(0.0, self.config.model.init_std / scale, generator=generator)
            elif isinstance(module, RMSNorm):
                for weight in (module.weight, *module.others):
                    weight.fill_(1.0)
            elif isinstance(module, Router):
                module.reset()
        for stage in self.stages.values():
            for parameter in (*(stage.recursion_embedding or ()), *(stage.injection or ())):
                parameter.zero_()

    def set_activation_checkpointing(self, policy: str, selective_ops: Sequence[str] = ()) -> None:
        """Keep less for the backward pass and recompute it there; see `Recomputation`."""
        recomputation = Recomputation.of(policy, selective_ops)
        for module in self.modules():
            if isinstance(module, Transformer | RecursionStage | Block):
                module.recomputation = recomputation

    def unembedded(self, x: Tensor) -> Tensor:
        """The head: [N, dim] to [N, vocab]."""
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def readout(self, x: Tensor) -> Tensor:
        """Final norm and head: [N, dim] to [N, vocab], in at least fp32."""
        logits = self.unembedded(self.norm(x))
        # bf16 has 8 bits of precision: probabilities would sum to something else than 1, and penalties be rounded away.
        return logits if logits.dtype == torch.float64 else logits.float()

    def set_exit(self, rule: ExitRule | None) -> None:
        """In the causal mode stop tokens by `rule` too, in each stage of enough recursions; None ends that.

        Raises:
            ConfigError: no stage has enough recursions.
        """
        able = [stage for stage in self.stages.values() if rule and stage.router.num_recursions > rule.first]
        if rule and not able:
            raise ConfigError(
                f"exit = {rule.name} needs a stage of {rule.first + 1} recursions or more, and the model has none: "
                "leave it out, or use a rule that needs fewer (docs/routers.md)"
            )
        self.exit = rule
        for stage in self.stages.values():
            stage.exit = (rule, self.readout) if rule and stage in able else None

    def parallel_plan(self) -> ParallelPlan:
        """Units for sharding and compilation; see `ParallelPlan`."""
        stages, units = list(self.stages.values()), []
        for segment in self.segments:
            module = self.get_submodule(segment.name)
            units += [module] if segment.schedule else [*module.children()]
        # One at a time: the loop over recursions depends on the routing, which the compiler cannot trace.
        targets: list[nn.Module] = [module for module in self.modules() if isinstance(module, Block | Combination)]
        return ParallelPlan(units, [*stages], targets, [stage.router for stage in stages], uses_everything(self.config))

    def num_parameters(self) -> int:
        """Unique parameters, embedding and head included."""
        return sum(parameter.numel() for parameter in self.parameters())


def joined(x: Tensor, outputs: Mapping[str, StageOutput]) -> StageOutput:
    """What all stages report, as one: see `ModelOutput`. `x` is the stream behind them."""
    losses: dict[str, Tensor] = {}
    ratios: dict[str, Ratio] = {}
    totals: dict[str, Tensor] = {}
    for prefix, output in outputs.items():
        for name, loss in output.losses.items():
            losses[name] = losses[name] + loss if name in losses else loss
        ratios |= {prefix + name: ratio for name, ratio in output.ratios.items()}
        totals |= {prefix + name: total for name, total in output.totals.items()}
    depths = [output.depth for output in outputs.values() if output.depth is not None]
    work = [output.work for output in outputs.values() if output.work is not None]
    depth = sum(depths[1:], depths[0]) if depths else None
    return StageOutput(x, losses, ratios, totals, depth, torch.cat(work) if work else None)


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
