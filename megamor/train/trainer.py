"""The training loop.

While steps remain: fetch the batch of this step, run the step, log; if it is time or a signal was agreed on, save; if
it is time, evaluate.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from megamor.config import Config
from megamor.config.batches import BatchShape
from megamor.config.derive import Derived
from megamor.data import MicroBatch, TrainingLoader, ValidationSet
from megamor.errors import TrainingError
from megamor.evaluate.loss import modes_of, perplexity, summed_loss
from megamor.metrics import Metrics, MetricSink, Throughput, TrainingProgress, peak_memory
from megamor.model import ModelOutput, Transformer
from megamor.model.flops import executed_flops
from megamor.model.loss import IGNORE
from megamor.optim import check_finite, lr_multiplier
from megamor.parallel import Backend
from megamor.routing import Mode
from megamor.train.checkpointing import Progress, RunCheckpoints
from megamor.train.failures import together
from megamor.train.statistics import StepStatistics, StepSummary
from megamor.train.stop import StopRequest

log = logging.getLogger("megamor.train")

VALIDATION = "validation/"
"""What the names of validation metrics begin with."""


@dataclass
class Trainer:
    """Everything a run needs, put together by `build_trainer`."""

    config: Config
    derived: Derived
    model: Transformer
    backend: Backend
    loader: TrainingLoader
    validation: Mapping[str, ValidationSet]
    checkpoints: RunCheckpoints
    progress: Progress
    sink: MetricSink
    throughput: Throughput
    display: TrainingProgress
    stop: StopRequest
    evaluated_step: int | None = None
    """The newest step with validation losses in the metrics."""
    data_wait: float = 0.0
    """Seconds until every rank had the batches of the latest step."""

    def fit(self) -> bool:
        """Train to the last step of this launch. Returns False if a signal ended it early (after saving).

        Raises:
            DataError, TrainingError, CheckpointError: on every rank, with `latest` as it was.
        """
        last_step = self.last_step()
        stopping = False
        with self.stop, self.display, self.closed_at_the_end():
            if self.progress.step >= last_step:
                self.announce(f"step {self.progress.step} is done and the last one asked for is {last_step}: finished")
            if self.is_time_to_evaluate():
                self.evaluate()  # the launch before was stopped when only this was missing
            self.throughput.start()
            while self.progress.step < last_step and not stopping:
                shape = self.derived.batches.at(self.progress.step)
                summary, lr, grad_norm = self.train_step(self.next_batches())
                self.progress.step += 1
                self.progress.tokens_seen += shape.tokens
                self.log_step(shape, summary, lr, grad_norm)
                self.report_saved(self.checkpoints.published())
                stopping = self.stop.agreed()
                is_last = stopping or self.progress.step == last_step
                if is_last or self.is_time(self.config.checkpoint.every_steps):
                    self.save(finish=is_last)
                if self.is_time_to_evaluate() and not stopping:
                    self.evaluate()
            if stopping:
                self.announce(f"stopped on request after step {self.progress.step}: the same command goes on from here")
        return not stopping

    def last_step(self) -> int:
        """The number of steps done when this launch ends: all of the run, or fewer if asked, or if data run out."""
        limits = [self.derived.total_steps]
        if self.config.train.stop_at_step is not None:
            limits.append(self.config.train.stop_at_step)
        if self.config.data.on_exhausted == "stop":
            uses = self.loader.forecast(self.derived.total_steps)
            limits += [use.repeats_in_step - 1 for use in uses if use.repeats_in_step is not None]
        return min(limits)

    def is_time(self, every_steps: int) -> bool:
        """Whether something that happens every so many steps is due."""
        return self.progress.step % every_steps == 0

    def is_time_to_evaluate(self) -> bool:
        """Whether evaluation is due after the steps done so far, and hasn't been done."""
        step = self.progress.step
        due = step == self.derived.total_steps or (step > 0 and self.is_time(self.config.train.eval_every))
        return due and bool(self.validation) and self.evaluated_step != step

    def next_batches(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step, when every rank has its own; measures the wait."""
        started = time.perf_counter()
        batches = together(self.loader.next_step, self.backend.device)
        self.data_wait = time.perf_counter() - started
        return batches

    def train_step(self, batches: list[MicroBatch]) -> tuple[StepSummary, float, float]:
        """One optimizer step over this rank's micro-batches: global figures, learning rate, gradient norm."""
        step = self.progress.step
        statistics = StepStatistics(self.config.recursion.num_recursions)
        token_weight = self.token_weight(batches)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            inputs, labels = self.to_device(batch.inputs), self.to_device(batch.labels)
            documents = None if batch.documents is None else self.to_device(batch.documents)
            with self.backend.forward_context(last_micro_batch=is_last):
                out = self.backend.model(inputs, labels, mode="train", step=step, documents=documents)
                loss = self.total_loss(out, token_weight, len(batches))
            self.backend.backward(loss, last_micro_batch=is_last)
            statistics.add(out)
        lr = self.config.optim.lr * lr_multiplier(step, self.config.optim, self.derived.total_steps)
        self.backend.set_lr(lr)
        grad_norm = self.backend.step(self.config.optim.grad_clip).item()
        summary = statistics.reduce()
        check_finite(step, summary.loss, grad_norm)
        if self.model.stage is not None:
            self.model.stage.router.update(summary.totals)
        return summary, lr, grad_norm

    def total_loss(self, out: ModelOutput, token_weight: Tensor, num_micro_batches: int) -> Tensor:
        """This micro-batch's share of the step's loss.

        Backends average gradients over ranks and sum them over micro-batches. The language-model loss is divided by the
        tokens of the whole step, so that every token counts the same wherever it is; router losses are means over a
        micro-batch and are averaged over micro-batches and ranks.
        """
        assert out.loss_sum is not None
        loss = out.loss_sum * token_weight
        for router_loss in out.router_losses.values():
            loss = loss + router_loss / num_micro_batches
        return loss

    def token_weight(self, batches: list[MicroBatch]) -> Tensor:
        """fp32 scalar: ranks / labels that count in the whole step. Counted in integers: fp32 ends at 2^24 tokens."""
        count = torch.stack([(batch.labels != IGNORE).sum() for batch in batches]).sum().to(self.backend.device)
        if dist.is_initialized():
            dist.all_reduce(count)
        return (self.backend.world_size / count.double()).float()

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to this rank's device without waiting."""
        return tensor.to(self.backend.device, non_blocking=True)

    def log_step(self, shape: BatchShape, summary: StepSummary, lr: float, grad_norm: float) -> None:
        """Metrics of the step that has just been done, with a batch of `shape`."""
        flops = executed_flops(self.config, shape.global_batch_size, summary.work, shape.seq_len)
        recomputed = flops.recomputed(self.config.train)
        self.throughput.step(
            tokens=shape.tokens,
            model_flops=flops.training,
            hardware_flops=flops.training + recomputed,
        )
        if not self.is_time(self.config.metrics.log_every) and self.progress.step != self.derived.total_steps:
            return
        metrics: dict[str, float | int | None] = {
            "train/loss": summary.loss,
            "train/lr": lr,
            "train/grad_norm": grad_norm,
            "train/tokens_seen": self.progress.tokens_seen,
            **{f"train/{name}": value for name, value in summary.router_losses.items()},
            **summary.routing_metrics(),
            **self.throughput.metrics(),
            "throughput/data_wait_seconds": self.data_wait,
            **{f"data/epochs/{name}": epochs for name, epochs in self.loader.epochs().items()},
            **peak_memory(self.backend.device),
        }
        self.write_metrics(metrics)
        self.display.update(self.progress.step, metrics)

    def write_metrics(self, metrics: Metrics) -> None:
        """Keep figures of the steps done so far. Collective."""

        def write() -> None:
            try:
                self.sink.log(self.progress.step, metrics)
            except OSError as error:
                raise TrainingError(
                    f"can't write the metrics of step {self.progress.step}: {error}; make room under run.dir "
                    "and go on from the last checkpoint"
                ) from error

        together(write, self.backend.device)

    def save(self, *, finish: bool = True) -> None:
        """Write a checkpoint. With `checkpoint.asynchronous`, training goes on meanwhile unless told to `finish` it."""
        with self.throughput.excluded():
            self.report_saved(self.checkpoints.wait())
            path = self.checkpoints.save(self.progress)
            if finish:
                path = path or self.checkpoints.wait()
        self.report_saved(path)

    def report_saved(self, path: Path | None) -> None:
        """Say that a checkpoint has been published, if one has."""
        if path is not None:
            self.display.message(f"step {self.progress.step}: saved {path}")

    def evaluate(self) -> None:
        """Loss on every validation set, under each way of routing."""
        metrics: dict[str, float | int | None] = {}
        causal = []
        with self.throughput.excluded():
            self.backend.model.eval()
            for name, data in self.validation.items():
                losses = {mode: self.validation_loss(data, mode) for mode in modes_of(self.model)}
                metrics |= {f"{VALIDATION}{name}/loss_{mode}": loss for mode, loss in losses.items()}
                causal.append(losses["causal"])
                shown = ", ".join(f"{mode} {loss:.4f}" for mode, loss in losses.items())
                if "topk" in losses:
                    gap = losses["causal"] - losses["topk"]
                    metrics[f"{VALIDATION}{name}/gap"] = gap
                    shown += f", gap {gap:+.4f}"
                self.display.message(
                    f"step {self.progress.step}: validation loss on {name}: {shown} nats/token "
                    f"(perplexity {perplexity(losses['causal']):.1f})"
                )
            self.backend.model.train()
            self.write_metrics(metrics)
            self.checkpoints.record_loss(self.progress.step, fmean(causal))
        self.evaluated_step = self.progress.step

    def validation_loss(self, data: ValidationSet, mode: Mode) -> float:
        """Mean over at most `train.eval_sequences` windows. Collective."""
        batches = data.batches(
            self.backend.rank,
            self.backend.world_size,
            self.config.train.micro_batch_size,
            self.config.train.eval_sequences,
        )
        context = self.backend.forward_context
        total = summed_loss(self.backend.model, batches, mode, self.backend.device, context)
        if dist.is_initialized():
            dist.all_reduce(total)
        return float(total[0] / total[1])

    def announce(self, text: str) -> None:
        """Print a line, once, even where progress isn't shown."""
        if self.config.metrics.progress:
            self.display.message(text)
        elif self.backend.rank == 0:
            print(text, flush=True)

    @contextmanager
    def closed_at_the_end(self) -> Iterator[None]:
        """End the thread that reads ahead and write out the metrics, without hiding the error that led here."""
        try:
            yield
        finally:
            self.loader.close()
            self.checkpoints.close()
            try:
                self.sink.close()
            except OSError as error:
                log.error("the last metrics are lost: %s", error)
