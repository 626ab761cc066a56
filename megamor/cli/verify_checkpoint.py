"""Check a checkpoint: is every file whole, does it load, is it the model that its configuration describes?

examples:
  megamor verify-checkpoint runs/x/checkpoints/latest
  megamor verify-checkpoint runs/x/checkpoints --all
  megamor verify-checkpoint runs/x/checkpoints/latest --quick     # sizes instead of checksums; loads nothing

Checked are every file's size and SHA-256 against the manifest; the configuration and the trainer's state; that each
weight and moment loads in the shape that the model has, and is finite; the number of unique parameters against the
formula; one file of random states for each rank. All faults are listed. Exit status 0 if there are none, 2 otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megamor.checkpoint import TrainerState, find_damage, iterate_state, state_shapes
from megamor.checkpoint.layout import CONFIG_FILE, latest_step, parse_step, published_steps, rng_path, step_name
from megamor.config import Config, config_from_yaml
from megamor.config.derive import derive
from megamor.errors import CheckpointError, MegamorError, user_errors
from megamor.model import build_model

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="verify_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, `latest`, or a directory of checkpoints")
    parser.add_argument("--all", action="store_true", help="every checkpoint of a directory of checkpoints")
    parser.add_argument("--quick", action="store_true", help="sizes instead of checksums, and load nothing")
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    damaged = 0
    for checkpoint in checkpoints_at(args.checkpoint, all_of_them=args.all):
        faults = list(faults_of(checkpoint, quick=args.quick))
        damaged += bool(faults)
        print(f"{checkpoint}: {'whole' if not faults else f'{len(faults)} faults'}")
        for fault in faults:
            print(f"  {fault}")
    if damaged:
        raise SystemExit(2)


def checkpoints_at(path: Path, *, all_of_them: bool) -> list[Path]:
    """The checkpoints that `path` means, oldest first.

    Raises:
        CheckpointError: there are none.
    """
    root = path / "checkpoints" if published_steps(path / "checkpoints") else path
    steps = published_steps(root)
    if not steps:
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint at {path}")
        return [path.resolve()]
    if not all_of_them:
        latest = latest_step(root)
        steps = [latest if latest is not None else steps[-1]]
    return [root / step_name(step) for step in steps]


def faults_of(checkpoint: Path, *, quick: bool) -> Iterator[str]:
    """Everything that is wrong with `checkpoint`, a line each."""
    damage = find_damage(checkpoint, hashes=not quick)
    yield from damage
    config = trainer = None
    try:
        trainer = TrainerState.read(checkpoint)
    except MegamorError as error:
        yield str(error)
    try:
        config = config_from_yaml((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"), CONFIG_FILE)
    except (MegamorError, OSError, ValueError) as error:
        yield f"{checkpoint / CONFIG_FILE} can't be read: {error}"
    if trainer is not None:
        yield from _trainer_faults(checkpoint, trainer)
    if config is not None and trainer is not None and not quick:
        yield from _state_faults(checkpoint, config, trainer)


def _trainer_faults(checkpoint: Path, trainer: TrainerState) -> Iterator[str]:
    named = parse_step(checkpoint.name)
    if named is not None and named != trainer.step:
        yield f"the directory says step {named}, trainer.json says step {trainer.step}"
    if trainer.step > 0:
        for rank in range(trainer.world_size):
            if not rng_path(checkpoint, rank).is_file():
                yield f"{rng_path(checkpoint, rank)} is missing: {trainer.world_size} ranks saved it"


def _state_faults(checkpoint: Path, config: Config, trainer: TrainerState) -> Iterator[str]:
    try:
        stored = state_shapes(checkpoint)
    except CheckpointError as error:
        yield str(error)
        return
    model = build_model(config, device="meta")
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    if trainer.step > 0:
        for name, shape in parameters.items():
            expected |= {f"optimizer.state.{name}.{key}": shape if key != "step" else () for key in MOMENTS}
    for name, shape in expected.items():
        if name not in stored:
            yield f"{name} is missing"
        elif tuple(stored[name]) != shape:
            yield f"{name} has shape {tuple(stored[name])} instead of {shape}"
    yield from (f"{name} belongs to no part of the model" for name in stored if name not in expected)
    try:
        for name, tensor in iterate_state(checkpoint):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                yield f"{name} has values that are not finite"
    except CheckpointError as error:
        yield str(error)
    counted = sum(stored[f"model.{name}"].numel() for name in parameters if f"model.{name}" in stored)
    formula = derive(config, trainer.world_size).unique_parameters_with_embedding
    if counted != formula and config.router.kind != "custom":
        yield f"{counted:,} unique parameters are stored, and the configuration has {formula:,}"


if __name__ == "__main__":
    main()
