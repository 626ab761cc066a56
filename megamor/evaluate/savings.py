"""Measure what routing saves: a model against the same model with every token at full depth."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from statistics import median

import torch

from megamor.config import FixedDepthConfig
from megamor.data.loader import MicroBatch
from megamor.model import Transformer, build_model
from megamor.model.flops import executed_flops


def at_full_depth(model: Transformer) -> Transformer:
    """Return a model with the weights of `model`, not copied, that sends every token through all recursions."""
    full = build_model(replace(model.config, router=FixedDepthConfig()), device="meta")
    weights = model.state_dict()
    full.load_state_dict({name: weights[name] for name in full.state_dict()}, assign=True)
    return full.eval()


def measure_savings(model: Transformer, batches: Iterable[MicroBatch], rounds: int = 4) -> dict[str, float]:
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
        # These two passes are a warm-up, so their times don't count.
        flops += _forward(model, batch)[0]
        full_flops += _forward(full, batch)[0]
        for _ in range(rounds):
            ratios.append(_forward(model, batch)[1] / _forward(full, batch)[1])
        tokens += batch.num_tokens
    return {
        "flops_per_token": flops / tokens,
        "full_depth_flops_per_token": full_flops / tokens,
        "flops_ratio": flops / full_flops,
        "time_ratio": median(ratios),
    }


@torch.no_grad()
def _forward(model: Transformer, batch: MicroBatch) -> tuple[float, float]:
    """FLOPs executed in a forward pass, and its seconds."""
    arguments = batch.arguments(model.embed.weight.device)
    started = time.perf_counter()
    out = model(**arguments, mode="causal")
    out.loss_sum.item()  # waits for an accelerator to finish
    seconds = time.perf_counter() - started
    work = [] if out.work is None else out.work.tolist()
    shape, probes = batch.inputs.shape, float(out.probes)
    flops = executed_flops(model.config, shape[0], work, shape[1], float(out.pairs), batch.num_tokens, probes)
    return flops.forward, seconds
