"""Convert a checkpoint: to one file of weights, or to and from DeepSpeed's own layout with the optimizer's moments.

examples:
  megamor convert-checkpoint runs/x/checkpoints/latest --to safetensors --output x.safetensors
  megamor convert-checkpoint runs/x/checkpoints/latest --to deepspeed --zero-stage 2 --processes 8 --output ds
  megamor convert-checkpoint ds --to megamor --output runs/y/checkpoints

To go on with another backend or another number of processes no conversion is needed: every backend resumes from any
checkpoint. DeepSpeed's layout is for other programs that read it. It is written and read by DeepSpeed itself, on as
many processes of this machine's CPUs as the layout has ranks, in fp32; `config.yaml`, `trainer.json` and the tokenizer
go along, so that it can be converted back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.multiprocessing.spawn import ProcessRaisedException, start_processes

from megamor.checkpoint import CheckpointManager, TrainerState, open_checkpoint
from megamor.checkpoint.layout import CONFIG_FILE, TOKENIZER_FILE, TRAINER_FILE
from megamor.config import Config, ParallelConfig, config_from_yaml
from megamor.errors import CheckpointError, ConfigError, user_errors
from megamor.model import build_model
from megamor.optim import build_adamw
from megamor.parallel import build_backend, close_world, init_world
from megamor.parallel.zero import ZeroBackend

ENGINE = "engine"
LAYOUT_FILE = "layout.json"
COMPANIONS = (CONFIG_FILE, TRAINER_FILE, TOKENIZER_FILE)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, `latest`, a run; or what --to deepspeed wrote")
    parser.add_argument("--to", required=True, choices=["safetensors", "deepspeed", "megamor"], help="what to write")
    parser.add_argument("--output", required=True, type=Path, help="file (safetensors) or directory; must be new")
    parser.add_argument("--dtype", choices=DTYPES, help="safetensors: type of the weights (default: as stored)")
    parser.add_argument("--zero-stage", type=int, choices=[1, 2, 3], default=2, help="deepspeed: stage (default: 2)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="deepspeed: ranks (default: 1)")
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    if args.output.exists():
        raise ConfigError(f"{args.output} exists: give another --output")
    if args.to == "safetensors":
        to_safetensors(args.checkpoint, args.output, DTYPES.get(args.dtype))
    elif args.to == "deepspeed":
        if args.processes < 1:
            raise ConfigError(f"--processes {args.processes}: give at least 1")
        to_deepspeed(args.checkpoint, args.output, args.zero_stage, args.processes)
    else:
        from_deepspeed(args.checkpoint, args.output)
    print(f"written to {args.output}")


def to_safetensors(path: Path, output: Path, dtype: torch.dtype | None) -> None:
    """Every weight and buffer once, under its name in the model; the tied head is the embedding's tensor."""
    checkpoint = open_checkpoint(path)
    weights = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.weights().items()
    }
    draft = output.with_name(f".{output.name}.draft")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(weights, draft, metadata={"step": str(checkpoint.step), "config": checkpoint.config_yaml})
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)


def to_deepspeed(path: Path, output: Path, stage: int, processes: int) -> None:
    """DeepSpeed's layout of `stage` on `processes` ranks, in `output`/engine."""
    checkpoint = open_checkpoint(path).directory
    config = engine_run(_read_config(checkpoint / CONFIG_FILE), stage)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting_", dir=output.parent) as draft:
        on_processes(processes, partial(_write_engine, config, checkpoint, Path(draft)))
        layout = {"world_size": processes, "zero_stage": stage}
        (Path(draft) / LAYOUT_FILE).write_text(json.dumps(layout, indent=1) + "\n")
        for name in COMPANIONS:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, Path(draft) / name)
        shutil.copytree(draft, output)


def from_deepspeed(path: Path, output: Path) -> None:
    """A directory of checkpoints with the one that `to_deepspeed` wrote to `path`."""
    try:
        layout = json.loads((path / LAYOUT_FILE).read_bytes())
        stage, processes = int(layout["zero_stage"]), int(layout["world_size"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} isn't what `--to deepspeed` writes ({error})") from error
    config = engine_run(_read_config(path / CONFIG_FILE), stage)
    on_processes(processes, partial(_read_engine, config, path, output))


def engine_run(config: Config, stage: int) -> Config:
    """The run of `config` with DeepSpeed, plain and in fp32, which is what every state is stored in."""
    train = replace(config.train, precision="fp32", compile=False, activation_checkpointing="none")
    return replace(config, parallel=ParallelConfig("deepspeed", zero_stage=stage), train=train)  # type: ignore[arg-type]


def on_processes(count: int, action: Callable[[], Any]) -> None:
    """Run `action` on `count` processes that see each other as the ranks of a launch.

    Raises:
        CheckpointError: with what went wrong on the first that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        start_processes(_as_rank, args=(count, port, action), nprocs=count, start_method="spawn")
    except ProcessRaisedException as error:
        raise CheckpointError(str(error).strip().splitlines()[-1]) from error


def _as_rank(rank: int, count: int, port: int, action: Callable[[], Any]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    try:
        action()
    finally:
        close_world()


def _backend(config: Config) -> ZeroBackend:
    world = init_world(config.parallel)
    backend = build_backend(build_model(config), config, world, lambda module: build_adamw(module, config.optim))
    assert isinstance(backend, ZeroBackend)
    return backend


def _write_engine(config: Config, checkpoint: Path, output: Path) -> None:
    backend = _backend(config)
    backend.load(checkpoint)
    backend.save_engine(output, ENGINE)


def _read_engine(config: Config, path: Path, output: Path) -> None:
    backend = _backend(config)
    backend.load_engine(path, ENGINE)
    files: dict[str, str | bytes | Path] = {name: path / name for name in COMPANIONS if (path / name).is_file()}
    CheckpointManager(output, keep_last=1).save(TrainerState.read(path).step, [backend.save], files)


def _read_config(path: Path) -> Config:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: without it the model isn't known")
    return config_from_yaml(path.read_text(encoding="utf-8"), str(path))


if __name__ == "__main__":
    main()
