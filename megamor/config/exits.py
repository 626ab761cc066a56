"""Exit rules: stop a token's recursions early because the model is confident, on any trained model (arXiv 2607.20519).

A rule is chosen at inference, by `--exit` or `Transformer.set_exit`; no configuration has it. How it works is in
`megamor/routing/confidence.py`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal, get_args

from megamor.errors import ConfigError

ExitName = Literal["max_probability", "entropy", "kl", "acceleration"]
EXITS: tuple[ExitName, ...] = get_args(ExitName)


@dataclass(frozen=True)
class ExitRule:
    """A token stops where its figure is at most `threshold`; for `max_probability`, at least.

    Raises:
        ConfigError: the rule is unknown, or no figure can be at the threshold.
    """

    name: ExitName
    threshold: float

    def __post_init__(self) -> None:
        if self.name not in EXITS:
            raise ConfigError(f"exit = {self.name} is unknown: give one of {', '.join(EXITS)}")
        if self.name == "max_probability" and not 0 < self.threshold <= 1:
            raise ConfigError(f"exit threshold = {self.threshold} is no probability: give a number in (0, 1]")
        if not 0 <= self.threshold < float("inf"):
            raise ConfigError(f"exit threshold = {self.threshold}: {self.name} needs a finite number of at least 0")

    @property
    def compares(self) -> bool:
        """Whether the rule compares with the recursion before, so that it stops no token before its second."""
        return self.name in ("kl", "acceleration")

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.name == 'max_probability' else '<='} {self.threshold:g}"


def add_exit_options(parser: argparse.ArgumentParser) -> None:
    """Add `--exit` and `--exit-threshold` to a command."""
    text = "stop a token's recursions once the model is confident, by this figure; see docs/routers.md"
    parser.add_argument("--exit", choices=EXITS, help=text)
    text = "when to stop: at a probability of at least, or at an entropy or KL (nats) or acceleration of at most"
    parser.add_argument("--exit-threshold", type=float, metavar="NUMBER", help=text)


def chosen_exit(arguments: argparse.Namespace) -> ExitRule | None:
    """The rule that the options of `add_exit_options` give.

    Raises:
        ConfigError: one option without the other, or a threshold out of range.
    """
    if (arguments.exit is None) != (arguments.exit_threshold is None):
        raise ConfigError("--exit and --exit-threshold belong together: give both, or neither")
    return None if arguments.exit is None else ExitRule(arguments.exit, arguments.exit_threshold)
