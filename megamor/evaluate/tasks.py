"""Downstream tasks through lm-evaluation-harness, in this process.

The harness builds the requests, and its own code computes the metrics; `harness_model` answers the requests with
`Scorer`. Texts are encoded by the model's codec and split into context and continuation as the harness does for models
of transformers, so that figures are those of `lm_eval --model hf` on an export.
"""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from megamor.codec import TextCodec
from megamor.errors import ConfigError, DataError
from megamor.evaluate.scoring import Continuation, Scorer

PAPER: dict[str, tuple[tuple[str, ...], str]] = {
    "LAMBADA": (("lambada_openai",), "acc"),
    "HellaSwag": (("hellaswag",), "acc_norm"),
    "PIQA": (("piqa",), "acc_norm"),
    "WinoGrande": (("winogrande",), "acc"),
    "ARC": (("arc_easy", "arc_challenge"), "acc_norm"),
    "MMLU": (("mmlu_continuation",), "acc"),
}
"""The six columns of the paper's table: the tasks that each is the mean of, and their metric."""
PTB_FILE = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/test/0000.parquet"
PTB: dict[str, Any] = {
    "task": "ptb",
    "dataset_path": "parquet",
    "dataset_kwargs": {"data_files": {"test": PTB_FILE}},
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{sentence}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    "metadata": {"version": 1.0},
}
"""The harness has no Penn Treebank. Its test sentences are one text here, a line each."""
SETS: dict[str, tuple[str, ...]] = {
    "paper": tuple(name for names, _ in PAPER.values() for name in names),
    "superglue": ("super-glue-lm-eval-v1",),
}
"""Names for several tasks, besides the harness's own groups and tags (`glue`, `mmlu` …)."""
GOLD_BITS = "gold_bits_per_byte,none"


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their requests; `loaded` is what the harness's TaskManager makes of them."""

    loaded: Any
    limit: int | None


def load_tasks(
    names: Sequence[str],
    *,
    directory: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    quiet: bool = False,
) -> TaskSet:
    """Load tasks and their documents, and build the requests.

    Args:
        names: of tasks, groups and tags of the harness, YAML files, `ptb`, or names in `SETS`.
        directory: has YAML files of further tasks.
        num_fewshot: examples in front of each question; None: as the task says, else none. Tasks that say 0 keep it.
        limit: how many documents of each task to use, the first ones; None for all.

    Raises:
        ConfigError: lm-eval isn't installed, a task is unknown or runs generated code.
        DataError: the documents of a task can't be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("tasks need lm-evaluation-harness: pip install 'megamor[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wanted = [task for name in dict.fromkeys(names) for task in SETS.get(name, (name,))]
    if directory is not None and not directory.is_dir():
        raise ConfigError(f"--task-path {directory} is not a directory; give the one with the YAML files of the tasks")
    include = None if directory is None else str(directory)
    manager = TaskManager(include_path=include, include_defaults=False)
    if not all(name == "ptb" or name in manager.task_index or Path(name).is_file() for name in wanted):
        manager = TaskManager(include_path=include)  # reads 14,000 files, which takes many seconds
    for name in wanted:
        if name != "ptb" and name not in manager.task_index and not Path(name).is_file():
            near = get_close_matches(name, [*manager.all_tasks, *SETS, "ptb"])
            fix = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists the harness's tasks"
            raise ConfigError(f"task {name} is unknown: {fix} Tasks of your own: a YAML file, or --task-path DIR")
    with redirect_stderr(io.StringIO() if quiet else sys.stderr):
        loaded: Any = {"tasks": {}, "groups": {}}
        for name in wanted:
            try:
                found = manager.load([{**PTB, "process_docs": one_text} if name == "ptb" else name])
                for task in found["tasks"].values():
                    prepare(task, num_fewshot, limit)
            except Exception as error:  # each source of data raises its own
                cause = " ".join(str(error).split())[:300]
                raise DataError(
                    f"the data of task {name} can't be read ({type(error).__name__}: {cause}); without a network, load "
                    "it once where there is one and copy its cache (HF_HOME), or give tasks with local files"
                ) from error
            for kind, own in loaded.items():
                own.update(found[kind])
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise ConfigError(f"tasks that run generated code are not offered: leave out {', '.join(unsafe)}")
    return TaskSet(loaded, limit)


def prepare(task: Any, num_fewshot: int | None, limit: int | None) -> None:
    """Set the examples of `task` as `lm_eval` does, and build its requests once."""
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)  # the harness's default
    task.build_all_requests(limit=limit)
    # Evaluation would build them again each time, which can take longer than a signal may wait.
    task.build_all_requests = lambda **_: None


def one_text(documents: Any) -> Any:
    """All sentences of a data set as one document."""
    text = "\n".join(sentence.strip() for sentence in documents["sentence"])
    return documents.select([0]).map(lambda _: {"sentence": text})


def run_tasks(scorer: Scorer, codec: TextCodec, tasks: TaskSet, bootstrap: int = 0) -> dict[str, Any]:
    """Evaluate `tasks`. Collective; every rank gets the results.

    Args:
        bootstrap: samples for the standard errors of metrics that aren't means; 0 for no standard errors.

    Returns:
        What the harness reports: `results` by task (or group) and `metric,filter`, `groups`, `versions`, `n-shot`,
        `n-samples` and others; `configs` are left out. Multiple-choice tasks also have `gold_bits_per_byte,none`:
        information of the right answer given the question, in bits for each byte of it (arXiv 2508.13144).

    Raises:
        ConfigError: a request doesn't fit the model (see `Scorer`), or asks for a kind of sampling that isn't offered.
        TextError: the tokenizer can't represent a text.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks.loaded["tasks"].values():
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
    with redirect_stderr(io.StringIO()):
        found: dict[str, Any] = evaluate(
            harness_model(scorer, codec), tasks.loaded, limit=tasks.limit, bootstrap_iters=bootstrap, log_samples=False
        )
    for name, task in tasks.loaded["tasks"].items():
        if task.OUTPUT_TYPE == "multiple_choice" and (bits := gold_bits_per_byte(task)) is not None:
            found["results"][name][GOLD_BITS] = bits
            found["higher_is_better"].setdefault(name, {})["gold_bits_per_byte"] = False
    return {key: value for key, value in found.items() if key != "configs"}


