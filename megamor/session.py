"""Training loops of one's own: a model with its optimizer, trained batch by batch from Python.

    session = megamor.Session(megamor.make_config(vocab_size=256, router_layers=[0, 1, 3], num_recursions=3, ...))
    for inputs, targets in batches:
        losses = session.training_step(inputs, targets)

A step is the one that `megamor pretrain` does, without its loop: no metrics files, validation, guard or alarms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamor.checkpoint import CheckpointManager, TrainerState, code_revision, library_versions, open_checkpoint
from megamor.checkpoint.layout import TEXT_FILES, TOKENIZER_FILE, TRAINER_FILE
from megamor.codec import read_tokenizer
from megamor.config import Config, config_from_dict, config_from_yaml
from megamor.config.batches import BatchSchedule
from megamor.config.changes import SETTINGS
from megamor.config.depth import grows
from megamor.config.derive import Consumed
from megamor.config.paths import expand_paths
from megamor.config.schema import InitConfig
from megamor.config.segments import max_depth, stages
from megamor.config.validate import validate
from megamor.data.dataset import TrainingData
from megamor.data.loader import MicroBatch, TrainingLoader
from megamor.devices import make_deterministic
from megamor.errors import ConfigError
from megamor.evaluate.sampling import GeneratedText, generate
from megamor.model import build_model
from megamor.model.flops import executed_flops
from megamor.model.loss import IGNORE
from megamor.optim import build_optimizer
from megamor.parallel import World, build_backend, init_world, resolve_backend
from megamor.ranks import run_on_all_ranks, sum_over_ranks
from megamor.train.budget import Budget
from megamor.train.distill import Distillation
from megamor.train.run_state import checkpoint_files
from megamor.train.start import warm_start
from megamor.train.step_statistics import StepStatistics


class Losses(NamedTuple):
    """What a step minimised, over all ranks: `total` is `language_model` (nats per token) plus `router`, the sum of the
    routers' losses with their coefficients. `grad_norm` is the global norm before clipping, `router_grad_norm` that of
    the routers' gradients alone: None if routers have no parameters, and with ZeRO-1 to 3."""

    total: float
    language_model: float
    router: float
    grad_norm: float
    router_grad_norm: float | None = None


@dataclass(frozen=True)
class RoutingStats:
    """What the router of one stage did since the last reset, over all ranks.

    `depth_shares` [Nr + 1] are the fractions of the tokens that took 0, 1, … recursions, `mean_depth` their mean,
    `recursion_rate` the fraction that took more than one. `ratios` are the router's own figures, such as `gate_1`.
    """

    tokens: int
    depth_shares: list[float]
    mean_depth: float
    recursion_rate: float
    ratios: dict[str, float]


def make_config(**settings: Any) -> Config:
    """A validated configuration from keywords.

    A keyword is a section with a mapping (`router={"kind": "token_choice"}`), or a setting whose name only one section
    has (`dim=64`, `router_layers=[0, 1]`, `lr=1e-3`). Without a length of the run the learning rate stays constant
    after its warm-up.

    Raises:
        ConfigError: a name is unknown or belongs to several sections, or `megamor pretrain` would refuse the settings.
    """
    sections = {setting.partition(".")[0] for setting in SETTINGS}
    values: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        owners = sorted(section for section in sections if f"{section}.{name}" in SETTINGS)
        if name in sections and not isinstance(value, Mapping):
            raise ConfigError(f"{name} = {value!r}: {name} is a section, so give a mapping of its settings")
        if name not in sections and len(owners) != 1:
            found = f"in {' and '.join(owners)}: write {owners[0]}={{'{name}': ...}}" if owners else "no setting"
            raise ConfigError(f"{name} is {found}; see docs/settings.md")
        section, given = (name, value) if name in sections else (owners[0], {name: value})
        if twice := values.get(section, {}).keys() & given.keys():
            raise ConfigError(f"{section}.{min(twice)} is given twice, as a keyword and in {section}={{...}}: drop one")
        values[section] = {**values.get(section, {}), **given}
    train = values.setdefault("train", {})
    if not {"max_steps", "max_tokens", "max_flops"} & train.keys():
        train["max_steps"] = 10**9
        values["optim"] = {"schedule": "constant", **values.get("optim", {})}
    config = config_from_dict(values, "make_config")
    validate(config)
    if grows(config) and config.train.max_steps == 10**9:
        raise ConfigError(f"recursion.schedule = {config.recursion.schedule} needs a length of the run: give max_steps")
    return config


