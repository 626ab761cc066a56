"""Exit rules, which stop a token's recursions once the model is confident (arXiv 2607.20519).

They are chosen at inference, for any trained model; `megamor/routing/confidence.py` says how they work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from megamor.errors import ConfigError

ExitName = Literal["max_probability", "entropy", "kl", "acceleration"]
EXITS: tuple[ExitName, ...] = get_args(ExitName)


@dataclass(frozen=True)
class ExitRule:
    """A token stops where its figure is at most `threshold`; for `max_probability`, at least.

    Raises:
        ConfigError: the rule is unknown, or the threshold is out of range.
    """

    name: ExitName
    threshold: float

    def __post_init__(self) -> None:
        if self.name not in EXITS:
            raise ConfigError(f"exit = {self.name} is unknown: give one of {', '.join(EXITS)}")
        most = 1 if self.name == "max_probability" else math.inf
        if not 0 <= self.threshold <= most:
            raise ConfigError(f"exit threshold = {self.threshold}: {self.name} needs a number from 0 to {most}")

    @property
    def first(self) -> int:
        """The first recursion, counted from 1, after which a token may stop."""
        return 2 if self.name in ("kl", "acceleration") else 1

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.name == 'max_probability' else '<='} {self.threshold:g}"
