"""Shares of the sources of a blend, and how often a run will read each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamor.config.batches import BatchSchedule
from megamor.config.schema import DataConfig, SourceConfig
from megamor.data.phases import SampleOrder
from megamor.data.source import Source


def shares(config: DataConfig, sizes: Sequence[int]) -> list[float]:
    """Weight of each source of `config.train`, of `sizes` tokens: its share of the samples, up to a common factor.

    Budgets of tokens are weights as they are. A temperature T multiplies weights by size^(1/T): T = 1 reads all sources
    equally often, a higher one evens the shares out.
    """
    weights = [_weight(source) for source in config.train]
    if config.blend_temperature is None:
        return weights
    return [weight * size ** (1 / config.blend_temperature) for weight, size in zip(weights, sizes, strict=True)]


def _weight(source: SourceConfig) -> float:
    return source.weight if source.tokens is None else source.tokens


@dataclass(frozen=True)
class SourceUse:
    """What a run takes from one source. `repeats_in_step` is the first step (from 1) that needs a second epoch."""

    key: str
    share: float
    tokens: int
    epochs: float
    repeats_in_step: int | None


def forecast(
    order: SampleOrder,
    weights: Mapping[str, float],
    batches: BatchSchedule,
    epoch_tokens: Mapping[str, int],
    *,
    step: int,
    sample: int,
    total_steps: int,
) -> list[SourceUse]:
    """The use of each source of `weights` by the end of a run that is at `step` and `sample`.

    Pure arithmetic: a few evaluations of the blend for each stretch of equal batches.
    """
    repeats: dict[str, int] = {}
    order = order.changed_at(sample, batches.at(step).global_batch_size, batches.at(step).seq_len, weights)
    for first, end, shape in batches.stages(step, total_steps):
        order = order.changed_at(sample, shape.global_batch_size, shape.seq_len, weights)
        after = order.consumed_at(sample + (end - first) * shape.global_batch_size)
        for key in weights.keys() - repeats.keys():
            if after[key] > epoch_tokens[key]:
                low, high = first, end  # after `high` steps the source has been used up, after `low` perhaps
                while high - low > 1:
                    middle = (low + high) // 2
                    used = order.consumed_at(sample + (middle - first) * shape.global_batch_size)[key]
                    low, high = (low, middle) if used > epoch_tokens[key] else (middle, high)
                repeats[key] = high
        sample += (end - first) * shape.global_batch_size
    tokens = order.consumed_at(sample)
    total = sum(weights.values())
    return [
        SourceUse(key, weights[key] / total, tokens[key], tokens[key] / epoch_tokens[key], repeats.get(key))
        for key in weights
    ]


def describe_use(
    uses: Sequence[SourceUse], sources: Mapping[str, Source], names: Mapping[str, str], config: DataConfig
) -> list[str]:
    """What a run will read, a line for each source, and a warning for each that isn't enough for it."""
    lines, warnings = [], []
    width = max(map(len, names.values()))
    for use in uses:
        source, name = sources[use.key], names[use.key]
        padding = f", {1 - source.num_pairs / source.epoch_tokens:.2%} padding" if config.packing != "stream" else ""
        lines.append(
            f"data  {name:<{width}}  {use.share:7.2%} of the samples, {use.tokens:,} tokens, {use.epochs:.2f} epochs "
            f"of {source.epoch_tokens:,}{padding}"
        )
        if use.repeats_in_step is not None and config.on_exhausted == "repeat":
            warnings.append(
                f"warning: {name} is used up in step {use.repeats_in_step:,} and then read again, {use.epochs:.2f} "
                "times in the whole run (data.on_exhausted: stop ends the run there)"
            )
        elif use.repeats_in_step is not None:
            warnings.append(
                f"warning: the run ends early, after step {use.repeats_in_step - 1:,}, because {name} is used up then "
                f"(data.on_exhausted: stop; the whole run would read it {use.epochs:.2f} times). The learning rate "
                f"hasn't finished its schedule by then unless train.max_steps is {use.repeats_in_step - 1}"
            )
    return lines + warnings
