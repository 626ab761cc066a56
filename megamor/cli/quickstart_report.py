"""What the quickstart's network has learned, beside count-based models of exactly the tokens that it has seen."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from megamor.checkpoint import open_checkpoint
from megamor.config import Config, config_from_yaml
from megamor.data import TrainingData, open_validation_sets
from megamor.evaluate.ngram import NGramModel

ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}


def seen_windows(config: Config, steps: int) -> NDArray[np.int64]:
    """The training windows [n, S + 1] of the first `steps` optimizer steps."""
    data = TrainingData.open(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    rows = data.samples(0, steps * config.train.global_batch_size)
    return np.concatenate((rows.inputs[:, :1], rows.labels), axis=1)


def validation_windows(config: Config, name: str, sequences: int) -> NDArray[np.int64]:
    """The windows that `megamor.evaluate --sequences` measures."""
    data = open_validation_sets(config.data, vocab_size=config.model.vocab_size)[name]
    batches = data.batches(0, 1, 1, sequences)
    windows = np.concatenate([np.concatenate((b.inputs[:, :1], b.labels), axis=1) for b in batches])
    return windows[(windows >= 0).all(1)]


def floors(config: Config, steps: int, name: str, sequences: int) -> dict[str, float]:
    """Losses (nats per token) of unigram, bigram and trigram, and bytes per token of the validation windows."""
    seen, held_out = seen_windows(config, steps), validation_windows(config, name, sequences)
    figures = {order: NGramModel.fit(seen, n, config.model.vocab_size).nll(held_out) for order, n in ORDERS.items()}
    assert config.data.tokenizer is not None
    tokenizer = Tokenizer.from_file(config.data.tokenizer)
    # One character of a byte-level token's name stands for one byte.
    lengths = np.array([len(tokenizer.id_to_token(i) or "") for i in range(config.model.vocab_size)])
    figures["bytes_per_token"] = float(lengths[held_out[:, 1:]].mean())
    return figures


def make_report(checkpoint: Path, evaluation: Path, name: str, sequences: int) -> dict[str, Any]:
    """All figures of the run. `evaluation` is what `megamor.evaluate --json` wrote for the same sequences."""
    started = time.perf_counter()
    opened = open_checkpoint(checkpoint)
    config = config_from_yaml(opened.config_yaml, str(opened.directory))
    config = replace(config, data=replace(config.data, tokenizer=str(opened.tokenizer_path)))
    network = json.loads(evaluation.read_text())
    figures = floors(config, opened.step, name, sequences)
    return {
        "step": opened.step,
        "tokens_seen": opened.trainer_state.tokens_seen,
        "network": network,
        "floors": {order: figures[order] for order in ORDERS},
        "bits_per_byte": network["loss_causal"] / math.log(2) / figures["bytes_per_token"],
        "beats_bigram_by": figures["bigram"] - network["loss_causal"],
        "distance_to_trigram": network["loss_causal"] - figures["trigram"],
        "floor_seconds": time.perf_counter() - started,
    }


def show_report(report: dict[str, Any], console: Console) -> None:
    """Print the comparison and the verdict."""
    table = Table(title=f"validation loss after {report['tokens_seen']:,} tokens")
    table.add_column("model")
    table.add_column("nats/token", justify="right")
    table.add_column("perplexity", justify="right")
    rows = {"unigram": report["floors"]["unigram"], "bigram": report["floors"]["bigram"]}
    rows["trigram"] = report["floors"]["trigram"]
    rows["network, top-k routing (sees the future)"] = report["network"]["loss_topk"]
    rows["network, causal routing"] = report["network"]["loss_causal"]
    for label, loss in rows.items():
        style = "bold" if "causal" in label else ""
        table.add_row(label, f"{loss:.4f}", f"{math.exp(loss):.1f}", style=style)
    console.print(table)
    console.print(f"{report['bits_per_byte']:.3f} bits per byte under causal routing")
    gain, distance = report["beats_bigram_by"], report["distance_to_trigram"]
    verdict = f"better than the bigram by {gain:.3f}" if gain > 0 else f"WORSE than the bigram by {-gain:.3f}"
    side = f"{distance:.3f} behind" if distance > 0 else f"{-distance:.3f} ahead of"
    console.print(f"the network is {verdict} nats/token, and {side} the trigram", style="bold")
