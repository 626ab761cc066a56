"""The composition root: a configuration becomes a trainer that is ready to `fit`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from megamor.checkpoint import CheckpointManager, reseed
from megamor.checkpoint.layout import CHECKPOINTS_DIR
from megamor.config import Config, config_to_dict
from megamor.config.derive import derive
from megamor.config.validate import validate
from megamor.data import TrainingData, TrainingLoader, open_validation_sets
from megamor.errors import ConfigError
from megamor.metrics import (
    JsonlSink,
    MetricSink,
    MultiSink,
    TensorBoardSink,
    Throughput,
    WandbSink,
    make_progress,
    peak_flops,
)
from megamor.model import build_model
from megamor.optim import build_adamw
from megamor.parallel import World, build_backend
from megamor.train.checkpointing import Progress, RunCheckpoints
from megamor.train.stop import StopRequest
from megamor.train.trainer import Trainer

log = logging.getLogger("megamor.train")


def build_trainer(config: Config, world: World) -> Trainer:
    """Open the data, build and wrap the model, and restore the newest checkpoint of the run if there is one.

    Raises:
        ConfigError, DataError, CheckpointError: anything that would keep the run from working, before it starts.
    """
    validate(config, world.size)
    derived = derive(config, world.size)
    vocab_size = config.model.vocab_size
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=vocab_size)
    validation = open_validation_sets(config.data, vocab_size=vocab_size)
    loader = TrainingLoader(
        data,
        rank=world.rank,
        world_size=world.size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
    )
    directory = run_directory(config)
    manager = CheckpointManager(directory / CHECKPOINTS_DIR, keep_last=config.checkpoint.keep_last)

    model = build_model(config, device=world.device)
    reseed(config.run.seed, 0, world.rank)
    backend = build_backend(model, config, world, lambda module: build_adamw(module, config.optim))
    checkpoints = RunCheckpoints(config, manager, backend, loader, data.fingerprints)
    restored = checkpoints.restore()
    progress = restored or Progress()
    if world.is_main:
        origin = f"resuming after step {progress.step}" if restored else "starting from the beginning"
        print(f"{config.run.name}: {origin}\n{derived.describe()}", flush=True)
    device_name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return Trainer(
        config=config,
        derived=derived,
        model=model,
        backend=backend,
        loader=loader,
        validation=validation,
        checkpoints=checkpoints,
        progress=progress,
        sink=build_sink(config, world, progress, restored is not None),
        throughput=Throughput(peak_flops=peak_flops(device_name, config.train.precision), world_size=world.size),
        display=make_progress(
            total_steps=derived.total_steps,
            start_step=progress.step,
            name=config.run.name,
            enabled=world.is_main and config.metrics.progress,
        ),
        stop=StopRequest(world.device),
    )


def run_directory(config: Config) -> Path:
    """Where the run keeps checkpoints and metrics.

    Raises:
        ConfigError: the directory can't be created.
    """
    directory = Path(config.run.dir) / config.run.name
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"can't create the run's directory {directory}: {error}; set run.dir or run.name") from error
    return directory


def build_sink(config: Config, world: World, progress: Progress, resumed: bool) -> MetricSink:
    """The first rank's sinks; the others keep nothing. The tracker's run id goes into `progress.run_ids`."""
    if not world.is_main:
        return MultiSink([])
    directory = run_directory(config)
    resume_step = progress.step if resumed else None
    sinks: list[MetricSink] = [JsonlSink(directory / "metrics.jsonl", resume_step=resume_step)]
    if config.metrics.tensorboard:
        sinks.append(TensorBoardSink(directory / "tensorboard", resume_step=resume_step))
    if config.metrics.wandb:
        wandb = WandbSink(
            project=config.metrics.wandb_project,
            name=config.run.name,
            directory=directory,
            mode=config.metrics.wandb_mode,
            run_id=progress.run_ids.get("wandb"),
            config=config_to_dict(config),
        )
        progress.run_ids["wandb"] = wandb.run_id
        sinks.append(wandb)
    return MultiSink(sinks)
