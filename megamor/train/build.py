"""The composition root: builds a trainer that is ready to `fit` from a configuration."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from megamor.checkpoint import CheckpointManager, reseed
from megamor.checkpoint.layout import CHECKPOINTS_DIR
from megamor.config import Config, expand_paths
from megamor.config.batches import BatchSchedule
from megamor.config.derive import derive
from megamor.config.validate import validate_length
from megamor.data.dataset import TrainingData, announce_shared_data
from megamor.data.loader import TrainingLoader
from megamor.devices import make_deterministic
from megamor.errors import ConfigError
from megamor.lock import WriteLock
from megamor.metrics import (
    JsonlSink,
    MetricSink,
    TensorBoardSink,
    Throughput,
    TrackerSink,
    TrackioSink,
    TrainingDisplay,
    WandbSink,
    peak_flops,
    read_jsonl,
)
from megamor.model import build_model
from megamor.model.attention import describe_kernels
from megamor.model.flops import expected_steps
from megamor.model.loss import loss_kernels
from megamor.optim import build_optimizer
from megamor.parallel import World, build_backend, compiles, share_compiled_code
from megamor.parallel.zero_config import engine_config
from megamor.ranks import Ranks, from_first_rank, run_on_all_ranks
from megamor.train.budget import Budget
from megamor.train.diagnosis import Diagnosis
from megamor.train.distill import Distillation
from megamor.train.evaluations import TASKS, Evaluations
from megamor.train.guard import Guard
from megamor.train.loss_choice import LossChoice
from megamor.train.run_state import Origin, RunCheckpoints, RunProgress, Stateful, checkpoint_files
from megamor.train.start import warm_start
from megamor.train.stop import StopRequest
from megamor.train.summary import LaunchSummary
from megamor.train.trainer import Trainer
from megamor.train.validation import VALIDATION
from megamor.train.watchdog import Watchdog

log = logging.getLogger("megamor.train")

METRICS_FILE = "metrics.jsonl"


def build_trainer(config: Config, world: World) -> Trainer:
    """Open the data, build and wrap the model, restore the newest checkpoint of the run if it has one. Collective.

    `config` has been validated for `world.size` processes. Its paths are expanded here, and stored as they are written.

    Raises:
        ConfigError, DataError, CheckpointError: on every rank, for anything found on any rank that would make the run
            fail.
    """
    if config.train.max_flops is not None:
        validate_length(config, expected_steps(config))
    if config.train.deterministic:
        make_deterministic()
    # Whatever can fail on one rank alone (a missing shard, a full disk) is agreed on before the first real collective.
    kernels = run_on_all_ranks(lambda: loss_kernels(config, world.device.type))
    expanded = run_on_all_ranks(lambda: expand_paths(config))
    expanded = replace(expanded, train=replace(expanded.train, compile=compiles(config.train, world.device)))
    if expanded.train.compile:
        share_compiled_code(Path(expanded.run.dir) / ".torchinductor")
    inputs = run_on_all_ranks(lambda: open_inputs(expanded, world))
    files = run_on_all_ranks(lambda: checkpoint_files(config, expanded.data, inputs.tokenizer))
    directory = run_on_all_ranks(lambda: run_directory(expanded))
    lock = run_on_all_ranks(lambda: lock_run(directory) if world.is_main else None)
    ranks = Ranks.current(in_background=config.checkpoint.asynchronous)
    manager = checkpoint_manager(config, directory, lock, ranks)

    model = build_model(config, device=world.device)
    # A run that has begun needs its source no more.
    started_from, started = warm_start(model, config) if manager.is_empty() else ({}, [])
    # Taken before the backend shards the model: checkpoints are compared by whole shapes.
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # All ranks build the same weights from one seed; from here on each rank has random numbers of its own.
    reseed(config.run.seed, 0, world.rank)
    backend = build_backend(model, expanded, world, lambda module: build_optimizer(module, config))
    distillation = Distillation.load(config, world.device)
    guard = Guard(config.guard)
    diagnosis = Diagnosis(config, {prefix: stage.router for prefix, stage in model.stages.items()}, world.device)
    components: dict[str, Stateful] = {"guard": guard, "diagnosis": diagnosis}
    components |= {} if distillation is None else {"distillation": distillation}
    loss = LossChoice(config, world.device, kernels)
    components |= {"loss": loss} if world.device.type == "cuda" else {}
    checkpoints = RunCheckpoints(config, manager, backend, inputs.loader, shapes, files, inputs.origin, components)
    restored = checkpoints.resume()
    about_loss, model.loss_kernel = loss.settle(), loss.kernel
    progress, resumption, told = restored or (RunProgress(started_from=started_from), None, started)
    told = told if distillation is None else [*told, *distillation.told]
    budget = Budget(config)
    total_steps = budget.total_steps(progress)
    derived = derive(config, world.size, progress, total_steps)
    if world.is_main:
        if world.device.type == "cuda":
            dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
            told = [*told, describe_kernels(config.model, dtype, world.device)]
        for warning in announce_shared_data(expanded.data):
            log.warning(warning)
        begin = "\n".join([*told, derived.describe(), *inputs.loader.describe(total_steps), *about_loss])
        print(f"{config.run.name}: {begin}", flush=True)
    if progress.step < config.optim.warmup_steps and not budget.open_ended:
        validate_length(config, total_steps)  # another batch may have made the run shorter
    for prefix in (VALIDATION, TASKS) if restored else ():
        last = from_first_rank(partial(last_evaluation, directory / METRICS_FILE, progress.step, prefix))
        inputs.evaluations.done[prefix] = last
    device_name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    throughput = Throughput(peak_flops=peak_flops(device_name, config.train.precision), world_size=world.size)
    trainer = Trainer(
        config=config,
        batches=derived.batches,
        budget=budget,
        model=model,
        backend=backend,
        loader=inputs.loader,
        evaluations=inputs.evaluations,
        checkpoints=checkpoints,
        progress=progress,
        saved_step=progress.step,
        sinks=[],
        throughput=throughput,
        display=TrainingDisplay(
            config.run.name,
            total_steps,
            start=progress.step,
            enabled=world.is_main and config.metrics.progress,
            console=Console(highlight=False),
        ),
        stop=StopRequest(),
        guard=guard,
        diagnosis=diagnosis,
        watchdog=Watchdog(directory, world.rank, config.train.hang_timeout_seconds),
        summary=LaunchSummary(expanded, throughput, distillation),
        distillation=distillation,
        lock=lock,
    )
    if resumption is not None and trainer.is_complete():
        resumption.check_not_finished(progress)
    if resumption is not None and resumption.returns:
        kept = checkpoints.set_later_aside(progress, [directory / METRICS_FILE])
        if kept is not None and world.is_main:
            print(f"checkpoint.resume_step: later checkpoints and metrics are kept in {kept}", flush=True)
    # Only now, because opening them may create a run in a tracker and removes the lines of steps that will run again.
    trainer.sinks = run_on_all_ranks(lambda: build_sinks(expanded, world, progress, restored is not None))
    return trainer


@dataclass(frozen=True)
class Inputs:
    """What a run reads: data, what it evaluates, and the tokenizer file, which goes into its checkpoints."""

    loader: TrainingLoader
    evaluations: Evaluations
    tokenizer: bytes | None
    origin: Origin


def open_inputs(config: Config, world: World) -> Inputs:
    """Open all data, and check that it exists, is intact and belongs to this model. `config` has expanded paths."""
    vocab_size = config.model.vocab_size
    if config.parallel.deepspeed_config:
        engine_config(config, world.size)  # reported now, before anything is built
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=vocab_size)
    loader = TrainingLoader(
        data,
        rank=world.rank,
        world_size=world.size,
        batches=BatchSchedule.of(config),
        pinned=world.device.type == "cuda",
    )
    evaluations = Evaluations.of(config)
    # Read once, so that changing or deleting the file during the run does no harm.
    tokenizer = Path(config.data.tokenizer).read_bytes() if config.data.tokenizer else None
    return Inputs(loader, evaluations, tokenizer, Origin(data.fingerprints()))


def run_directory(config: Config) -> Path:
    """Create the directory for the run's checkpoints and metrics, and return it.

    Raises:
        ConfigError: the directory can't be created.
    """
    directory = Path(config.run.dir) / config.run.name
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"can't create the run's directory {directory}: {error}; set run.dir or run.name") from error
    return directory


def lock_run(directory: Path) -> WriteLock:
    """Make this process the only one that writes to the run's directory.

    Raises:
        InUseError: another launch is writing to it.
        ConfigError: the lock can't be written.
    """
    advice = (
        "wait for it, stop it, or choose another run.name. If both were meant to be processes of one run, start them "
        "with torchrun, megamor launch or srun"
    )
    lock = WriteLock(directory / CHECKPOINTS_DIR, f"the run {directory}", advice, steal_from_self=True)
    try:
        lock.take()
    except OSError as error:
        raise ConfigError(f"can't write {lock.path}: {error}; free space, or set run.dir or run.name") from error
    return lock


def checkpoint_manager(config: Config, directory: Path, lock: WriteLock | None, ranks: Ranks) -> CheckpointManager:
    """What writes and removes the checkpoints of the run in `directory`, on the rank that has the `lock`."""
    keep = config.checkpoint
    return CheckpointManager(
        directory / CHECKPOINTS_DIR,
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        keep_best=keep.keep_best,
        ranks=ranks,
        may_write=lock.check if lock else None,
    )


def build_sinks(config: Config, world: World, progress: RunProgress, resumed: bool) -> list[MetricSink]:
    """The first rank's sinks; other ranks write nothing. Puts the tracker's run id into `progress.run_ids`."""
    if not world.is_main:
        return []
    directory = run_directory(config)
    resume_step = progress.step if resumed else None
    try:
        sinks: list[MetricSink] = [JsonlSink(directory / METRICS_FILE, resume_step=resume_step)]
    except OSError as error:
        raise ConfigError(f"can't write {directory / METRICS_FILE}: {error}; set run.dir or run.name") from error
    if config.metrics.tensorboard:
        sinks.append(TensorBoardSink(directory / "tensorboard", resume_step=resume_step))
    trackers: list[TrackerSink] = []
    if config.metrics.wandb:
        trackers.append(WandbSink(config, directory, progress.run_ids.get("wandb")))
    if config.metrics.trackio:
        trackers.append(TrackioSink(config, progress.run_ids.get("trackio")))
    progress.run_ids.update({tracker.name: tracker.run_id for tracker in trackers})
    return [*sinks, *trackers]


def last_evaluation(metrics: Path, step: int, prefix: str = VALIDATION) -> int | None:
    """The newest step up to `step` with a metric of this prefix in the file `metrics`; None if there is none.

    Raises:
        ConfigError: the file can't be read.
    """
    try:
        records = read_jsonl(metrics) if metrics.exists() else []
    except OSError as error:
        raise ConfigError(f"can't read {metrics}: {error}; set run.dir or run.name") from error
    evaluated = (record["step"] for record in records if any(k.startswith(prefix) for k in record))
    return max((found for found in evaluated if found <= step), default=None)
