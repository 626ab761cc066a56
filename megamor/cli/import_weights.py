"""Import a model trained with the paper authors' released code into a checkpoint of megamor."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megamor.errors import ConfigError, user_errors
from megamor.interop import import_official, read_state_dict, save_imported

EXAMPLE = """\
example:
  megamor import --state-dict official/checkpoint-14161/pytorch_model.bin \\
      --config official/conf/pretrain/my_run.yaml --tokenizer tokenizer.json --output runs/official/checkpoints
  megamor evaluate --checkpoint runs/official/checkpoints --data data/fineweb_val

The released expert-choice code un-ties attention between recursions. Such weights have no exact counterpart and are
refused; --untied first or mean imports an approximation to train on from.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megamor import",
        description="Import a model trained with the released Mixture-of-Recursions code.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--state-dict", required=True, type=Path, help="pytorch_model.bin, model.safetensors, or their directory"
    )
    parser.add_argument("--config", required=True, type=Path, help="the YAML file of the run")
    parser.add_argument(
        "--model-config",
        type=Path,
        help="Hugging Face config.json of the backbone, if the run starts from another than SmolLM",
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to put into the checkpoint")
    parser.add_argument(
        "--output", required=True, type=Path, help="directory of checkpoints to write; must be new or empty"
    )
    parser.add_argument(
        "--untied", choices=("first", "mean"), help="what to do with un-tied attention (default: refuse)"
    )
    return parser.parse_args(argv)


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) file that holds a mapping.

    Raises:
        ConfigError: it can't be read or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} can't be read as YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected a mapping")
    return dict(values)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = parse_arguments(argv)
    settings = read_settings(arguments.config)
    if arguments.model_config is not None:
        # The run's own `model_config` changes the published backbone, so it wins.
        settings["model_config"] = {**read_settings(arguments.model_config), **(settings.get("model_config") or {})}
    imported = import_official(read_state_dict(arguments.state_dict), settings, untied=arguments.untied)
    checkpoint = save_imported(imported, arguments.output, arguments.tokenizer)
    console = Console(highlight=False)
    count = sum(weight.numel() for weight in imported.weights.values())
    console.print(f"{checkpoint}: {count:,} parameters", markup=False, soft_wrap=True)
    if imported.untied:
        console.print(
            f"{len(imported.untied)} attention weights were un-tied (now: {arguments.untied}); "
            "this is not the model that was trained",
            markup=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
