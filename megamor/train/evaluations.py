"""What is evaluated during training, and when: losses on validation sets, and downstream tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from megamor.codec import TextCodec
from megamor.config import Config
from megamor.data.loader import ValidationSet, open_validation_sets
from megamor.data.meta import end_of_text
from megamor.model import Transformer
from megamor.parallel import Backend
from megamor.train.validation import VALIDATION, ValidationLosses, validation_losses

if TYPE_CHECKING:
    from megamor.evaluate.tasks import TaskSet

TASKS = "tasks/"
"""Prefix of the names of task metrics."""


@dataclass(frozen=True)
class TaskFigures:
    """`figures` are the metrics of each task and group."""

    figures: dict[str, dict[str, float]]
    suffix: str = ""

    def metrics(self) -> dict[str, float | int | None]:
        """Metrics to log: `tasks/<task>/<metric>`."""
        figures = self.figures.items()
        return {f"{TASKS}{task}/{name}{self.suffix}": value for task, own in figures for name, value in own.items()}

    def lines(self) -> Iterator[str]:
        """A line to print for each task."""
        of = self.suffix.replace("_", " of the ")
        for task, own in self.figures.items():
            yield f"task {task}{of}: {', '.join(f'{name} {value:.4f}' for name, value in own.items())}"


@dataclass
class Evaluations:
    """What a run evaluates. `done` is, for each prefix of metrics, the newest step with such metrics."""

    config: Config
    validation: Mapping[str, ValidationSet]
    tasks: tuple[TaskSet, TextCodec] | None
    done: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> Evaluations:
        """Open the validation sets, and load the tasks' documents: errors are found before training.

        `config` has expanded paths.
        """
        data, train, tasks = config.data, config.train, None
        if train.eval_tasks and data.tokenizer:
            from megamor.evaluate.tasks import load_tasks

            record = end_of_text([*(source.prefix for source in data.train), *data.validation.values()])
            shots, limit = train.eval_tasks_fewshot, train.eval_tasks_limit
            found = load_tasks(train.eval_tasks, num_fewshot=shots, limit=limit, quiet=True)
            tasks = found, TextCodec.load(data.tokenizer, record=record)
        return cls(config, open_validation_sets(data, vocab_size=config.model.vocab_size), tasks)

    def due(self, step: int, over: bool) -> list[str]:
        """Prefixes of the metrics that are due after `step` and haven't been measured. At the end, all are due."""
        train = self.config.train
        every = {VALIDATION: train.eval_every} if self.validation else {}
        every |= {TASKS: train.eval_tasks_every or train.eval_every} if self.tasks else {}
        due = [name for name, steps in every.items() if over or (step > 0 and step % steps == 0)]
        return [name for name in due if self.done.get(name) != step]

    def measure(
        self, name: str, model: Transformer, backend: Backend, before_batch: Callable[[], None]
    ) -> list[ValidationLosses] | list[TaskFigures]:
        """Figures with the prefix `name`: of the weights, and of their average where there is one. Collective.

        `before_batch` is called on all ranks before each batch and may raise to abandon the evaluation.
        """

        def once(suffix: str = "") -> ValidationLosses | TaskFigures:
            if name == TASKS:
                return self.measure_tasks(model, backend, before_batch, suffix)
            return validation_losses(model, backend, self.validation, self.config.train, before_batch, suffix)

        found = [once()]
        if backend.average is not None:
            with backend.averaged():
                found.append(once("_average"))
        return found  # type: ignore[return-value]

    def measure_tasks(
        self, model: Transformer, backend: Backend, before_batch: Callable[[], None], suffix: str
    ) -> TaskFigures:
        """Evaluate the tasks by the inference rule; see `measure`."""
        from megamor.evaluate.scoring import Scorer
        from megamor.evaluate.tasks import plain_metrics, run_tasks

        assert self.tasks is not None
        tasks, codec = self.tasks
        dtype = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
        size, context = self.config.train.micro_batch_size, backend.forward_context
        scorer = Scorer(
            model, backend.device, backend.model, "causal", size, dtype, context=context, before_pass=before_batch
        )
        backend.model.eval()
        try:
            results = run_tasks(scorer, codec, tasks)["results"]
        finally:
            backend.model.train()
        return TaskFigures({task: plain_metrics(found) for task, found in results.items()}, suffix)
