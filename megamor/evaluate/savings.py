"""Measure what routing saves: a model against the same model with every token at full depth."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from statistics import median

import torch

from megamor.config import FixedDepthConfig
from megamor.evaluate.loss import Batch
from megamor.model import ModelOutput, Transformer, build_model
from megamor.model.flops import executed_flops


def at_full_depth(model: Transformer) -> Transformer:
    """Return a copy of `model` that sends every token through all recursions and has no router weights."""
    full = build_model(replace(model.config, router=FixedDepthConfig()), device="meta")
    full.to_empty(device=model.embed.weight.device)
    weights = model.state_dict()
    full.load_state_dict({name: weights[name] for name in full.state_dict()})
    return full.eval()


def measure_savings(model: Transformer, batches: Iterable[Batch], rounds: int = 4) -> dict[str, float]:
    """Compare forward passes under the inference rule with those at full depth.

    The two models take turns on every batch, so that a change in the machine's load affects both.

    Returns:
        `flops_per_token` and `full_depth_flops_per_token`, executed in the forward pass; `flops_ratio`, the first over
        the second; and `time_ratio`, the median over batches and rounds of the two times' ratio.
    """
    full = at_full_depth(model)
    flops = full_flops = tokens = 0.0
    ratios = []
    for batch in batches:
        # The first pass of each model warms up and counts; operations depend on routing only, not on the round.
        flops += _forward_flops(model, batch)
        full_flops += _forward_flops(full, batch)
        tokens += batch.inputs.numel()
        ratios += [_forward_seconds(model, batch) / _forward_seconds(full, batch) for _ in range(rounds)]
    return {
        "flops_per_token": flops / tokens,
        "full_depth_flops_per_token": full_flops / tokens,
        "flops_ratio": flops / full_flops,
        "time_ratio": median(ratios),
    }


@torch.no_grad()
def _forward(model: Transformer, batch: Batch) -> ModelOutput:
    device = model.embed.weight.device
    documents = None if batch.documents is None else batch.documents.to(device)
    output: ModelOutput = model(batch.inputs.to(device), batch.labels.to(device), mode="causal", documents=documents)
    return output


def _forward_flops(model: Transformer, batch: Batch) -> float:
    out = _forward(model, batch)
    assert out.pairs is not None
    work = [] if out.work is None else [(tokens, pairs) for tokens, pairs in out.work.tolist()]
    num_sequences, seq_len = batch.inputs.shape
    return executed_flops(model.config, num_sequences, work, seq_len=seq_len, pairs=float(out.pairs)).forward


def _forward_seconds(model: Transformer, batch: Batch) -> float:
    started = time.perf_counter()
    out = _forward(model, batch)
    assert out.loss_sum is not None
    out.loss_sum.item()  # waits for an accelerator to finish
    return time.perf_counter() - started
