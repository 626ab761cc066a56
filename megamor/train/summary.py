"""What a launch of training did, told at its end together with the commands that come next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megamor.checkpoint.layout import LATEST, step_name
from megamor.config import Config
from megamor.config.batches import BatchShape
from megamor.config.segments import max_depth
from megamor.metrics import Throughput
from megamor.model.flops import dense_pairs, executed_flops, full_work, unshared_sliding
from megamor.parallel import compile_seconds
from megamor.progress import format_count, format_duration
from megamor.train.distill import Distillation
from megamor.train.run_state import RunProgress
from megamor.train.step_statistics import StepSummary
from megamor.train.validation import ValidationLosses


@dataclass
class LaunchSummary:
    """The steps of this launch, beside the sums in `throughput`."""

    config: Config
    throughput: Throughput
    distillation: Distillation | None = None
    steps: int = 0
    full_depth_flops: float = 0.0
    loss: float | None = None
    mean_depth: float | None = None
    validation: ValidationLosses | None = None

    def add(self, step: StepSummary, shape: BatchShape, tokens: int, seconds: float) -> float:
        """Count a step of `tokens`, padding left out, here and in `throughput`; returns the FLOPs that it executed."""
        sequences, seq_len = shape.global_batch_size, shape.seq_len
        flops = executed_flops(self.config, sequences, step.work, seq_len, step.pairs, tokens)
        teacher = self.distillation.flops(step, sequences, seq_len, tokens) if self.distillation else 0.0
        executed = flops.training + teacher
        self.throughput.add(
            seconds=seconds,
            tokens=tokens,
            model_flops=executed,
            hardware_flops=executed + flops.recomputed(self.config.train),
        )
        self.steps += 1
        self.loss, self.mean_depth = step.loss, step.mean_depth
        # The same model without a router, every token through every recursion.
        dense = dense_pairs(self.config.model, seq_len, unshared_sliding(self.config))
        pairs = tokens / seq_len * dense if step.pairs is None else step.pairs
        everything = full_work(self.config, tokens, pairs, seq_len)[: len(step.work)]
        full = executed_flops(self.config, sequences, everything, seq_len, pairs, tokens)
        self.full_depth_flops += full.training - 3 * full.routers + teacher
        return executed

    def describe(self, progress: RunProgress, checkpoints: Path) -> str:
        """Lines to print at the end of a launch that wasn't interrupted; `checkpoints` holds those of the run."""
        if not self.steps:
            return self._next_commands(checkpoints)
        total = self.throughput.total
        speed = f", {format_count(total.tokens / total.seconds)} tokens/s" if total.seconds else ""
        lines = {
            "trained": f"{self.steps:,} steps, {total.tokens:,} tokens in {format_duration(total.seconds)}{speed}",
            "train loss": f"{self.loss:.4f} nats/token at step {progress.step}",
        }
        if self.validation is not None:
            for name, losses in self.validation.of_set.items():
                shown = ", ".join(f"{mode} {loss:.4f}" for mode, loss in losses.items())
                lines[f"validation loss, {name}"] = f"{shown} nats/token"
        if self.mean_depth is not None:
            saved = round(1 - total.model_flops / self.full_depth_flops, 3) + 0.0  # never -0.0
            lines["depth"] = f"{self.mean_depth:.2f} of {max_depth(self.config)} recursions per token"
            lines["compute"] = f"{total.model_flops:.3e} FLOPs executed, {saved:.1%} less than at full depth"
        else:
            lines["compute"] = f"{total.model_flops:.3e} FLOPs executed"
        if self.config.train.compile:
            lines["compilation"] = f"{format_duration(compile_seconds())} on this process"
        if self.steps < progress.step:
            lines["all launches"] = (
                f"{progress.step:,} steps, {progress.tokens_seen:,} tokens in {format_duration(progress.seconds)}, "
                f"{progress.flops:.3e} FLOPs executed"
            )
        lines["checkpoint"] = str(checkpoints / step_name(progress.step))
        width = max(map(len, lines))
        told = [f"  {name:<{width}}  {text}" for name, text in lines.items()]
        return "\n".join(
            [f"{self.config.run.name} is at step {progress.step}", *told, self._next_commands(checkpoints)]
        )

    def _next_commands(self, checkpoints: Path) -> str:
        latest = shlex.quote(str(checkpoints / LATEST))
        data = " ".join(shlex.quote(prefix) for prefix in self.config.data.validation.values())
        evaluate = [f"  megamor evaluate --checkpoint {latest} --data {data}"] if data else []
        generate = [f"  megamor generate --checkpoint {latest} --prompt 'Once upon a time'"]
        return "\n".join(["next:", *evaluate, *(generate if self.config.data.tokenizer else [])])
