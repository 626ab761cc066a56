"""The trainer: building a run, its loop, figures of a step, stopping, and what goes into a checkpoint."""

from megamor.errors import EXIT_INTERRUPTED
from megamor.train.build import build_trainer
from megamor.train.stop import ignore_signals
from megamor.train.trainer import Trainer

__all__ = ["EXIT_INTERRUPTED", "Trainer", "build_trainer", "ignore_signals"]
