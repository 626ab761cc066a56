"""Loss of a model over a validation set, with the routing of training and with the inference rule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from megamor.config import Config
from megamor.config.segments import stages
from megamor.data.loader import ValidationSet, open_validation_sets
from megamor.data.meta import end_of_text
from megamor.errors import DataError
from megamor.evaluate.groups import by_position, by_source, everything
from megamor.evaluate.kv_curve import bounded_loss
from megamor.evaluate.text_bytes import TextBytes, bits_per_byte, text_bytes
from megamor.model import CacheBound, ModelOutput, Transformer
from megamor.model.flops import Work, executed_flops
from megamor.model.loss import IGNORE
from megamor.routing import Mode

if TYPE_CHECKING:
    from megamor.data.loader import MicroBatch
    from megamor.load import LoadedModel


def modes_of(model: Transformer) -> tuple[Mode, ...]:
    """List the routing modes to measure: two for routers that look ahead in training, one for the others."""
    looks_ahead = any(not stage.router.causal_in_training for stage in model.stages.values())
    return ("topk", "causal") if looks_ahead else ("causal",)


@torch.no_grad()
def summed_loss(
    model: Callable[..., ModelOutput],
    batches: Iterable[MicroBatch],
    mode: Mode,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    watch: Callable[[MicroBatch, ModelOutput], None] | None = None,
) -> Tensor:
    """Sums over all tokens in fp64 on `device`, from which `mean_figures` makes means.

    These are sums, not means, so that results of several ranks or batches can be added. [6]: negative log-likelihood in
    nats, labels, recursions that they took, query-key pairs of a block that sees every token, rows predicted for an
    exit rule, tokens with or without a label. For a model with recursion stages [6 + 4·Nr]: also their `work` [Nr, 2],
    and for each recursion the sum and the number of its gates. Each forward pass runs inside a new `context()`, such as
    autocast. `watch` is given each batch and its result, whose `scores` cost a second product of the head.
    """
    total = torch.zeros(6, dtype=torch.float64, device=device)
    for batch in batches:
        with context():
            arguments = batch.arguments(device)
            out = model(**arguments, mode=mode, score_tokens=watch is not None)
        assert out.loss_sum is not None
        assert out.num_tokens is not None
        assert out.pairs is not None
        recursions = torch.zeros_like(out.num_tokens)
        stage: list[Tensor] = []
        if out.depth is not None and out.work is not None:
            recursions = (out.depth * (arguments["labels"] != IGNORE)).sum()
            gates = [ratio for name, ratio in out.ratios.items() if re.search(r"(^|/)gate_\d+$", name)]
            stage = [*out.work.flatten(), *(part for gate in gates for part in (gate.numerator, gate.denominator))]
        tokens = torch.tensor(batch.num_tokens)
        found = (out.loss_sum, out.num_tokens, recursions, out.pairs, out.probes, tokens, *stage)
        sums = torch.stack([x.to(device, torch.float64) for x in found])
        total = sums + (total if len(total) == len(sums) else 0.0)
        if watch is not None:
            watch(batch, out)
    return total


def mean_figures(config: Config, sums: Tensor) -> dict[str, float]:
    """Figures per token from what `summed_loss` returned.

    Returns:
        `loss` in nats, `mean_depth` in recursions, `flops_per_token` executed in a forward pass, and `gate_<r>`, the
        mean gate of the tokens that take recursion r (from 1), where any does. Loss and `mean_depth` are of the tokens
        that a loss mask lets count, the others of all tokens.

    Raises:
        DataError: no token counts.
    """
    loss, labels, recursions, pairs, probes, tokens, *stage = sums.tolist()
    if not labels:
        raise DataError("no token of the windows measured counts in the loss (loss mask): measure more of the data set")
    half = len(stage) // 2
    work, gates = (list(zip(part[::2], part[1::2], strict=True)) for part in (stage[:half], stage[half:]))
    flops = executed_flops(config, tokens, work, seq_len=1, pairs=pairs, probes=probes).forward
    return {
        "loss": loss / labels,
        "mean_depth": recursions / labels,
        "flops_per_token": flops / tokens,
        **stage_depths(config, tokens, work),
        **{name: total / count for name, (total, count) in zip(gate_names(config), gates, strict=True) if count},
    }


def gate_names(config: Config) -> list[str]:
    """Names of the gates' statistics, in the order of `ModelOutput.work`."""
    return [f"{stage.prefix}gate_{r}" for stage in stages(config) for r in range(1, len(stage.schedule) + 1)]


