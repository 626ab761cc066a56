"""Convert a checkpoint to one safetensors file with the model's weights.

examples:
  megamor convert-checkpoint runs/x/checkpoints/latest --output x.safetensors
  megamor convert-checkpoint runs/x --dtype bfloat16 --output x.safetensors

To resume with another backend (ZeRO included) or another number of ranks, nothing has to be converted: all backends
read and write the same format, that of torch.distributed.checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser
from megamor.errors import ConfigError, user_errors

DTYPES = ("float32", "bfloat16")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run `megamor convert-checkpoint`."""
    parser = command_parser("convert-checkpoint", __doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, `latest`, or a run's directory")
    parser.add_argument("--to", default="safetensors", metavar="FORMAT", help="only safetensors (default)")
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
    to_safetensors(args.checkpoint, args.output, args.dtype)
    print(f"written to {args.output}")


def to_safetensors(path: Path, output: Path, dtype: str | None) -> None:
    """Write every weight and buffer once, under its name in the model; the tied head is the embedding's tensor.

    The file's metadata contain the step and the run's configuration as YAML.
    """
    import torch
    from safetensors.torch import save_file

    from megamor.checkpoint import open_checkpoint
    from megamor.files import draft_for

    checkpoint = open_checkpoint(path)
    weights = {
        name: tensor.to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.weights().items()
    }
    with draft_for(output) as draft:
        save_file(weights, draft, metadata={"step": str(checkpoint.step), "config": checkpoint.config_yaml})


if __name__ == "__main__":
    main()
