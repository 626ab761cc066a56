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

import torch
import torch.distributed as dist
from torch import Tensor

from megamor.config import Config
from megamor.config.batches import BatchShape
from megamor.config.derive import Derived
from megamor.data import MicroBatch, TrainingLoader, ValidationSet
from megamor.errors import TrainingError
from megamor.metrics import Metrics, MetricSink, Throughput, TrainingDisplay, peak_memory
from megamor.model import ModelOutput, Transformer
from megamor.model.flops import executed_flops
from megamor.model.loss import IGNORE
from megamor.optim import lr_multiplier
from megamor.parallel import Backend
from megamor.ranks import run_on_all_ranks
from megamor.train.diagnosis import Diagnosis
from megamor.train.guard import Guard, Verdict
from megamor.train.recompiles import RecompileWatch
from megamor.train.run_state import Progress, RunCheckpoints
from megamor.train.step_statistics import StepStatistics, StepSummary
from megamor.train.stop import Stopped, StopRequest
from megamor.train.validation import validation_losses
from megamor.train.watchdog import Watchdog

log = logging.getLogger("megamor.train")


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
    display: TrainingDisplay
    stop: StopRequest
    guard: Guard
    diagnosis: Diagnosis
    watchdog: Watchdog
    recompiles: RecompileWatch
    stopping: bool = False
    """Whether the ranks have agreed to stop."""
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
        with self.stop, self.display, self.watchdog, self.closed_at_the_end():
            if self.progress.step >= last_step:
                self.announce(f"step {self.progress.step} is done and the last one asked for is {last_step}: finished")
            if self.is_time_to_evaluate():
                self.evaluate()  # the launch before was stopped when only this was missing
            self.throughput.start()
            while self.progress.step < last_step and not self.stopping:
                self.watchdog.beat(f"step {self.progress.step + 1}")
                shape = self.derived.batches.at(self.progress.step)
                batches = self.next_batches()
                with self.recompiles.step(self.progress.step + 1):
                    summary, lr, grad_norm, verdict = self.train_step(batches)
                self.progress.step += 1
                self.progress.tokens_seen += shape.tokens
                self.log_step(shape, summary, lr, grad_norm)
                for warning in self.diagnosis.observe(self.progress.step, summary, grad_norm, self.guard, batches):
                    self.announce(f"warning: {warning}")
                self.report_saved(self.checkpoints.published())
                self.stopping = self.stop.agreed()
                if verdict is Verdict.SPIKE:
                    self.roll_back()
                is_last = self.stopping or self.progress.step == last_step
                if is_last or verdict is Verdict.SPIKE or self.is_time(self.config.checkpoint.every_steps):
                    self.save(finish=is_last)
                if self.is_time_to_evaluate() and not self.stopping and verdict is not Verdict.SPIKE:
                    self.evaluate()
                    if self.stopping:
                        self.save()
            if self.stopping:
                self.announce(f"stopped on request after step {self.progress.step}: the same command goes on from here")
        return not self.stopping

    def roll_back(self) -> None:
        """Go back to an earlier checkpoint, but not in the data: those since then are left out. Collective.

        Raises:
            TrainingError: there is no such checkpoint, or this has happened too often.
        """
        spiked_at, position = self.progress.step, self.loader.state_dict()
        left_out = self.guard.left_out
        restored = self.checkpoints.restore(at_most=spiked_at - self.config.guard.rollback_steps)
        if restored is None:
            raise TrainingError(
                f"the loss spikes at step {spiked_at}, and no checkpoint is {self.config.guard.rollback_steps} steps "
                "older: lower guard.rollback_steps or checkpoint.every_steps, or start with a lower optim.lr"
            )
        self.guard.left_out = left_out  # those of the checkpoint may be fewer
        self.guard.roll_back(spiked_at, (self.loader.consumed_samples, position["consumed_samples"]))
        self.loader.load_state_dict({**position, "steps": restored.step})
        self.progress = restored
        self.evaluated_step = min(self.evaluated_step or 0, restored.step)
        run_on_all_ranks(lambda: self.sink.rewind(restored.step), self.backend.device)
        self.announce(f"step {spiked_at}: the loss spikes; back to step {restored.step}, with the data from here on")

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
        batches = run_on_all_ranks(self.loader.next_step, self.backend.device)
        self.data_wait = time.perf_counter() - started
        return batches

    def train_step(self, batches: list[MicroBatch]) -> tuple[StepSummary, float, float, Verdict]:
        """One optimizer step over this rank's micro-batches: global figures, learning rate, gradient norm, verdict."""
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
        if self.diagnosis.gradient is not None:
            statistics.add_score_gradient(self.diagnosis.gradient.take())
        summary = statistics.reduce()
        verdict = self.guard.judge(step, summary.loss, grad_norm)
        if verdict is Verdict.SKIPPED:
            self.announce(
                f"step {step + 1} is skipped: gradient norm {grad_norm} ({self.guard.skipped} skipped so far)"
            )
        elif self.model.stage is not None:
            self.model.stage.router.update(summary.totals)
        return summary, lr, grad_norm, verdict

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
        flops = executed_flops(self.config, shape.global_batch_size, summary.work, shape.seq_len, summary.pairs)
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
            **self.guard.metrics(),
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

        run_on_all_ranks(write, self.backend.device)

    def save(self, *, finish: bool = True) -> None:
        """Write a checkpoint. With `checkpoint.asynchronous`, training goes on meanwhile unless told to `finish` it."""
        self.watchdog.beat("saving")
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
        """Losses on the validation sets. Given up if the ranks agree to stop meanwhile: the next launch does it."""
        step = self.progress.step
        with self.throughput.excluded():
            try:
                losses = validation_losses(
                    self.model, self.backend, self.validation, self.config.train, self.stop_between_batches
                )
            except Stopped:
                self.stopping = True
                return
            for line in losses.lines():
                self.display.message(f"step {step}: {line}")
            self.write_metrics(losses.metrics())
            self.checkpoints.record_loss(step, losses.mean)
        self.evaluated_step = step

    def stop_between_batches(self) -> None:
        """Raises Stopped on every rank if any was asked to stop. Collective."""
        self.watchdog.beat(f"evaluating after step {self.progress.step}")
        if self.stop.agreed():
            raise Stopped

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
