"""What the training bench compares: models of one configuration that differ in recursion and routing alone.

A case is a set of overrides of the configuration, so all cases have the same width, vocabulary, batch and effective
depth. A `TrainingStep` is one of them ready to run: model, optimizer, and a step that is forward, backward and AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megamor.bench.baselines import BASELINES, build_baseline
from megamor.config import Config, load_config
from megamor.errors import ConfigError
from megamor.model import ModelOutput, build_model
from megamor.model.flops import executed_flops, nominal_flops
from megamor.optim import build_adamw
from megamor.parallel.mesh import autocast

REFERENCE = "vanilla"
_RECURSION_WISE = "recursion.kv_policy=recursion_wise"
_DENSE = ("recursion.num_recursions=1", "recursion.sharing=none", _RECURSION_WISE, "router.kind=fixed")

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    REFERENCE: ("vanilla", _DENSE),
    "recursive": ("recursive, fixed depth", (_RECURSION_WISE, "router.kind=fixed")),
    "mor_expert": ("MoR, expert-choice", (_RECURSION_WISE, "router.kind=expert_choice")),
    "mor_expert_share": (
        "MoR, expert-choice, share-first",
        ("recursion.kv_policy=share_first", "router.kind=expert_choice"),
    ),
    "mor_threshold": ("MoR, EMA threshold", (_RECURSION_WISE, "router.kind=ema_threshold")),
    "mor_token": ("MoR, token-choice", (_RECURSION_WISE, "router.kind=token_choice")),
}
"""Label and overrides by name."""


@dataclass(frozen=True)
class Case:
    """One row of a comparison. `baseline` names a foreign implementation of the dense model; None means megamor's."""

    name: str
    label: str
    overrides: tuple[str, ...]
    config: Config
    baseline: str | None = None

    def build(self, device: torch.device) -> nn.Module:
        """The model, weights drawn from `run.seed`."""
        if self.baseline is not None:
            return build_baseline(self.baseline, self.config, device)
        model = build_model(self.config, device=device)
        model.set_activation_checkpointing(self.config.train.activation_checkpointing, self.config.train.selective_ops)
        return model


def make_cases(
    path: str | Path, overrides: Sequence[str], names: Sequence[str], baselines: Sequence[str] = ()
) -> list[Case]:
    """The named cases and baselines of the configuration at `path`.

    Raises:
        ConfigError: an unknown name, the reference left out, or a configuration that isn't a recursive one.
    """
    unknown = [name for name in names if name not in CASES] + [name for name in baselines if name not in BASELINES]
    if unknown:
        known = ", ".join([*CASES, *(f"--baseline {name}" for name in BASELINES)])
        raise ConfigError(f"unknown case {unknown[0]!r}; there are {known}")
    if REFERENCE not in names:
        raise ConfigError(f"--cases has no {REFERENCE!r}, which the others are compared with; add it")
    base = load_config(path, overrides)
    if base.recursion.num_recursions == 1:
        raise ConfigError(f"{path}: recursion.num_recursions is 1, there is nothing to compare; choose 2 or more")
    cases = []
    for name in dict.fromkeys(names):
        label, extra = CASES[name]
        # A router of the configuration's own kind keeps its settings; the merge starts any other afresh.
        cases.append(Case(name, label, extra, load_config(path, [*overrides, *extra])))
    dense = load_config(path, [*overrides, *_DENSE])
    return cases + [Case(name, BASELINES[name], _DENSE, dense, baseline=name) for name in dict.fromkeys(baselines)]


def make_batch(config: Config, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, S] of random ids, the same for every case."""
    generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + number)
    shape = (config.train.micro_batch_size, config.data.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class TrainingStep:
    """One case, ready to run.

    The learning rate is 0, which costs the same as any other and keeps the routing as initialised: training on random
    tokens would only collapse it.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.model = case.build(device)
        self.optimizer = build_adamw(self.model, case.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def run(self, inputs: Tensor, labels: Tensor) -> ModelOutput:
        """Forward, backward, AdamW. inputs and labels [B, S]."""
        with autocast(self.device, self.case.config.train.precision):
            out: ModelOutput = self.model(inputs, labels)
        assert out.loss_sum is not None
        assert out.num_tokens is not None
        loss = out.loss_sum / out.num_tokens
        for router_loss in out.router_losses.values():
            loss = loss + router_loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if out.totals:
            self.model.stage.router.update(out.totals)  # type: ignore[union-attr, operator]
        return out

    def num_parameters(self) -> int:
        """Unique parameters, embedding included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def flops(self, out: ModelOutput) -> float:
        """Training FLOPs of the step that gave `out`, from the routing that was realised."""
        config = self.case.config
        if out.work is None:
            return nominal_flops(config, config.train.micro_batch_size).training
        work = [(tokens, pairs) for tokens, pairs in out.work.tolist()]
        return executed_flops(config, config.train.micro_batch_size, work).training
