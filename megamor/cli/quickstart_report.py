"""What the quickstart's network has learned and saved: n-gram models of the same tokens, and the full depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from megamor.data.loader import open_validation_sets
from megamor.evaluate.floors import seen_windows, validation_windows
from megamor.evaluate.ngram import NGramModel
from megamor.evaluate.savings import measure_savings
from megamor.load import load_model
from megamor.progress import plain_console

ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}
SAVINGS_BATCH = 8
SAVINGS_SEQUENCES = 16


def make_report(checkpoint: Path, network: Mapping[str, float], validation_name: str, sequences: int) -> dict[str, Any]:
    """Compute all figures of the run. `network` holds the losses that `megamor evaluate` measured on `sequences`."""
    loaded = load_model(checkpoint, "cpu")
    assert loaded.step is not None
    config = replace(loaded.config, data=replace(loaded.config.data, tokenizer=str(loaded.tokenizer_path)))
    data = open_validation_sets(config.data, vocab_size=config.model.vocab_size)[validation_name]
    seen, held_out = seen_windows(config, loaded.step), validation_windows(data, sequences)
    floors = {order: NGramModel.fit(seen, n, config.model.vocab_size).nll(held_out) for order, n in ORDERS.items()}
    return {
        "step": loaded.step,
        "tokens_seen": seen.shape[0] * (seen.shape[1] - 1),
        "network": network,
        "floors": floors,
        "bits_per_byte": network["bits_per_byte_causal"],
        "beats_bigram_by": floors["bigram"] - network["loss_causal"],
        "distance_to_trigram": network["loss_causal"] - floors["trigram"],
        "savings": measure_savings(loaded.model, data.batches(0, 1, SAVINGS_BATCH, SAVINGS_SEQUENCES)),
    }


def show_report(report: Mapping[str, Any]) -> None:
    """Print the comparison as a table, what the network has learned, and what routing saves."""
    console = plain_console()
    table = Table(title=f"validation loss after {report['tokens_seen']:,} tokens")
    table.add_column("model")
    table.add_column("nats/token", justify="right")
    table.add_column("perplexity", justify="right")
    network = report["network"]
    rows = {order: report["floors"][order] for order in ORDERS}
    rows["network, top-k routing (looks ahead)"] = network["loss_topk"]
    rows["network, causal routing"] = network["loss_causal"]
    for label, loss in rows.items():
        style = "bold" if "causal" in label else ""
        table.add_row(label, f"{loss:.4f}", f"{math.exp(loss):.1f}", style=style)
    console.print(table)
    console.print(f"{report['bits_per_byte']:.3f} bits per byte with causal routing")
    gain, distance = report["beats_bigram_by"], report["distance_to_trigram"]
    verdict = f"better than the bigram by {gain:.3f}" if gain > 0 else f"WORSE than the bigram by {-gain:.3f}"
    side = f"{distance:.3f} behind" if distance > 0 else f"{-distance:.3f} ahead of"
    console.print(f"the network is {verdict} nats/token, and {side} the trigram", style="bold")
    savings = report["savings"]
    console.print(
        f"routing gives a token {network['mean_depth_causal']:.2f} recursions on average: a forward pass executes "
        f"{savings['flops_per_token'] / 1e6:.2f} MFLOPs per token, {savings['flops_ratio']:.0%} of the same model at "
        f"full depth, in {savings['time_ratio']:.0%} of its time",
        style="bold",
    )
