"""Figures of a trained router: how deep tokens go, what depth correlates with, and what each recursion does to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamor.analysis.classes import CLASSES, installed_tagger, parts_of_speech, token_classes
from megamor.analysis.observe import Observations, Progress, StageView, observe
from megamor.analysis.statistics import Array, Bootstrap, agreement, grouped, interval, row_means, spearman
from megamor.codec import TextCodec, texts_of_tokens
from megamor.config.segments import Segment, max_depth, stages
from megamor.data.shard import TokenShard
from megamor.errors import CheckpointError, DataError
from megamor.evaluate.depth_map import DepthMap
from megamor.evaluate.loss import modes_of, open_validation_set
from megamor.load import LoadedModel
from megamor.model import Transformer
from megamor.origin import describe_origin

SCHEMA = "megamor-analysis/1"
PASSAGE = 128
"""Tokens of a passage that is shown."""
CURVE, BARS = 12, 40
"""Points of a curve of mean depths, bars of a histogram."""
FEW = 20
"""Documents below which intervals are announced as rough."""


@dataclass(frozen=True)
class Analysis:
    """`figures` are the contents of the JSON file; `passages` are depth maps by what they were chosen for."""

    figures: dict[str, Any]
    passages: dict[str, DepthMap]


def analyze(
    loaded: LoadedModel,
    prefix: str,
    *,
    against: Sequence[LoadedModel] = (),
    sequences: int | None = 256,
    batch_size: int = 16,
    frequencies: str | None = None,
    resamples: int = 1000,
    watch: Progress = lambda batches, total, description: batches,
) -> Analysis:
    """Analyse a trained model on the data set `prefix`, in windows spread evenly over it.

    Args:
        against: other models, whose depths are compared with this one's.
        frequencies: the data set in which tokens are counted, such as the training data (default: all of `prefix`).
        resamples: of the bootstrap.

    Raises:
        CheckpointError: a model isn't trained.
        DataError: the data doesn't exist, is damaged, or doesn't belong to a model.
    """
    data = open_validation_set(loaded, prefix)
    counts = token_counts(open_validation_set(loaded, frequencies).shard if frequencies else data.shard)
    seen = {mode: observe(loaded.model, data, mode, sequences, batch_size, watch) for mode in modes_of(loaded.model)}
    causal = seen["causal"]
    refuse_untrained(loaded, causal)
    try:
        codec: TextCodec | None = loaded.codec()
    except CheckpointError:  # saved without a tokenizer
        codec = None
    sample, compared = Sample.of(causal, counts, codec, resamples), []
    if "topk" in seen:
        compared.append({"with": "its own top-k depths", **sample.agreement(causal.depth, seen["topk"].depth)})
    for other in against:
        found = observe(other.model, open_validation_set(other, prefix), "causal", sequences, batch_size, watch)
        if not np.array_equal(found.ids, causal.ids):
            raise DataError(f"{other.origin} reads other windows than {loaded.origin}: their data.seq_len differ")
        refuse_untrained(other, found)
        compared.append({"with": other.origin, **sample.agreement(causal.depth, found.depth)})
    figures = {
        "schema": SCHEMA,
        "origin": describe_origin(loaded.device),
        "checkpoint": {
            "name": loaded.name, "directory": str(loaded.directory), "step": loaded.step,
            "exit": None if loaded.model.exit is None else str(loaded.model.exit),
        },
        "data": {
            "prefix": prefix, "frequencies": frequencies or prefix, "windows": int(causal.window[-1]) + 1,
            "tokens": len(causal.ids), "documents": sample.documents, "resamples": resamples,
            "unigram_entropy": unigram_entropy(causal.labels),
        },
        "notes": [*sample.notes, *constant_depth(causal)],
        "modes": {mode: mode_figures(loaded.model, found, sample) for mode, found in seen.items()},
        "agreement": compared,
    }  # fmt: skip
    return Analysis(figures, choose_passages(causal, codec, max_depth(loaded.config)) if codec else {})


def token_counts(shard: TokenShard, block: int = 2**24) -> Array:
    """How often each id occurs, [largest id + 1]."""
    counts = np.zeros(0, np.int64)
    for start in range(0, shard.num_tokens, block):
        new = np.bincount(shard.tokens[start : start + block], minlength=len(counts))
        new[: len(counts)] += counts
        counts = new
    return counts


def unigram_entropy(tokens: Array) -> float:
    """Entropy of `tokens` [n] in nats: the loss of a model that knows how frequent they are and nothing else."""
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    # A sample looks less varied than the text that it is from; the second term corrects that (Miller 1955).
    return float(-(p * np.log(p)).sum() + (len(p) - 1) / (2 * len(tokens)))


def refuse_untrained(loaded: LoadedModel, found: Observations) -> None:
    """Refuse a model that predicts no better than token frequencies do.

    Raises:
        CheckpointError: with the two numbers.
    """
    loss, entropy = float(found.nll.mean()), unigram_entropy(found.labels)
    if not loss < entropy:
        raise CheckpointError(
            f"{loaded.origin} isn't trained: its loss of {loss:.4f} nats/token on this text is no better than "
            f"{entropy:.4f}, the entropy of the token frequencies, so its depths mean nothing. Train it further, or "
            "give text of the kind that it was trained on"
        )


def constant_depth(found: Observations) -> list[str]:
    """A sentence, if there is nothing that a depth could go along with."""
    if not found.stages:
        return ["The model has no recursion: every token has the same depth, and there is nothing to correlate."]
    depths = np.unique(found.depth).tolist()
    same = f"Every token takes {depths[0]} recursions, whatever it is: there is nothing to correlate."
    return [same] if len(depths) == 1 else []


@dataclass(frozen=True)
class Sample:
    """The analysed tokens: the `unit` [N] of each for the bootstrap, its `frequency` [N], and its classes [N] by name.

    `notes` are what a reader of the figures must know.
    """

    bootstrap: Bootstrap
    unit: Array
    documents: int
    frequency: Array
    classes: Mapping[str, Array]
    notes: list[str]

    @classmethod
    def of(cls, found: Observations, counts: Array, codec: TextCodec | None, resamples: int) -> Sample:
        """Classify the tokens and draw the bootstrap's resamples."""
        documents, notes, classes = len(np.unique(found.document)), [], dict[str, Array]()
        unit = np.unique(found.document if documents > 1 else found.window, return_inverse=True)[1]
        if documents < FEW:
            rough = "over its windows, and too narrow" if documents == 1 else "rough"
            notes.append(f"The number of documents in the text is {documents}: intervals are {rough}.")
        if codec is None:
            notes.append("The model was saved without a tokenizer: there are no classes of tokens and no passages.")
        else:
            classes["class"] = np.array(CLASSES)[token_classes(codec, found.ids, found.begins)]
            if (tagger := installed_tagger()) is not None:
                windows = np.split(found.ids, np.flatnonzero(np.diff(found.window)) + 1)
                classes[f"part of speech ({tagger[0]})"] = np.array(parts_of_speech(codec, tagger[1], windows))
        frequency = np.append(counts, 0)[np.minimum(found.ids, len(counts))]
        return cls(Bootstrap.of(int(unit.max()) + 1, resamples), unit, documents, frequency, classes, notes)

    def agreement(self, a: Array, b: Array) -> dict[str, Any]:
        """How far depths `a` and `b` [N] agree."""
        return agreement(self.bootstrap, self.unit, a, b)

    def depth_figures(self, depth: Array, found: Observations) -> dict[str, Any]:
        """Mean of `depth` [N], its rank correlations with properties of the tokens, and means along these."""
        follows = ~found.begins  # whose token before is known
        everywhere = np.ones_like(follows)
        properties = {
            "position": (found.position, everywhere),
            "frequency": (self.frequency, everywhere),
            "loss": (found.nll, everywhere),
            "entropy": (found.entropy, everywhere),
            "surprisal": (np.append(0.0, found.nll[:-1]), follows),
            "previous depth": (np.append(0, depth[:-1]), follows),
        }
        mean = self.means(np.zeros_like(self.unit), ["all tokens"], depth, self.unit)[0]
        correlations, curves = {}, {}
        for name, (values, chosen) in properties.items():
            values, own, unit = values[chosen], depth[chosen], self.unit[chosen]
            rho = interval(spearman(self.bootstrap.tables(unit, grouped(values), own)))
            correlations[name] = {**rho, "tokens": len(own)}
            group = grouped(values, CURVE)
            middles = np.bincount(group, values) / np.bincount(group)
            curves[name] = self.means(group, middles.tolist(), own, unit)
        by_class = {}
        for name, kinds in self.classes.items():
            labels, group = np.unique(kinds, return_inverse=True)
            by_class[name] = self.means(group, labels.tolist(), depth, self.unit)
        return {"mean_depth": mean, "correlations": correlations, "curves": curves, "classes": by_class}

    def means(self, group: Array, labels: Sequence[Any], depth: Array, unit: Array) -> list[dict[str, Any]]:
        """Mean depth of each group, with its interval."""
        means, sizes = row_means(self.bootstrap.tables(unit, group, depth)), np.bincount(group)
        return [{"at": label, "tokens": int(sizes[i]), **interval(means[:, i])} for i, label in enumerate(labels)]