class Session:
    """A model of `config` and its optimizer, on this process or on all that torchrun started.

    `model` is the `Transformer`, for inference and inspection. `step` counts the optimizer steps done.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.budget = config, Budget(config)
        if config.train.deterministic:
            make_deterministic()
        self.world: World = init_world(config.parallel, config.run.device)
        if config.init.branch_from is not None:
            raise ConfigError("init.branch_from is for `megamor pretrain`: Session.load continues from a checkpoint")
        self.model = build_model(config, device=self.world.device)
        self.started_from, told = warm_start(self.model, config)
        if self.world.is_main and self.started_from:
            print("\n".join(told), flush=True)
        self.backend = build_backend(self.model, config, self.world, lambda model: build_optimizer(model, config))
        self.distillation = Distillation.load(config, self.world.device)
        self.done = Consumed()
        self.loaded: dict[str, bytes] = {}
        self.statistics = StepStatistics(max_depth(config))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.done.step

    def training_step(
        self, inputs: Tensor, targets: Tensor, *, documents: Tensor | None = None, lengths: Tensor | None = None
    ) -> Losses:
        """One optimizer step on token ids `inputs` [B, S] and the ids that follow them, `targets` [B, S]. Collective.

        Waits until the step is done. Targets of -100 don't count. `documents` [B, S] are ids that attention must not
        cross; of sequence b, only the first `lengths[b]` tokens are real. Every rank gives a batch of its own, of the
        same shape.
        """
        if inputs.ndim != 2 or inputs.shape != targets.shape or inputs.shape[1] > self.config.model.max_seq_len:
            shapes = f"inputs {[*inputs.shape]}, targets {[*targets.shape]}"
            raise ConfigError(f"{shapes}: give both as [batch, sequence of at most model.max_seq_len]")
        self.model.limit_recursions(recursions := self.budget.recursions(self.done))
        batch = MicroBatch(inputs, targets, documents, lengths)
        labels, tokens = sum_over_ranks([int((targets != IGNORE).sum()), batch.num_tokens])
        if not labels:
            raise ConfigError("no target of this step counts: all are -100 on every rank; leave such a batch out")
        share = self.world.size * batch.num_tokens / max(tokens, 1)
        first_sequence, step = self.world.rank * len(inputs), StepStatistics(max_depth(self.config))
        arguments = batch.arguments(self.world.device)
        if self.distillation is not None:
            arguments["teacher"] = self.distillation.teach(arguments, step)
        with self.backend.forward_context(last_micro_batch=True):
            out = self.backend.model(**arguments, mode="train", step=self.step, first_sequence=first_sequence)
            router = torch.stack([torch.zeros_like(out.loss_sum), *out.router_losses.values()]).sum() * share
            loss = out.loss_sum * self.world.size / labels + router
        self.backend.backward(loss, last_micro_batch=True)
        self.backend.set_lr(self.budget.lr(self.done))
        grad_norm = self.backend.step(self.config.optim.grad_clip)
        step.add(out, batch.num_tokens)
        # Totals are for the router's update, and their shapes may change with the recursions of a step.
        self.statistics.add(out._replace(totals={}), batch.num_tokens)
        figures = step.reduce(grad_norm, self.backend.router_square)
        self.model.update_routers(figures.totals)
        found = figures.wait()
        self.model.limit_recursions(recursions if grows(self.config) else None)  # for what comes between the steps
        flops = executed_flops(self.config, tokens, found.work, 1, found.pairs).training
        flops += self.distillation.flops(found, tokens, 1, tokens) if self.distillation else 0.0
        self.done = Consumed(self.step + 1, self.done.tokens_seen + tokens, self.done.flops + flops)
        router_loss = sum(found.router_losses.values())
        norms = found.grad_norm, found.router_grad_norm
        return Losses(found.loss + router_loss, found.loss, router_loss, *norms)

    def routing_stats(self, *, reset: bool = False) -> dict[str, RoutingStats]:
        """Statistics of each stage since the last reset, by its name (`stage`, or `layers_3` …). Collective.

        `reset` starts them anew.
        """
        if not self.statistics.sums:
            return {}
        summary, result = self.statistics.reduce(torch.zeros((), device=self.world.device)).wait(), {}
        own = summary.counts_by_stage(stages(self.config))
        for stage in stages(self.config) if own else ():  # there may have been padding alone
            counts = own[stage.prefix]
            shares = [count / sum(counts) for count in counts]
            ratios = {
                name.removeprefix(stage.prefix): value
                for name, value in summary.ratios.items()
                if name.startswith(stage.prefix)
            }
            mean = sum(depth * share for depth, share in enumerate(shares))
            result[stage.name] = RoutingStats(round(sum(counts)), shares, mean, sum(shares[2:]), ratios)
        if reset:
            self.statistics = StepStatistics(max_depth(self.config))
        return result

    def batches(self) -> Iterator[MicroBatch]:
        """This rank's batches of the shards in `data.train`, step by step, from the session's `step` on."""
        train = replace(self.config.train, micro_batch_size=self.config.train.global_batch_size // self.world.size)
        config = replace(self.config, train=train)
        validate(config, self.world.size)
        data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
        loader = TrainingLoader(
            data, rank=self.world.rank, world_size=self.world.size, batches=BatchSchedule.of(config)
        )
        loader.skip(self.step)
        try:
            while True:
                yield from loader.next_step()
        finally:
            loader.close()

    def generate(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> GeneratedText:
        """Continue token ids by the inference rule; `options` as in `megamor.generate`."""
        return generate(self.model, list(prompt), max_tokens, **options)

    def save(self, directory: str | Path) -> Path:
        """Write a checkpoint that `Session.load` and all commands but `pretrain` read; returns it. Collective."""
        state = TrainerState(
            step=self.step,
            tokens_seen=self.done.tokens_seen,
            data={},
            world_size=self.world.size,
            backend=resolve_backend(self.config.parallel, self.world.size, self.world.device.type == "cuda"),
            flops=self.done.flops,
            recursions=self.model.recursions if grows(self.config) and self.step else None,
            started_from=self.started_from,
            code_revision=code_revision(),
            versions=library_versions(),
        )
        files = {**run_on_all_ranks(self._texts), TRAINER_FILE: state.to_json()}
        return CheckpointManager(Path(directory), keep_last=3).save(self.step, [self.backend.save], files)

    def _texts(self) -> dict[str, str | bytes]:
        """Configuration, tokenizer and end of text; the latter two of the checkpoint, where the session is from one."""
        data, tokenizer = expand_paths(self.config).data, None
        if data.tokenizer and TOKENIZER_FILE not in self.loaded:
            read_tokenizer(data.tokenizer)  # a missing or damaged file is one error that names it
            tokenizer = Path(data.tokenizer).read_bytes()
        return {**checkpoint_files(self.config, data, tokenizer), **self.loaded}

    @classmethod
    def load(cls, path: str | Path) -> Session:
        """A session that continues from a checkpoint, its directory or its `latest`. Collective."""
        checkpoint = open_checkpoint(path)
        config = config_from_yaml(checkpoint.config_yaml, str(checkpoint.directory))
        session = cls(replace(config, init=InitConfig()))  # its weights are here, and their source may be gone
        session.config = config
        session.backend.load(checkpoint.directory)
        kept = (checkpoint.directory / name for name in TEXT_FILES)
        session.loaded = {file.name: file.read_bytes() for file in kept if file.is_file()}
        state = TrainerState.read(checkpoint.directory)
        session.started_from = state.started_from
        session.done = Consumed(state.step, state.tokens_seen, state.flops or 0.0)
        session.model.limit_recursions(state.recursions)
        return session
