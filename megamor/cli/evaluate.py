"""Validation loss of a checkpoint: `megamor evaluate --checkpoint runs/x/checkpoints/latest --data x_val`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from megamor.data import open_validation_sets
from megamor.errors import user_errors
from megamor.evaluate.loss import modes_of, perplexity, summed_loss
from megamor.load import LoadedModel, load_model

EXAMPLE = """\
example:
  megamor evaluate --checkpoint runs/quickstart/checkpoints/latest --data runs/quickstart/data/stdlib_val

Two losses are reported for routers that look ahead in training: top-k is the routing of training, which sees the
future and can't be used to generate; causal is the inference rule, and the only one to quote. Their gap says how
well the router has learned to decide without looking ahead.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megamor.evaluate",
        description="Validation loss of a checkpoint, per token, under each way of routing.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, `latest`, a run's or an export's directory")
    parser.add_argument("--data", required=True, nargs="+", help="prefixes of .bin/.idx pairs")
    parser.add_argument("--sequences", type=int, help="how many windows to measure (default: all)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at a time (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser.parse_args(argv)


def evaluate(loaded: LoadedModel, prefix: str, sequences: int | None, batch_size: int) -> dict[str, float]:
    """Losses (nats per token), perplexities and mean depths of one data set."""
    tokenizer = loaded.config.data.tokenizer and str(loaded.tokenizer_path)
    settings = replace(loaded.config.data, validation={prefix: prefix}, tokenizer=tokenizer)
    data = open_validation_sets(settings, vocab_size=loaded.config.model.vocab_size)[prefix]
    figures: dict[str, float] = {}
    for mode in modes_of(loaded.model):
        batches = data.batches(0, 1, batch_size, sequences)
        total = summed_loss(loaded.model, track(list(batches), f"{prefix} ({mode})"), mode, loaded.device)
        loss, tokens, recursions = total.tolist()
        figures["tokens"] = tokens
        figures[f"loss_{mode}"] = loss / tokens
        figures[f"perplexity_{mode}"] = perplexity(loss / tokens)
        figures[f"mean_depth_{mode}"] = recursions / tokens
    if "loss_topk" in figures:
        figures["gap"] = figures["loss_causal"] - figures["loss_topk"]
    return figures


def show(results: dict[str, dict[str, float]], title: str) -> None:
    """Print the figures as a table, a row for each data set and way of routing."""
    table = Table(title=title)
    for column in ("data", "routing", "loss (nats/token)", "perplexity", "mean depth", "tokens"):
        table.add_column(column, justify="left" if column in ("data", "routing") else "right")
    for prefix, figures in results.items():
        for mode in ("topk", "causal"):
            if f"loss_{mode}" in figures:
                values = [figures[f"{name}_{mode}"] for name in ("loss", "perplexity", "mean_depth")]
                loss, ppl, depth = values
                table.add_row(prefix, mode, f"{loss:.4f}", f"{ppl:.2f}", f"{depth:.2f}", f"{figures['tokens']:,.0f}")
    Console().print(table)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = parse_arguments(argv)
    loaded = load_model(arguments.checkpoint, arguments.device)
    results = {prefix: evaluate(loaded, prefix, arguments.sequences, arguments.batch_size) for prefix in arguments.data}
    show(results, loaded.origin)
    if arguments.json:
        single = next(iter(results.values())) if len(results) == 1 else results
        arguments.json.write_text(json.dumps(single, indent=1) + "\n")


if __name__ == "__main__":
    main()
