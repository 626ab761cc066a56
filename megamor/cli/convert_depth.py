"""Make a dense model recursive: a checkpoint whose shared blocks take weights of its layers, to train further.

examples:
  megamor convert-depth --from runs/dense --to mor.yaml --init stepwise --output converted/mor
  megamor convert-depth --from hf:HuggingFaceTB/SmolLM2-135M --to mor.yaml --init svd_lora:64 --output converted/lora \\
      recursion.separate_norms=true recursion.lora_rank=64 --data data/wikitext_val
  megamor pretrain --config converted/mor/step_00000000/config.yaml init.from=converted/mor run.name=uptrained …

What the configuration leaves out of the section `model`, the dense model decides. Each unique block takes one layer
(stepwise: evenly spaced; lower; upper) or the mean of those that it replaces (average; svd_lora adds low-rank updates).
The result is worse than a uniform guess unless updates are large, so it has to be trained: see docs/uptraining.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megamor.cli import command_parser, positive
from megamor.errors import user_errors

if TYPE_CHECKING:
    from megamor.load import Source


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Convert the weights, write a checkpoint, and say how much was lost."""
    parser = command_parser("convert-depth", __doc__)
    add = parser.add_argument
    source = "the dense model: a checkpoint, run or export, a Hugging Face directory, or hf: and a name"
    add("--from", dest="source", required=True, metavar="DENSE", help=source)
    add("--to", required=True, type=Path, metavar="CONFIG", help="YAML file of the model that shares layers")
    add("--init", required=True, metavar="METHOD", help="stepwise, average, lower, upper, or svd_lora[:RANK]")
    add("--output", required=True, type=Path, help="checkpoints directory to write; new or empty")
    add("--data", metavar="PREFIX", help="also measure the loss before and after the conversion on this data set")
    add("--sequences", type=positive, default=16, help="how many of its sequences to measure (default: %(default)s)")
    add("overrides", nargs="*", metavar="section.key=value", help="change settings of the configuration")
    arguments = parser.parse_intermixed_args(argv)

    from megamor.checkpoint.layout import CONFIG_FILE
    from megamor.checkpoint.state import MODEL_PREFIX
    from megamor.config import config_to_yaml, load_config
    from megamor.config.convert import config_to_dict
    from megamor.config.schema import DataConfig
    from megamor.interop.depth import convert_depth, describe_check, router_names
    from megamor.interop.weights import refuse_occupied, save_weights
    from megamor.load import read_source
    from megamor.model import build_model

    refuse_occupied(arguments.output)
    dense = read_source(arguments.source, "convert-depth")
    backbone = {
        "model": config_to_dict(dense.config)["model"],
        "data": {"seq_len": min(DataConfig.seq_len, dense.config.model.max_seq_len)},
    }
    config = load_config(arguments.to, arguments.overrides, under=[(arguments.source, backbone)], run=False)
    converted = convert_depth(dense.config, dense.weights, config, arguments.init)
    drawn = {name: weight for name, weight in build_model(config).state_dict().items() if name in router_names(config)}
    weights = {MODEL_PREFIX + name: weight for name, weight in (converted | drawn).items()}
    origin = {**dense.origin, "method": arguments.init}
    files: dict[str, str | bytes | Path] = {**dense.files, CONFIG_FILE: config_to_yaml(config)}
    written = save_weights(arguments.output, weights, files, started_from=origin)
    print(
        f"{written}: {sum(w.numel() for w in weights.values()):,} parameters, weights only: start runs with init.from"
    )
    print(describe_check(dense.config, config))
    if drawn:
        routers = sorted({name.partition(".router.")[0] for name in drawn})
        print(f"routers of {', '.join(routers)}: drawn from run.seed = {config.run.seed}")
    if arguments.data:
        measure(written, dense, arguments.data, arguments.sequences)


def measure(written: Path, dense: Source, data: str, sequences: int) -> None:
    """Print the losses of the original and of what was `written` beside that of a uniform guess."""
    import math
    from dataclasses import replace

    from megamor.evaluate.loss import dataset_losses
    from megamor.interop.depth import model_of
    from megamor.load import load_model

    after = load_model(written)
    before = replace(
        after,
        config=replace(dense.config, data=after.config.data),
        model=model_of(dense.config, dense.weights).to(after.device),
    )
    losses = [
        dataset_losses(each, data, sequences=sequences, batch_size=4, modes=("causal",))["loss_causal"]
        for each in (before, after)
    ]
    print(
        f"loss on {sequences} sequences of {data} at most, nats/token: original {losses[0]:.3f}, converted "
        f"{losses[1]:.3f}, uniform guess {math.log(dense.config.model.vocab_size):.3f}"
    )