def plain_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """A task's `metric,filter` as `metric`, or `metric_filter` if the filter isn't `none`; without standard errors."""
    named = {key.removesuffix(",none").replace(",", "_"): value for key, value in found.items() if "," in key}
    return {name: float(v) for name, v in named.items() if isinstance(v, int | float) and "_stderr" not in name}


def gold_bits_per_byte(task: Any) -> float | None:
    """Bits per byte of the right answers of a multiple-choice task that has been evaluated; None if it has none."""
    nats, size = 0.0, 0
    for instance in task.instances:
        # Requests after those of the choices are for `acc_mutual_info`.
        if instance.idx == gold_choice(task, instance.doc):
            nats, size = nats - instance.resps[0][0], size + len(instance.args[1].encode())
    return nats / math.log(2) / size if size else None


def gold_choice(task: Any, document: Any) -> Any:
    """Index of the right choice of a multiple-choice task; None if the right answer isn't among the choices."""
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(gold, str):
        choices = task.doc_to_choice(document)
        return choices.index(gold) if gold in choices else None
    return gold


def right_answer(task: Any, document: Any) -> tuple[str, str]:
    """Prompt and right answer of a document, as `task` asks for the answer's likelihood or would have it generated."""
    prompt = task.fewshot_context(document, 0)
    if task.OUTPUT_TYPE == "generate_until":
        target = task.doc_to_target(document)
        return prompt, task.config.target_delimiter + (target[0] if isinstance(target, list) else target)
    requests = task.construct_requests(doc=document, ctx=prompt)
    request = requests[gold_choice(task, document)] if task.OUTPUT_TYPE == "multiple_choice" else requests
    return request.args[0], request.args[1]


def harness_model(scorer: Scorer, codec: TextCodec) -> Any:
    """`scorer` as the kind of model that the harness asks."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    most = scorer.model.config.model.max_seq_len

    class HarnessModel(TemplateLM):  # type: ignore[misc]
        texts = 0

        @property
        def eot_token_id(self) -> int:
            if codec.end_of_text is None:
                raise DataError(
                    f"{codec.source} has no token that ends a text, and texts without a context are scored after it"
                )
            return codec.end_of_text.id

        # Few-shot examples and questions come again with every choice.
        @lru_cache(maxsize=1024)  # noqa: B019
        def encoded(self, text: str) -> tuple[int, ...]:
            return tuple(codec.encode(text, "a task's text"))

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            self.texts += 1
            if self.texts % 1000 == 0:
                scorer.before_pass()  # encoding a large task takes longer than a signal should wait
            return list(self.encoded(string))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return scorer.likelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            windows = [
                [
                    make_disjoint_window(window)
                    for window in get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, most, 1)
                ]
                for (text,) in (request.args for request in requests)
            ]
            scores = iter(scorer.likelihoods([pair for own in windows for pair in own]))
            return [sum(next(scores)[0] for _ in own) for own in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            wanted = []
            for text, options in (request.args for request in requests):
                # Small models get a default that leaves them room for a prompt.
                own = normalize_gen_kwargs(options, min(256, most // 2))
                until = handle_stop_sequences(own.pop("until"), eos=codec.end_of_text and codec.end_of_text.token)
                tokens, temperature, sampled = (
                    own.pop("max_gen_toks"),
                    own.pop("temperature", 0.0),
                    own.pop("do_sample"),
                )
                top_p = own.pop("top_p", 1.0)
                if own:
                    raise ConfigError(f"generation_kwargs {', '.join(own)}: not offered; remove them from the task")
                prompt = self.tok_encode(text) or [self.eot_token_id]
                stops = tuple(stop for stop in until if stop)
                wanted.append(Continuation(prompt, tokens, stops, temperature if sampled else 0.0, top_p))
            return scorer.continuations(wanted, codec)

    return HarnessModel()


def paper_average(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """The paper's columns and their `average`, as fractions; None unless all of them were measured."""
    if not all(name in results for names, _ in PAPER.values() for name in names):
        return None
    columns = {
        label: fmean(results[name][f"{metric},none"] for name in names) for label, (names, metric) in PAPER.items()
    }
    return {**columns, "average": fmean(columns.values())}


def tables(found: Mapping[str, Any]) -> str:
    """The harness's own tables of what `run_tasks` returned."""
    from lm_eval.utils import make_table

    parts = [make_table(found)] + ([make_table(found, "groups")] if "groups" in found else [])
    return "\n".join(parts)