def stage_depths(config: Config, tokens: float, work: Work) -> dict[str, float]:
    """`<stage>/mean_depth` of each stage, where there are several."""
    found, rows = stages(config), iter(work)
    depths = {f"{s.prefix}mean_depth": sum(next(rows)[0] for _ in s.schedule) / tokens for s in found}
    return depths if len(found) > 1 else {}


def perplexity(loss: float) -> float:
    """Return exp(loss in nats), or infinity where that overflows, as it can early in a bad run."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def open_validation_set(loaded: LoadedModel, prefix: str) -> ValidationSet:
    """The data set `prefix` (.bin/.idx) in windows of the model's sequence length.

    Raises:
        DataError: it is missing, damaged, or was written with another tokenizer or end of text than the model's.
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
    return data


def dataset_losses(
    loaded: LoadedModel,
    prefix: str,
    *,
    sequences: int | None = None,
    batch_size: int = 16,
    bounds: Sequence[CacheBound] = (),
    modes: Sequence[Mode] | None = None,
    by: Sequence[Literal["position", "source"]] = (),
    watch: Callable[..., Iterable[MicroBatch]] = lambda batches, total, description: batches,
) -> dict[str, Any]:
    """Measure a model on the data set `prefix` (.bin/.idx), in each of its routing modes.

    Args:
        sequences: how many sequences to measure, evenly spread over the set; None for all.
        bounds: caches of keys and values to measure too, decoding through each.
        modes: routing modes to measure; None for those of `modes_of`.
        by: what to break the figures down by (`megamor.evaluate.groups`).
        watch: wraps the batches of one mode to show progress, given also their number and a text, as `rich.progress`
            does.

    Returns:
        `tokens`, and the `bytes` of their text (None without a tokenizer); for each mode (`topk`, `causal`) the names
        of `mean_figures`, such as `loss_<mode>`, with `perplexity_<mode>`, `accuracy_<mode>` (how often the likeliest
        token is the next one), `bits_per_byte_<mode>` (or None), and lists `by_<what>_<mode>`; `gap`, causal loss minus
        top-k loss, where both exist; and `exit_<rule>`, the threshold of the exit rule that the causal mode obeyed,
        where the model has one. With `bounds`, `kv_curve` is a list of `budget`, `loss` and `kv_bytes` (see
        `bounded_loss`), first without a budget.

    Raises:
        DataError: what `open_validation_set` and `by_source` raise.
    """
    data, text = open_validation_set(loaded, prefix), text_of(loaded)
    num_batches = -(-min(data.num_sequences, sequences or data.num_sequences) // batch_size)
    figures: dict[str, Any] = {}

    def batches(what: str) -> Iterable[MicroBatch]:
        read = data.batches(0, 1, batch_size, sequences)
        return watch(read, total=num_batches, description=f"{Path(prefix).name}, {what}")

    for mode in modes or modes_of(loaded.model):
        groups = {"": everything()}
        if "position" in by:
            groups["position"] = by_position(loaded.config.data.seq_len)
        if "source" in by:
            groups["source"] = by_source(prefix, data, sequences)
        num_bytes: list[int] = []

        def note(batch: MicroBatch, out: ModelOutput, groups: Any = groups, num_bytes: Any = num_bytes) -> None:
            num_bytes.append(0 if text is None else text.count(batch))
            for group in groups.values():
                group.add(batch, out)

        sums = summed_loss(loaded.model, batches(mode), mode, loaded.device, watch=note)
        figures |= {"tokens": float(sums[1]), "bytes": None if text is None else sum(num_bytes)}
        figures |= {f"{name}_{mode}": value for name, value in mean_figures(loaded.config, sums).items()}
        figures[f"perplexity_{mode}"] = perplexity(figures[f"loss_{mode}"])
        figures[f"accuracy_{mode}"] = groups.pop("").figures()[0]["accuracy"]
        figures[f"bits_per_byte_{mode}"] = bits_per_byte(float(sums[0]), figures["bytes"])
        figures |= {f"by_{what}_{mode}": group.figures() for what, group in groups.items()}
    if {"loss_topk", "loss_causal"} <= figures.keys():
        figures["gap"] = figures["loss_causal"] - figures["loss_topk"]
    if bounds:
        figures["kv_curve"] = [
            {"budget": bound and bound.budget, **bounded_loss(loaded.model, batches("bounded cache"), bound)}
            for bound in (None, *bounds)
        ]
    if (rule := loaded.model.exit) is not None:
        figures[f"exit_{rule.name}"] = rule.threshold
    return figures


def text_of(loaded: LoadedModel) -> TextBytes | None:
    """Counts the bytes of the model's tokens; None if it has no tokenizer."""
    if loaded.config.data.tokenizer is None:
        return None
    return text_bytes(loaded.tokenizer_path, loaded.end_of_text, loaded.config.model.vocab_size)
