"""Convert a checkpoint to one safetensors file with the model's weights.

examples:
  megamor convert-checkpoint runs/x/checkpoints/latest --output x.safetensors
  megamor convert-checkpoint runs/x --dtype bfloat16 --output x.safetensors

To resume with another backend (ZeRO included) or another number of processes, nothing has to be converted: all backends
read and write the same format, that of torch.distributed.checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser
from megamor.errors import ConfigError, user_errors

DTYPES = ("float32", "bfloat16")


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write every weight and buffer once, under its name in the model; the tied head is the embedding's tensor.

    The file's metadata contain the step and the run's configuration as YAML.

    Raises:
        SystemExit: status 2 if the checkpoint can't be read, or the output exists.
    """
    parser = command_parser("convert-checkpoint", __doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, `latest`, or a run's directory")
    parser.add_argument("--to", default="safetensors", metavar="FORMAT", help="only safetensors (default: %(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="the file to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as stored)")
    args = parser.parse_args(argv)
    if args.to != "safetensors":
        raise ConfigError(
            f"--to {args.to}: checkpoints are converted to safetensors only. ZeRO resumes from a checkpoint of any "
            "backend as it is; other programs read its state/ with torch.distributed.checkpoint"
        )
    if args.output.exists():
        raise ConfigError(f"{args.output} exists: give another --output")

    import torch
    from safetensors.torch import save_file

    from megamor.checkpoint import open_checkpoint
    from megamor.files import draft_for

    checkpoint = open_checkpoint(args.checkpoint)
    weights = checkpoint.weights()
    if args.dtype:
        dtype = getattr(torch, args.dtype)
        weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    with draft_for(args.output) as draft:
        save_file(weights, draft, metadata={"step": str(checkpoint.step), "config": checkpoint.config_yaml})
    print(f"written to {args.output}")