def mode_figures(model: Transformer, found: Observations, sample: Sample) -> dict[str, Any]:
    """What one way of routing gives, for each stage and, where there are several, for the sum of their depths."""
    own = {}
    for segment in stages(model.config):
        view = found.stages[segment.prefix]
        own[segment.name] = stage_figures(segment, view, model) | sample.depth_figures(view.depth, found)
    if len(own) > 1:
        own["all"] = {"depths": np.bincount(found.depth).tolist(), **sample.depth_figures(found.depth, found)}
    return {"loss": float(found.nll.mean()), "entropy": float(found.entropy.mean()), "stages": own}


def stage_figures(segment: Segment, view: StageView, model: Transformer) -> dict[str, Any]:
    """Histograms of a stage, and what its recursions do to hidden states.

    `depths` counts tokens by the recursions that they took, `halting` by those whose output has a weight. `recursions`
    begins with the stage's input (0): tokens that took it, RMS and logit-lens loss of all tokens' states after it, and
    the mean change of that loss among the tokens that took it.
    """
    took, rms, lens = (np.concatenate(parts, 1) for parts in (view.took, view.rms, view.lens))
    took = np.vstack((np.ones_like(took[:1]), took))
    changes = np.diff(lens, axis=0, prepend=lens[:1])
    states = zip(took, rms, lens, changes, strict=True)
    size, rule = len(segment.schedule) + 1, model.stages[segment.prefix].router.inference_rule
    return {
        "router": segment.config.router.kind,
        "rule": {"name": rule.name, "threshold": rule.threshold},
        "num_recursions": size - 1,
        "depths": np.bincount(took[1:].sum(0), minlength=size).tolist(),
        "halting": np.bincount(view.depth, minlength=size).tolist(),
        "recursions": [
            {
                "recursion": r, "tokens": int(taken.sum()), "rms": norm.mean(), "lens_loss": loss.mean(),
                "lens_change": change[taken].mean() if taken.any() else None,
            }
            for r, (taken, norm, loss, change) in enumerate(states)
        ],
        "gates": histograms(view.gates),
        "scores": histograms(view.scores),
    }  # fmt: skip


