"""Loss of a model over a validation set, with the routing of training and with the inference rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megamor.data.loader import open_validation_sets
from megamor.data.meta import end_of_text
from megamor.errors import DataError
from megamor.model import ModelOutput, Transformer
from megamor.model.loss import IGNORE
from megamor.routing import Mode

if TYPE_CHECKING:
    from megamor.data.loader import MicroBatch
    from megamor.load import LoadedModel


def modes_of(model: Transformer) -> tuple[Mode, ...]:
    """List the routing modes to measure: two for routers that look ahead in training, one for the others."""
    looks_ahead = model.stage is not None and not model.stage.router.causal_in_training
    return ("topk", "causal") if looks_ahead else ("causal",)


@torch.no_grad()
def summed_loss(
    model: Callable[..., ModelOutput],
    batches: Iterable[MicroBatch],
    mode: Mode,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Sum over all tokens, [3] in fp64 on `device`: negative log-likelihood in nats, tokens, recursions taken.

    These are sums, not means, so that results of several ranks or batches can be added. Each forward pass runs inside
    a new `context()`, such as autocast.
    """
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        with context():
            arguments = batch.arguments(device)
            out = model(**arguments, mode=mode)
        assert out.loss_sum is not None
        assert out.num_tokens is not None
        total[0] += out.loss_sum
        total[1] += out.num_tokens
        if out.depth is not None:
            total[2] += (out.depth * (arguments["labels"] != IGNORE)).sum()
    return total


def perplexity(loss: float) -> float:
    """Return exp(loss in nats), or infinity where that overflows, as it can early in a bad run."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def dataset_losses(
    loaded: LoadedModel,
    prefix: str,
    *,
    sequences: int | None = None,
    batch_size: int = 16,
    watch: Callable[..., Iterable[MicroBatch]] = lambda batches, total, description: batches,
) -> dict[str, float]:
    """Measure a model on the data set `prefix` (.bin/.idx), in each of its routing modes.

    Args:
        sequences: how many sequences to measure, evenly spread over the set; None for all.
        watch: wraps the batches of one mode to show progress, given also their number and a text, as `rich.progress`
            does.

    Returns:
        `tokens`; for each mode (`topk`, `causal`) `loss_<mode>` in nats per token, `perplexity_<mode>`, and
        `mean_depth_<mode>` in recursions per token; and `gap`, causal loss minus top-k loss, where both exist.

    Raises:
        DataError: the data set is missing, damaged, or was written with another tokenizer or end of text.
    """
    tokenizer = loaded.config.data.tokenizer and str(loaded.tokenizer_path)
    settings = replace(loaded.config.data, validation={prefix: prefix}, tokenizer=tokenizer)
    data = open_validation_sets(settings, vocab_size=loaded.config.model.vocab_size)[prefix]
    ours, theirs = loaded.end_of_text, end_of_text([prefix], contained=True)
    if ours and theirs and ours != theirs:
        raise DataError(
            f"the texts of {prefix} end with {theirs.token} (id {theirs.id}), those that {loaded.origin} was trained "
            f"on with {ours.token} (id {ours.id}); preprocess the data with --eod-token '{ours.token}'"
        )
    num_batches = -(-min(data.num_sequences, sequences or data.num_sequences) // batch_size)
    figures: dict[str, float] = {}
    for mode in modes_of(loaded.model):
        what = f"{Path(prefix).name}, {mode}"
        batches = watch(data.batches(0, 1, batch_size, sequences), total=num_batches, description=what)
        loss, tokens, recursions = summed_loss(loaded.model, batches, mode, loaded.device).tolist()
        figures["tokens"] = tokens
        figures[f"loss_{mode}"] = loss / tokens
        figures[f"perplexity_{mode}"] = perplexity(loss / tokens)
        figures[f"mean_depth_{mode}"] = recursions / tokens
    if "loss_topk" in figures:
        figures["gap"] = figures["loss_causal"] - figures["loss_topk"]
    return figures
