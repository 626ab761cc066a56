"""The teacher of `distill.from`: a trained model whose predictions a run learns beside the data's next tokens.

The teacher reads the student's inputs without gradients. Only its last hidden states leave it; where the student's loss
is computed, both heads are applied to a few tokens at a time (`megamor.model.loss`). The teacher isn't sharded or
compiled, and validation doesn't use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamor.config import Config
from megamor.config.paths import expand_paths
from megamor.config.segments import max_depth
from megamor.errors import ConfigError
from megamor.load import build_loaded, read_source
from megamor.model import Transformer
from megamor.model.flops import executed_flops
from megamor.model.loss import Teacher
from megamor.ranks import from_first_rank, run_on_all_ranks
from megamor.train.start import check_tokenizer, locate
from megamor.train.step_statistics import StepStatistics, StepSummary


@dataclass
class Distillation:
    """A teacher in evaluation mode, `config` of the run that learns from it, and where it is from.

    A checkpoint holds the hash of its weights; `told` is what the user should know if they have changed since.
    """

    model: Transformer
    config: Config
    origin: dict[str, Any]
    told: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {"sha256": self.origin["sha256"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        before, now = state["sha256"], self.origin["sha256"]
        self.told = () if before == now else (f"warning: another teacher than before: sha256 {before} -> {now}",)

    @classmethod
    def load(cls, config: Config, device: torch.device) -> Distillation | None:
        """Load the teacher on this process; None if the run has none. Collective.

        Raises:
            MegamorError: on every rank, if it can't be read or has another vocabulary or tokenizer.
        """
        if config.distill.from_ is None:
            return None
        expanded = run_on_all_ranks(lambda: expand_paths(config))
        path = from_first_rank(lambda: locate(str(expanded.distill.from_)))
        return run_on_all_ranks(lambda: cls._load(path, expanded, device))

    @classmethod
    def _load(cls, path: str, config: Config, device: torch.device) -> Distillation:
        source, ours = read_source(path, "distill"), config.model.vocab_size
        if (theirs := source.config.model.vocab_size) != ours:
            raise ConfigError(
                f"the teacher {path} has a vocabulary of {theirs} tokens, and model.vocab_size is {ours}: its "
                "predictions can't be compared; give a teacher with the same tokenizer, or its vocab_size"
            )
        if (longest := source.config.model.max_seq_len) < config.data.seq_len:
            raise ConfigError(
                f"the teacher {path} takes sequences of {longest} tokens at most, and data.seq_len is "
                f"{config.data.seq_len}: lower it"
            )
        check_tokenizer(source, config)
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        model = build_loaded(source.config, source.weights, Path(path), device, dtype)
        return cls(model.requires_grad_(False), config, source.origin)

    @torch.no_grad()
    def teach(self, arguments: Mapping[str, Any], statistics: StepStatistics | None = None) -> Teacher:
        """Predictions for a micro-batch, given as `MicroBatch.arguments`. Its work is added to `statistics`."""
        settings, weight = self.config.distill, self.model.head_weight
        inputs, lengths = arguments["inputs"], arguments["lengths"]
        given = {name: value for name, value in arguments.items() if name not in ("inputs", "labels")}
        hidden = weight.new_zeros(0, weight.shape[1])  # of padding alone
        work = torch.zeros(1 + 2 * max_depth(self.model.config), device=weight.device)
        if lengths is None or any(lengths):
            with torch.autocast(inputs.device.type, enabled=False):
                out = self.model(inputs, mode="causal", predict=False, **given)
            assert out.hidden is not None
            assert out.pairs is not None
            hidden = out.hidden
            work = torch.stack([out.pairs, *(() if out.work is None else out.work.flatten())])
        if statistics is not None:
            statistics.add_teacher(work)
        return Teacher(hidden, weight, settings.weight, settings.temperature, settings.top_k)

    def flops(self, step: StepSummary, sequences: float, seq_len: int, tokens: int) -> float:
        """FLOPs of the teacher's forward passes in a step, which are executed FLOPs of the run."""
        pairs, *work = step.teacher_work
        recursions = list(zip(work[::2], work[1::2], strict=True))
        return executed_flops(self.model.config, sequences, recursions, seq_len, pairs, tokens).forward
