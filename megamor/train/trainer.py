"""The training loop.

While steps remain: fetch the batch of this step and vote; run the step; read the figures of the step before; if the
guard asks for it, go back; if it is time, save; if it is time, evaluate. When the ranks agree to stop, save and leave.

Beside the gradients, the ranks talk twice a step. The *vote* is one reduction of six integers between the hosts: who
failed, who was asked to stop, whose checkpoint is still being written, and how many labels and tokens the step has. The
*figures* are one reduction on the devices. They are read one step late, when they have long been computed, so that the
host prepares a step while the device works on the one before. They are read at once where something depends on them:
before a checkpoint or an evaluation, and in every step if the guard may skip it or go back.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megamor.config import Config
from megamor.config.batches import BatchSchedule
from megamor.config.depth import grows
from megamor.config.derive import Consumed
from megamor.config.segments import max_depth, stages
from megamor.data.loader import MicroBatch, TrainingLoader
from megamor.errors import MegamorError, TrainingError
from megamor.lock import WriteLock
from megamor.metrics import Metrics, MetricSink, Throughput, TrainingDisplay, peak_memory
from megamor.model import ModelOutput, Transformer
from megamor.model.loss import IGNORE
from megamor.parallel import Backend, compile_seconds, without_recompiling
from megamor.ranks import raise_on_all_ranks, run_on_all_ranks, sum_over_ranks
from megamor.train.budget import Budget
from megamor.train.diagnosis import Diagnosis
from megamor.train.distill import Distillation
from megamor.train.evaluations import Evaluations
from megamor.train.guard import Guard, Verdict
from megamor.train.run_state import RunCheckpoints, RunProgress
from megamor.train.step_statistics import PendingSummary, StepStatistics, StepSummary, UnreadStep
from megamor.train.stop import Stopped, StopRequest
from megamor.train.summary import LaunchSummary
from megamor.train.validation import ValidationLosses
from megamor.train.watchdog import Watchdog

log = logging.getLogger("megamor.train")

SETTLING_STEPS = 10
"""Steps after which a launch has compiled its code."""


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of a step, and the labels and tokens in the whole step, over all ranks."""

    micro_batches: list[MicroBatch]
    labels: int
    tokens: int