def histograms(found: Mapping[tuple[str, int], Sequence[Array]]) -> list[dict[str, Any]]:
    """Mean, standard deviation and histogram of values by name and recursion (from 1), where there are any."""
    results = []
    for (name, recursion), parts in sorted(found.items()):
        values = np.concatenate(parts).astype(np.float64)
        if len(values):
            counts, edges = (x.tolist() for x in np.histogram(values, BARS))
            moments = {"mean": values.mean(), "deviation": values.std()}
            results.append({"name": name, "recursion": recursion + 1, **moments, "edges": edges, "counts": counts})
    return results


def choose_passages(found: Observations, codec: TextCodec, num_recursions: int) -> dict[str, DepthMap]:
    """The passages with the widest, the median and the narrowest spread (standard deviation) of depths.

    Windows are divided into passages of PASSAGE tokens; what is left at their ends doesn't count.
    """
    if constant_depth(found):
        return {}
    sizes = np.bincount(found.window)
    length = min(PASSAGE, int(sizes.max()))
    starts = zip(np.cumsum(sizes) - sizes, sizes // length, strict=True)
    passages = [slice(s + i * length, s + (i + 1) * length) for s, number in starts for i in range(number)]
    passages.sort(key=lambda passage: float(found.depth[passage].std()))
    chosen = {"widest": passages[-1], "median": passages[len(passages) // 2], "narrowest": passages[0]}
    texts = {name: texts_of_tokens(codec, found.ids[passage].tolist()) for name, passage in chosen.items()}
    return {n: DepthMap(texts[n], found.depth[passage].tolist(), num_recursions) for n, passage in chosen.items()}
