"""Tiny but complete runs: generated shards, a real trainer on one or two processes, and the files that it wrote."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamor.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ExpertChoiceConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RecursionConfig,
    RunConfig,
    SourceConfig,
    TokenChoiceConfig,
    TrainConfig,
)
from megamor.corpus.writer import ShardWriter
from megamor.data.meta import ShardMeta
from megamor.errors import MegamorError
from megamor.metrics import read_jsonl
from megamor.parallel import init_world
from megamor.train import Trainer, build_trainer
from tests.distributed.harness import run_ranks
from tests.distributed.runs import stored_tensors

VOCABULARY = 128
EXPERT_CHOICE = ExpertChoiceConfig(aux_coeff=0.01, z_coeff=0.001)
LOSS_FREE = TokenChoiceConfig(balancing="loss_free", bias_update_rate=0.01)  # a router with a buffer
STEPS = 8

SLOW_IMPORT = "deepspeed.runtime.zero.muon.muon_optimizer"
"""Modules that deepspeed imports when its engine starts, torch's compiler included: imported once, before forking."""

Spoil = Callable[[Trainer], None]
"""A change that a test makes to the trainer of one rank before it starts."""


def write_shard(prefix: Path, tokens: int = 20_000, vocabulary: int = VOCABULARY, meta: ShardMeta | None = None) -> str:
    """Documents of noisy ramps, which can be learned.

    No token occurs twice in a window: equal tokens get nearly equal scores, and rounding could swap them in a top-k.
    """
    generator = np.random.default_rng(7)
    with ShardWriter(prefix, np.dtype("<u2")) as writer:
        for start in range(0, tokens, 500):
            ramp = 3 * (start + np.arange(500)) + generator.integers(0, 3, 500)
            writer.add(ramp % vocabulary)
        writer.commit(meta)
    return str(prefix)


def tiny_run(directory: Path, backend: str = "auto", **train: Any) -> Config:
    """A run of eight steps of four sequences in `directory`; its data is generated on first use."""
    data = directory / "data"
    if not data.exists():
        data.mkdir(parents=True)
        write_shard(data / "train")
        write_shard(data / "val", tokens=1_000)
    shape = {"global_batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS, "precision": "fp32", "eval_every": 100}
    return Config(
        run=RunConfig(name="tiny", dir=str(directory)),
        model=ModelConfig(
            vocab_size=VOCABULARY, dim=32, num_layers=5, num_heads=4, num_kv_heads=2, ffn_dim=64, max_seq_len=32
        ),
        recursion=RecursionConfig(num_recursions=3, sharing="middle_cycle"),
        router=EXPERT_CHOICE,
        data=DataConfig(
            train=(SourceConfig(str(data / "train")),), validation={"held_out": str(data / "val")}, seq_len=32
        ),
        # The learning rate changes with every step, so a step taken at another one shows.
        optim=OptimConfig(lr=3e-3, warmup_steps=2, schedule="cosine"),
        train=TrainConfig(**{**shape, "eval_sequences": 8, **train}),
        parallel=ParallelConfig(backend=backend),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(every_steps=100, keep_last=100),
        metrics=MetricsConfig(progress=False),
    )


def named(config: Config, name: str, **train: Any) -> Config:
    """The same run under another name."""
    return replace(config, run=replace(config.run, name=name), train=replace(config.train, **train))


def until(config: Config, step: int | None) -> Config:
    """A launch that stops after `step`."""
    return replace(config, train=replace(config.train, stop_at_step=step))


def fit(config: Config, world_size: int = 2, spoil: Spoil | None = None, on_rank: int | None = 0) -> list[bool]:
    """Launch a run on fresh processes, with `spoil` on one or all of them; what `fit` returns on each rank."""
    if config.parallel.backend == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with suppress(ModuleNotFoundError):  # missing in some releases
            import_module(SLOW_IMPORT)
    return run_ranks(_fit_here, config, spoil, on_rank, world_size=world_size)


def fit_to_failure(
    config: Config, world_size: int = 2, spoil: Spoil | None = None, on_rank: int | None = 0
) -> list[str]:
    """Launch a run that must fail; kind and message of the error on each rank."""
    return run_ranks(_fail_here, config, spoil, on_rank, world_size=world_size)


def _fail_here(config: Config, spoil: Spoil | None, on_rank: int | None) -> str:
    try:
        _fit_here(config, spoil, on_rank)
    except MegamorError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing failed")


def _fit_here(config: Config, spoil: Spoil | None, on_rank: int | None) -> bool:
    world = init_world(config.parallel)
    trainer = build_trainer(config, world)
    if spoil is not None and on_rank in (world.rank, None):
        spoil(trainer)
    return trainer.fit()


def signal_after(step: int, number: signal.Signals) -> Spoil:
    """Send the rank a signal in the middle of the step after `step`."""

    def spoil(trainer: Trainer) -> None:
        update = trainer.backend.step

        def interrupted(max_grad_norm: float) -> Tensor:
            if trainer.progress.step == step:
                os.kill(os.getpid(), number)
            return update(max_grad_norm)

        trainer.backend.step = interrupted  # type: ignore[method-assign]

    return spoil


def wait_for_steps(config: Config, count: int, seconds: float = 180.0) -> None:
    """Wait until `count` steps are logged."""
    metrics = directory_of(config) / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "the run didn't start"
        time.sleep(0.05)


@dataclass(frozen=True)
class Trace:
    """What a run leaves: metrics of each step, validation losses, all tensors of its last checkpoint."""

    steps: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def directory_of(config: Config) -> Path:
    """The run's directory."""
    return Path(config.run.dir) / config.run.name


def checkpoint_names(config: Config) -> list[str]:
    """Everything in the run's directory of checkpoints."""
    return sorted(path.name for path in (directory_of(config) / "checkpoints").iterdir())


def trace(config: Config) -> Trace:
    """Read what a run has left."""
    records = read_jsonl(directory_of(config) / "metrics.jsonl")
    return Trace(
        steps=[record for record in records if "train/loss" in record],
        validation=[record for record in records if "train/loss" not in record],
        tensors=stored_tensors(directory_of(config) / "checkpoints" / "latest"),
    )


def repeatable(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without values that depend on the clock or the machine.

    NaN becomes a string, because NaN doesn't equal itself.
    """
    clock = ("time", "throughput/", "memory/")
    counted = "throughput/executed_flops"
    kept = {key: value for key, value in record.items() if key == counted or not key.startswith(clock)}
    return {key: "nan" if value != value else value for key, value in kept.items()}


def assert_same_run(straight: Trace, resumed: Trace) -> None:
    """Compare every figure of every step, and every bit of weights, buffers and moments."""
    assert [record["step"] for record in resumed.steps] == list(range(1, len(straight.steps) + 1))
    for expected, found in zip(straight.steps, resumed.steps, strict=True):
        assert repeatable(found) == repeatable(expected)
    assert list(map(repeatable, resumed.validation)) == list(map(repeatable, straight.validation))
    assert resumed.tensors.keys() == straight.tensors.keys()
    different = [name for name, tensor in straight.tensors.items() if not torch.equal(tensor, resumed.tensors[name])]
    assert not different
