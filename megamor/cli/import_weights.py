"""Import a trained model as a megamor checkpoint, to evaluate, generate, serve, export, or start a run from.

examples:
  megamor import --from hf:HuggingFaceTB/SmolLM2-135M --output imported/smollm2
  megamor import --from models/my-qwen3 --output imported/qwen3      # a directory that transformers wrote
  megamor import --from official/checkpoint-14161/pytorch_model.bin --config official/conf/pretrain/my_run.yaml \\
      --tokenizer tokenizer.json --output runs/official/checkpoints

Without --config, the source is a dense model of the families Llama, Mistral, Qwen3 or Gemma 3 (text). With --config, it
comes from the paper authors' released code. Their expert-choice code unties the attention weights of the recursions.
megamor has no exact counterpart for such weights and refuses them; `--untied first` or `--untied mean` imports an
approximation to continue training from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megamor.cli import command_parser
from megamor.errors import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Convert the weights, write a checkpoint, and say how exact it is."""
    parser = command_parser("import", __doc__)
    source = "a Hugging Face directory, hf:OWNER/NAME, or with --config the weights of a run of the authors' code"
    parser.add_argument("--from", "--state-dict", dest="source", required=True, metavar="SOURCE", help=source)
    parser.add_argument("--config", type=Path, help="the YAML file of a run of the authors' code")
    backbone = "with --config: Hugging Face config.json of a backbone other than SmolLM"
    parser.add_argument("--model-config", type=Path, help=backbone)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to store in the checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="checkpoints directory to write; new or empty")
    untied = "for untied attention: take the first recursion's weights, or the mean of all (default: refuse)"
    parser.add_argument("--untied", choices=("first", "mean"), help=untied)
    arguments = parser.parse_args(argv)
    if arguments.config is None and (arguments.model_config or arguments.untied):
        parser.error("--model-config and --untied need --config")

    from megamor.interop.weights import refuse_occupied, save_imported

    refuse_occupied(arguments.output)
    if arguments.config is None:
        from megamor.interop.dense import read_dense

        imported = read_dense(arguments.source, arguments.tokenizer)
    else:
        from megamor.config import read_mapping
        from megamor.interop.official import import_official
        from megamor.interop.weights import read_state_dict, weights_sha256

        settings = read_mapping(arguments.config)
        if arguments.model_config is not None:
            # The run's own `model_config` changes the published backbone, so it wins.
            settings["model_config"] = {**read_mapping(arguments.model_config), **(settings.get("model_config") or {})}
        path = Path(arguments.source)
        imported = import_official(read_state_dict(path), settings, untied=arguments.untied)
        imported = replace(imported, origin={"source": str(path), "sha256": weights_sha256(path)})
    checkpoint = save_imported(imported, arguments.output, arguments.tokenizer)
    print(f"{checkpoint}: {sum(weight.numel() for weight in imported.weights.values()):,} parameters")
    if imported.untied:
        print(
            f"{len(imported.untied)} attention weights were untied and are now shared (--untied {arguments.untied}): "
            "this is not the model that was trained"
        )
    for note in imported.notes:
        print(f"note: {note}")
