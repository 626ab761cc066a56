"""Check that a checkpoint is intact, loads, and contains the model that its configuration describes.

examples:
  megamor verify-checkpoint runs/x/checkpoints/latest
  megamor verify-checkpoint runs/x --all
  megamor verify-checkpoint runs/x/checkpoints/latest --quick     # compare sizes only; load nothing

The checks:
  - every file's size and SHA-256 against the manifest
  - config.yaml and trainer.json can be read
  - every weight and moment loads, has the shape that the model expects, and is finite
  - the number of unique parameters equals the formula's
  - each rank has a file of random states

All faults are listed. Exit status 0 if there are none, 2 otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megamor.cli import command_parser, counted
from megamor.errors import EXIT_USER_ERROR, CheckpointError, MegamorError, user_errors

if TYPE_CHECKING:
    from megamor.checkpoint import TrainerState
    from megamor.config import Config


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Print each checkpoint's faults.

    Raises:
        SystemExit: status 2 if there is a fault, or no checkpoint.
    """
    parser = command_parser("verify-checkpoint", __doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, `latest`, a run, or a directory of checkpoints")
    parser.add_argument("--all", action="store_true", help="check every checkpoint of the run, not the latest only")
    parser.add_argument("--quick", action="store_true", help="compare sizes instead of checksums, and load nothing")
    args = parser.parse_args(argv)

    from megamor.checkpoint import TrainerState, describe_origin

    any_faults = False
    for checkpoint in checkpoints_at(args.checkpoint, all_of_them=args.all):
        faults = list(faults_of(checkpoint, quick=args.quick))
        any_faults |= bool(faults)
        print(f"{checkpoint}: {counted(len(faults), 'fault') if faults else 'whole'}")
        for fault in faults:
            print(f"  {fault}")
        if not faults and (origin := TrainerState.read(checkpoint).started_from):
            print(f"  started from {describe_origin(origin)}")
    if any_faults:
        raise SystemExit(EXIT_USER_ERROR)


def checkpoints_at(path: Path, *, all_of_them: bool) -> list[Path]:
    """The checkpoints to check, oldest first.

    Raises:
        CheckpointError: there are none.
    """
    from megamor.checkpoint import layout

    root = path / layout.CHECKPOINTS_DIR if layout.published_steps(path / layout.CHECKPOINTS_DIR) else path
    steps = layout.published_steps(root)
    if not steps:
        if not layout.looks_like_checkpoint(path):
            raise CheckpointError(f"there is no checkpoint at {path}")
        return [path.resolve()]
    if not all_of_them:
        latest = layout.latest_step(root)
        steps = steps[-1:] if latest is None else [latest]
    return [root / layout.step_name(step) for step in steps]


def faults_of(checkpoint: Path, *, quick: bool) -> Iterator[str]:
    """Everything that is wrong with `checkpoint`, one line for each fault."""
    from megamor.checkpoint import TrainerState, find_damage, stored_file
    from megamor.checkpoint.layout import CONFIG_FILE, parse_step, rng_path
    from megamor.config import config_from_yaml

    yield from find_damage(checkpoint, hashes=not quick)
    config = trainer = None
    try:
        trainer = TrainerState.read(checkpoint)
    except MegamorError as error:
        yield str(error)
    try:
        text = stored_file(checkpoint, CONFIG_FILE).read_text(encoding="utf-8")
        config = config_from_yaml(text, str(checkpoint / CONFIG_FILE))
    except (MegamorError, OSError, ValueError) as error:
        yield f"{checkpoint / CONFIG_FILE} can't be read: {error}"
    if trainer is None:
        return
    named = parse_step(checkpoint.name)
    if named is not None and named != trainer.step:
        yield f"the directory is named after step {named}, but trainer.json says step {trainer.step}"
    if trainer.step > 0:  # an imported model, at step 0, has no random states and no moments
        for rank in range(trainer.world_size):
            if not rng_path(checkpoint, rank).is_file():
                yield f"{rng_path(checkpoint, rank)} is missing, though {trainer.world_size} ranks saved the checkpoint"
    if config is not None and not quick:
        yield from _state_faults(checkpoint, config, trainer)


def _state_faults(checkpoint: Path, config: Config, trainer: TrainerState) -> Iterator[str]:
    import torch

    from megamor.checkpoint.state import iterate_state, shape_differences, state_shapes
    from megamor.config.derive import derive
    from megamor.config.segments import stages
    from megamor.model import build_model
    from megamor.optim import moments_of
    from megamor.routing import refuse_unknown_router

    try:
        refuse_unknown_router(config, checkpoint)
        model = build_model(config, device="meta")
        parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        expected = {f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
        for name, shape in parameters.items() if trainer.step > 0 else ():
            moments = moments_of(name, shape, config.optim)
            expected |= {f"optimizer.state.{name}.{key}": shape if key != "step" else () for key in moments}
        if config.optim.average_decay is not None and trainer.step > 0:
            expected |= {f"average.{name}": shape for name, shape in parameters.items()} | {"average.updates": ()}
        stored = state_shapes(checkpoint)
        yield from shape_differences(stored, expected)
        # Tied weights that were stored twice would show in the sum.
        counted = sum(stored[f"model.{name}"].numel() for name in parameters if f"model.{name}" in stored)
        formula = derive(config, trainer.world_size).unique_parameters_with_embedding
        if counted != formula and all(stage.config.router.kind != "custom" for stage in stages(config)):
            yield f"{counted:,} unique parameters are stored, but the configuration has {formula:,}"
        for name, tensor in iterate_state(checkpoint):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                yield f"{name} has values that are not finite"
    except MegamorError as error:
        yield str(error)
