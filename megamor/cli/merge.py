"""Merge checkpoints of one model into a checkpoint of averaged weights, to evaluate, serve and export.

examples:
  megamor merge runs/x/checkpoints/step_0000{2400,2700,3000} --out merged/x
  megamor merge runs/x/checkpoints/step_0000{2400,2700,3000} --out merged/x --weights wsd
  megamor merge runs/x --average --out averaged/x     # the moving average that optim.average_decay keeps

`--weights wsd` emulates a linear decay of the learning rate from the first checkpoint to the last, for checkpoints of a
run's constant phase. In sum w_j theta_j, the updates between checkpoints i-1 and i have the factor sum of w_j, j >= i.
Equating it with the decay's factor halfway between them gives w_j = (s_j+1 - s_j-1) / 2(s_last - s_first), with s the
steps and the ends repeated (arXiv 2507.17634). Sums are in fp64 and rounded once. Routers' buffers are averaged too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from megamor.cli import command_parser
from megamor.errors import ConfigError, user_errors

if TYPE_CHECKING:
    from megamor.checkpoint import Checkpoint


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Check that the checkpoints belong together, merge their weights one by one, and write the result."""
    parser = command_parser("merge", __doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoints, `latest`, or runs")
    parser.add_argument("--out", required=True, type=Path, help="checkpoints directory to write; new or empty")
    parser.add_argument("--weights", default="mean", metavar="mean|wsd|w1,w2,…", help="default: %(default)s")
    parser.add_argument("--average", action="store_true", help="take the moving averages in place of the weights")
    args = parser.parse_args(argv)

    from megamor.checkpoint import iterate_state, open_checkpoint, origin_of, state_shapes
    from megamor.checkpoint.layout import CONFIG_FILE, TEXT_FILES
    from megamor.checkpoint.state import AVERAGE_PREFIX, MODEL_PREFIX
    from megamor.interop.weights import refuse_occupied, save_weights

    refuse_occupied(args.out)
    found = [open_checkpoint(path) for path in args.checkpoints]
    weights = merge_weights(args.weights, [checkpoint.step for checkpoint in found])
    for other in found[1:]:
        check_alike(found[0], other)
    stored = [state_shapes(checkpoint.directory) for checkpoint in found]
    names = {name: name for name in stored[0] if name.startswith(MODEL_PREFIX)}
    if args.average:
        averages = {MODEL_PREFIX + n.removeprefix(AVERAGE_PREFIX): n for n in stored[0] if n.startswith(AVERAGE_PREFIX)}
        for checkpoint, shapes in zip(found, stored, strict=True):
            if not averages or not shapes.keys() >= set(averages.values()):
                raise ConfigError(f"{checkpoint.directory} has no moving average: train with optim.average_decay")
        names = {name: averages.get(name, name) for name in names}  # buffers have none
    merged = {}
    # One small batch of tensors of each checkpoint is in memory at a time, besides the result.
    streams = [iterate_state(checkpoint.directory, 2**28, list(names.values())) for checkpoint in found]
    for name, values in zip(names, zip(*streams, strict=True), strict=True):
        tensors = [tensor for _, tensor in values]
        total = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True))
        merged[name] = total.to(tensors[0].dtype) if tensors[0].is_floating_point() else tensors[-1]
    parts = [{"checkpoint": str(c.directory), "weight": w} for c, w in zip(found, weights, strict=True)]
    own = {name: found[-1].directory / name for name in (CONFIG_FILE, *TEXT_FILES)}
    files = {name: path for name, path in own.items() if path.is_file()}
    origin = {"merge": {"average": args.average, "parts": parts}}
    reached = [checkpoint.recursions for checkpoint in found if checkpoint.recursions]  # while a schedule grows
    depth = max(reached) if len(reached) == len(found) else None
    last = origin_of("merge", found[-1].directory)
    written = save_weights(args.out, merged, files, components=origin, recursions=depth, started_from=last)
    for part in parts:
        print(f"{part['weight']:.4f} x {part['checkpoint']}{' (moving average)' if args.average else ''}")
    print(f"{written}: weights only; it can be evaluated, served, exported and started from (init.from), not resumed")


def merge_weights(given: str, steps: Sequence[int]) -> list[float]:
    """The weight of each checkpoint; they add up to 1. Raises ConfigError if `given` doesn't fit them."""
    count = len(steps)
    if given == "mean":
        return [1 / count] * count
    if given == "wsd":
        if count < 2 or any(later <= earlier for earlier, later in pairwise(steps)):
            raise ConfigError(f"--weights wsd: give two or more checkpoints in the order of their steps, not {steps}")
        padded = [steps[0], *steps, steps[-1]]
        return [(padded[j + 2] - padded[j]) / (2 * (steps[-1] - steps[0])) for j in range(count)]
    try:
        numbers = [float(number) for number in given.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights {given}: give mean, wsd, or numbers such as 0.2,0.8") from error
    total = sum(numbers)
    if len(numbers) != count or not math.isfinite(total) or total <= 0:
        raise ConfigError(f"--weights {given}: give one number for each of {count} checkpoints, with a positive sum")
    return [number / total for number in numbers]


def check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Raises ConfigError or CheckpointError, naming what differs, if models or tokenizers are different."""
    from megamor.checkpoint import check_same_model, weight_shapes
    from megamor.checkpoint.layout import TEXT_FILES
    from megamor.config import config_from_yaml
    from megamor.config.changes import Effect, changes

    configs = [config_from_yaml(checkpoint.config_yaml, str(checkpoint.directory)) for checkpoint in (first, other)]
    function = [change for change in changes(*configs) if change.effect is Effect.FUNCTION]
    differ = [str(change) for change in function if change.name != "data.tokenizer"]
    for name in TEXT_FILES:
        files = [checkpoint.directory / name for checkpoint in (first, other)]
        contents = [file.read_bytes() if file.is_file() else None for file in files]
        differ += [f"{name} has other contents"] if contents[0] != contents[1] else []
    if differ:
        raise ConfigError("\n  ".join([f"{other.directory} isn't of the same model as {first.directory}:", *differ]))
    check_same_model(other.directory, weight_shapes(other.directory), weight_shapes(first.directory))
