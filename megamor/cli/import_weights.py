"""Import a model trained with the paper authors' released code as a megamor checkpoint.

example:
  megamor import --state-dict official/checkpoint-14161/pytorch_model.bin \\
      --config official/conf/pretrain/my_run.yaml --tokenizer tokenizer.json --output runs/official/checkpoints
  megamor evaluate --checkpoint runs/official/checkpoints --data data/fineweb_val

The released expert-choice code unties the attention weights of the recursions. megamor has no exact counterpart for
such weights and refuses them; `--untied first` or `--untied mean` imports an approximation to continue training from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser
from megamor.errors import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Convert the weights, write a checkpoint, and say how exact it is."""
    parser = command_parser("import", __doc__)
    weights = "pytorch_model.bin, model.safetensors, or their directory"
    parser.add_argument("--state-dict", required=True, type=Path, help=weights)
    parser.add_argument("--config", required=True, type=Path, help="the YAML file of the run")
    parser.add_argument("--model-config", type=Path, help="Hugging Face config.json of a backbone other than SmolLM")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to store in the checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="checkpoints directory to write; new or empty")
    untied = "for untied attention: take the first recursion's weights, or the mean of all (default: refuse)"
    parser.add_argument("--untied", choices=("first", "mean"), help=untied)
    arguments = parser.parse_args(argv)

    from megamor.config import read_mapping
    from megamor.interop.official import import_official, read_state_dict, save_imported

    settings = read_mapping(arguments.config)
    if arguments.model_config is not None:
        # The run's own `model_config` changes the published backbone, so it wins.
        settings["model_config"] = {**read_mapping(arguments.model_config), **(settings.get("model_config") or {})}
    imported = import_official(read_state_dict(arguments.state_dict), settings, untied=arguments.untied)
    checkpoint = save_imported(imported, arguments.output, arguments.tokenizer)
    print(f"{checkpoint}: {sum(weight.numel() for weight in imported.weights.values()):,} parameters")
    if imported.untied:
        print(
            f"{len(imported.untied)} attention weights were untied and are now shared (--untied {arguments.untied}): "
            "this is not the model that was trained"
        )