@dataclass
class Trainer:
    """Everything a run needs, put together by `build_trainer`."""

    config: Config
    batches: BatchSchedule
    budget: Budget
    model: Transformer
    backend: Backend
    loader: TrainingLoader
    evaluations: Evaluations
    checkpoints: RunCheckpoints
    progress: RunProgress
    sinks: list[MetricSink]
    throughput: Throughput
    display: TrainingDisplay
    stop: StopRequest
    guard: Guard
    diagnosis: Diagnosis
    watchdog: Watchdog
    summary: LaunchSummary
    distillation: Distillation | None = None
    lock: WriteLock | None = None
    """Rank 0's, which keeps other launches from writing to the run's directory."""
    stopping: bool = False
    """Whether the ranks have agreed to stop."""
    saved_step: int = 0
    """The newest step that is in a checkpoint or was handed over to be written; 0 before the first."""
    data_wait: float = 0.0
    """Seconds until every rank had the batches of the latest step."""
    unread: deque[UnreadStep] = field(default_factory=deque)
    unwritten: TrainingError | None = None
    """Why this rank couldn't write metrics; the next vote tells the others."""
    data_end: int | None = None
    """See `find_data_end`."""

    def __post_init__(self) -> None:
        self.data_end = self.find_data_end()

    def fit(self) -> bool:
        """Train to the last step of this launch. Returns False if a signal ended it early (after saving).

        Raises:
            DataError, TrainingError, CheckpointError: on every rank, with `latest` as it was.
        """
        with self.stop, self.display, self.watchdog, self.closed_at_the_end():
            if self.is_over():
                self.announce(f"step {self.progress.step} is done and {self.describe_end()}: finished")
            if self.due_evaluations():
                self.evaluate()  # the previous launch was stopped when only this was missing
            self.throughput.start()
            settled = self.progress.step + SETTLING_STEPS
            while not self.is_over() and not self.stopping:
                if self.progress.step == settled:
                    keep_what_exists()
                self.watchdog.beat(f"step {self.progress.step + 1}")
                batch = self.next_batch()
                if batch is None:
                    break
                verdict = self.train_step(batch)
                if verdict is Verdict.SPIKE:
                    self.roll_back()
                # After a rollback the old weights are saved with the new position in the data. Otherwise a restart
                # would resume before the samples that made the loss spike, and meet them again.
                is_last, every = self.is_over(), self.config.checkpoint.every_steps
                if is_last or verdict is Verdict.SPIKE or self.progress.step % every == 0:
                    self.save(finish=is_last)
                if self.due_evaluations() and verdict is not Verdict.SPIKE:
                    self.evaluate()
            self.finish()
        if self.stopping:
            self.announce(f"stopped on request after step {self.progress.step}: rerun the same command to resume")
        else:
            self.announce(self.summary.describe(self.progress, self.checkpoints.manager.directory))
        return not self.stopping

    def next_batch(self) -> StepBatch | None:
        """Fetch the next batch and vote; None if the ranks agreed to stop instead. Collective.

        The vote comes before the step because a rank without a batch can't take part in the step's collectives.

        Raises:
            MegamorError: on every rank, if any couldn't read its batch or write metrics.
            CheckpointError: on every rank, if writing a checkpoint in the background failed.
        """
        started = time.perf_counter()
        unreadable: MegamorError | None = None
        micro_batches: list[MicroBatch] = []
        try:
            micro_batches = self.loader.next_step()
        except MegamorError as error:
            unreadable = error
        any_unwritten, any_unreadable, any_stop, any_saving, labels, tokens = sum_over_ranks(
            [
                self.unwritten is not None,
                unreadable is not None,
                self.stop.received is not None,
                self.checkpoints.is_writing,
                # Integers, counted on the host where the batch is: fp32 is exact up to 2^24 tokens only.
                sum(int((batch.labels != IGNORE).sum()) for batch in micro_batches),
                sum(batch.num_tokens for batch in micro_batches),
            ]
        )
        self.data_wait = time.perf_counter() - started
        # Every rank has the same sums, so every rank takes the same branches below.
        if any_unwritten:
            raise_on_all_ranks(self.unwritten)
        if not any_saving:
            self.report_saved(self.checkpoints.wait())
        if any_stop:
            # Before `any_unreadable`: the steps done can be saved, and the next launch will report the bad batch.
            self.stopping = True
            if micro_batches:
                # The batch won't be trained on, so the checkpoint must not count it as consumed.
                self.loader.take_back()
            return None
        if any_unreadable:
            raise_on_all_ranks(unreadable)
        return StepBatch(micro_batches, labels, tokens)

    def train_step(self, batch: StepBatch) -> Verdict:
        """Do one optimizer step, and read the figures of the previous one or, where the guard decides, of this one."""
        number = self.progress.step + 1
        shape = self.batches.at(self.progress.step)
        lr = self.budget.lr(self.progress)
        recursions = self.budget.recursions(self.progress)
        self.model.limit_recursions(recursions)
        settled_after = self.config.train.fail_on_recompile_after
        settled = settled_after is not None and self.summary.steps + len(self.unread) >= settled_after
        with without_recompiling(number, settled_after) if settled else nullcontext():
            figures = self.run_micro_batches(batch, lr)
        if not self.guard.decides:
            # Nothing can skip this step any more, so routers needn't wait: their sums are still on the device.
            self.model.update_routers(figures.totals)
        self.progress.step = number
        self.progress.tokens_seen += batch.tokens
        self.progress.lr = lr
        # Sampled depths are all being trained, so evaluation is at full depth.
        self.progress.recursions = recursions if grows(self.config) else None
        # What the line of metrics says about the host is recorded now: when the figures are read, the loader and the
        # clock are a step ahead. On a GPU, a turn of the loop takes as long as the device needed for the step before.
        self.unread.append(
            UnreadStep(
                number=number,
                shape=shape,
                tokens=batch.tokens,
                micro_batches=batch.micro_batches,
                lr=lr,
                tokens_seen=self.progress.tokens_seen,
                epochs=self.loader.epochs(),
                data_wait=self.data_wait,
                seconds=self.throughput.lap(),
                recursions=recursions,
                figures=figures,
            )
        )
        return self.read_figures(all_but=0 if self.guard.decides or self.budget.needs_flops else 1)

    def run_micro_batches(self, batch: StepBatch, lr: float) -> PendingSummary:
        """Forward and backward passes over this rank's micro-batches, then the optimizer's update."""
        statistics = StepStatistics(max_depth(self.config))
        world_size, device = self.backend.world_size, self.backend.device
        # Divided in double precision and then rounded once, whatever the device. Padding alone has no label. The device
        # fills it in: a copy from ordinary host memory would wait.
        token_weight = torch.full((), world_size / max(batch.labels, 1), dtype=torch.float32, device=device)
        for number, micro_batch in enumerate(batch.micro_batches, start=1):
            # Gradients are accumulated locally and reduced in the last micro-batch only (where the backend can).
            is_last = number == len(batch.micro_batches)
            # Each rank's micro-batches are one slice of the step's batch, in the order of ranks.
            first_sequence = (self.backend.rank * len(batch.micro_batches) + number - 1) * len(micro_batch.inputs)
            tokens, arguments = micro_batch.num_tokens, micro_batch.arguments(device)
            if self.distillation is not None:
                arguments["teacher"] = self.distillation.teach(arguments, statistics)
            with self.backend.forward_context(last_micro_batch=is_last):
                out = self.backend.model(
                    **arguments, mode="train", step=self.progress.step, first_sequence=first_sequence
                )
                # The number of micro-batches, over which router losses are averaged, if all have as many tokens.
                loss = self.total_loss(out, token_weight, batch.tokens / (world_size * tokens) if tokens else math.inf)
            self.backend.backward(loss, last_micro_batch=is_last)
            statistics.add(out, tokens)
        self.backend.set_lr(lr)
        grad_norm = self.backend.step(self.config.optim.grad_clip)
        if self.diagnosis.gradient is not None:
            # Complete only after the last backward pass, unlike the sums over micro-batches above.
            statistics.add_score_gradients(self.diagnosis.gradient.take())
        return statistics.reduce(grad_norm, self.backend.router_square)

    def total_loss(self, out: ModelOutput, token_weight: Tensor, router_divisor: float) -> Tensor:
        """This micro-batch's part of the step's loss.

        Backends average gradients over ranks and sum them over micro-batches. The language-model loss is divided by the
        labels of the whole step (`token_weight` is ranks / labels), so that every token counts the same wherever it
        is. Router losses are means over a micro-batch and are averaged over micro-batches and ranks, each with the
        weight of its tokens: `router_divisor` is the step's tokens / (ranks · this micro-batch's tokens).
        """
        assert out.loss_sum is not None
        loss = out.loss_sum * token_weight
        for router_loss in out.router_losses.values():
            loss = loss + router_loss / router_divisor
        return loss

    def read_figures(self, all_but: int = 0) -> Verdict:
        """Wait for the figures of unread steps, `all_but` the newest ones; judge and log them. Collective.

        Returns:
            The verdict on the last step read; GOOD if none was.

        Raises:
            TrainingError: on every rank, if the guard or an alarm ends the run.
        """
        verdict = Verdict.GOOD
        while len(self.unread) > all_but:
            step = self.unread.popleft()
            summary = step.figures.wait()
            try:
                verdict = self.judge(step.number, summary)
            except TrainingError:
                self.unread.clear()  # what ran after a failed step means nothing
                raise
            if verdict is Verdict.SKIPPED:
                self.announce(
                    f"step {step.number} is skipped: gradient norm {summary.grad_norm} "
                    f"({self.guard.skipped} skipped so far)"
                )
            elif self.guard.decides:
                # A skipped step must leave the routers' buffers alone too, hence only now.
                self.model.update_routers(step.figures.totals)
            self.log_step(step, summary)
            for warning in self.diagnosis.observe(
                step.number, summary, self.guard, step.micro_batches, step.recursions
            ):
                self.announce(f"warning: {warning}")
        return verdict

    def judge(self, number: int, summary: StepSummary) -> Verdict:
        """The guard's verdict on a step. One whose samples are all padding has no loss, and its gradient is zero."""
        return self.guard.judge(number, summary.loss, summary.grad_norm) if summary.num_tokens else Verdict.GOOD

    def log_step(self, step: UnreadStep, summary: StepSummary) -> None:
        """Write the metrics of `step` and show them."""
        self.progress.flops += self.summary.add(summary, step.shape, step.tokens, step.seconds)
        self.progress.seconds += step.seconds
        is_last = self.budget.is_spent(Consumed(step.number, step.tokens_seen, self.progress.flops))
        if step.number % self.config.metrics.log_every and not is_last:
            return
        metrics: dict[str, float | int | None] = {
            "train/loss": summary.loss if summary.num_tokens else None,
            "train/lr": step.lr,
            "train/grad_norm": summary.grad_norm,
            **({} if summary.router_grad_norm is None else {"train/router_grad_norm": summary.router_grad_norm}),
            "train/tokens_seen": step.tokens_seen,
            **({} if self.config.recursion.schedule == "constant" else {"train/recursions": step.recursions}),
            **{f"train/{name}": value for name, value in summary.router_losses.items()},
            **summary.routing_metrics(),
            **summary.stage_metrics(stages(self.config)),
            **self.throughput.metrics(),
            "throughput/executed_flops": self.progress.flops,
            "throughput/training_seconds": self.progress.seconds,
            "throughput/data_wait_seconds": step.data_wait,
            **({"throughput/compile_seconds": compile_seconds()} if self.summary.config.train.compile else {}),
            **{f"data/epochs/{name}": epochs for name, epochs in step.epochs.items()},
            **self.guard.metrics(),
            **peak_memory(self.backend.device),
        }
        self.write_metrics(step.number, metrics)
        self.display.show(step.number, metrics)

    def write_metrics(self, step: int, metrics: Metrics) -> None:
        """Write figures of `step`. A failure is raised by the next vote, on every rank."""
        if self.lock is not None and self.lock.lost is not None:
            self.unwritten = self.unwritten or TrainingError(self.lock.lost)
            return
        try:
            for sink in self.sinks:
                sink.log(step, metrics)
        except OSError as error:
            self.unwritten = self.unwritten or TrainingError(
                f"can't write the metrics of step {step}: {error}; free space under run.dir and rerun the same command "
                "to resume from the last checkpoint"
            )

    def roll_back(self) -> None:
        """Go back to an earlier checkpoint, but not in the data: samples since then are left out. Collective.

        Raises:
            TrainingError: there is no such checkpoint, or this has happened too often.
        """
        # Restoring a checkpoint sets loader and guard back as well. What must survive is taken aside first: the
        # position in the data, and which samples earlier rollbacks have left out.
        spiked_at, position = self.progress.step, self.loader.state_dict()
        left_out = self.guard.left_out
        restored = self.checkpoints.roll_back(spiked_at - self.config.guard.rollback_steps, self.progress)
        if restored is None:
            raise TrainingError(
                f"the loss spikes at step {spiked_at}, and no checkpoint is {self.config.guard.rollback_steps} steps "
                "older: lower guard.rollback_steps or checkpoint.every_steps, or start with a lower optim.lr"
            )
        self.guard.left_out = left_out
        self.guard.roll_back(spiked_at, (self.loader.consumed_samples, position["consumed_samples"]))
        self.loader.load_state_dict({**position, "steps": restored.step})
        self.progress = restored
        self.data_end = self.find_data_end()
        done = self.evaluations.done
        done.update({name: min(step or 0, restored.step) for name, step in done.items()})
        run_on_all_ranks(self.rewind_metrics)
        self.announce(
            f"step {spiked_at}: the loss spikes; back to the weights of step {restored.step}, with the data that follow"
        )

    def rewind_metrics(self) -> None:
        """Remove metrics of steps that will run again, where a sink can."""
        for sink in self.sinks:
            sink.rewind(self.progress.step)

    def find_data_end(self) -> int | None:
        """With `data.on_exhausted: stop`, the last step before one that would read a source again; None if none will.

        Like `train.stop_at_step`, it doesn't shorten the learning-rate schedule.
        """
        if self.config.data.on_exhausted != "stop":
            return None
        total = self.budget.total_steps(self.progress)
        while True:
            uses = self.loader.forecast(total)
            last_steps = [use.repeats_in_step - 1 for use in uses if use.repeats_in_step is not None]
            if last_steps or not self.budget.open_ended:
                return min(last_steps, default=None)
            total *= 2  # an estimate, and the run may become longer

    def is_complete(self) -> bool:
        """Whether the run has nothing left to train."""
        step = self.progress.step
        return self.budget.is_spent(self.progress) or (self.data_end is not None and step >= self.data_end)

    def is_over(self) -> bool:
        """Whether this launch has nothing left to train."""
        stop = self.config.train.stop_at_step
        return self.is_complete() or (stop is not None and self.progress.step >= stop)

    def describe_end(self) -> str:
        """What ends this launch, in words."""
        ends = [self.data_end, self.config.train.stop_at_step]
        ends += [] if self.budget.open_ended else [self.budget.total_steps(self.progress)]
        known = [end for end in ends if end is not None]
        return f"the last one asked for is {min(known)}" if known else f"reaches {self.budget.describe()}"

    def due_evaluations(self) -> list[str]:
        """What is to be evaluated after the steps done so far, and hasn't been."""
        return self.evaluations.due(self.progress.step, over=self.budget.is_spent(self.progress))

    def save(self, *, finish: bool) -> None:
        """Write a checkpoint. With `checkpoint.asynchronous`, only start to, unless told to `finish` it."""
        self.watchdog.beat("saving")
        self.read_figures()  # no checkpoint of a step that turns out to have failed
        with self.throughput.excluded():
            # Only one checkpoint is written at a time: reporting the previous one here keeps messages in order.
            self.report_saved(self.checkpoints.wait())
            path = self.checkpoints.save(self.progress)
            if finish:
                path = path or self.checkpoints.wait()
        self.saved_step = self.progress.step
        self.report_saved(path)

    def report_saved(self, path: Path | None) -> None:
        """Say that a checkpoint has been published, if one has."""
        if path is not None:
            self.display.message(f"step {self.progress.step}: saved {path}")

    def evaluate(self) -> None:
        """Measure and write what is due. Abandoned if the ranks agree to stop; the next launch does the rest then."""
        step = self.progress.step
        self.read_figures()
        self.model.limit_recursions(self.progress.recursions)
        for name in self.due_evaluations():
            with self.throughput.excluded():
                try:
                    found = self.evaluations.measure(name, self.model, self.backend, self.stop_between_batches)
                except Stopped:
                    self.stopping = True
                    return
                for line in (line for part in found for line in part.lines()):
                    self.display.message(f"step {step}: {line}")
                self.write_metrics(step, {name: value for part in found for name, value in part.metrics().items()})
                if isinstance(losses := found[0], ValidationLosses):
                    self.checkpoints.record_loss(step, losses.mean)
                    self.summary.validation = losses
            # Set last: an evaluation that was abandoned or failed is due again.
            self.evaluations.done[name] = step

    def stop_between_batches(self) -> None:
        """Raises Stopped on every rank if any was asked to stop. Collective."""
        self.watchdog.beat(f"evaluating after step {self.progress.step}")
        if self.stop.agreed():
            raise Stopped

    def finish(self) -> None:
        """Save the last step unless that is done, and wait until all is written. Collective."""
        self.read_figures()
        if self.saved_step != self.progress.step:
            self.save(finish=True)
        self.report_saved(self.checkpoints.wait())
        raise_on_all_ranks(self.unwritten)  # no further vote will tell

    def announce(self, text: str) -> None:
        """Print a line, once, even where progress isn't shown."""
        # A disabled display is silent on every rank, but what is announced must be seen.
        if self.config.metrics.progress:
            self.display.message(text)
        elif self.backend.rank == 0:
            print(text, flush=True)

    @contextmanager
    def closed_at_the_end(self) -> Iterator[None]:
        """End the thread that reads ahead and write the last metrics, without hiding the error that led here."""
        try:
            yield
        except BaseException as error:
            if self.backend.world_size > 1 and not isinstance(error, MegamorError):  # which all ranks have agreed on
                self.watchdog.fail(error)
            raise
        finally:
            # After an error the ranks may be in different places, so nothing here is collective.
            # A device that failed has no figures any more, and those of a step that failed aren't written.
            with suppress(RuntimeError, TrainingError):
                while self.unread:
                    step = self.unread.popleft()
                    summary = step.figures.wait()
                    self.judge(step.number, summary)
                    self.log_step(step, summary)
            gc.unfreeze()
            self.loader.close()
            self.checkpoints.close()
            try:
                for sink in self.sinks:
                    sink.close()
            except OSError as error:
                log.error("the last metrics are lost: %s", error)
            if self.lock is not None:
                self.lock.release()


def keep_what_exists() -> None:
    """Leave modules, compiled code and imports out of later garbage collections.

    A full collection walks half a million objects for a third of a second, and all ranks wait for the one that does it.
    """
    gc.collect()
    gc.freeze()
