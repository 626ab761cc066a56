"""The most recursions of each training step: `recursion.schedule`, a function of the run's progress.

Nothing is remembered, so a resumed run needs nothing but its progress, and every rank computes the same number.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from megamor.config.schema import Config, DepthStep, RecursionConfig


def depth_steps(recursion: RecursionConfig) -> tuple[DepthStep, ...]:
    """A schedule that grows, as steps. Others have one: full depth.

    With n numbers of recursions to pass through, `linear` reaches the i-th (from 0) at u = i/n of the run, and `1-sqrt`
    where 1 - sqrt(1 - u) is i/n: it stays low for longer.
    """
    first, last = recursion.schedule_start, recursion.num_recursions
    if recursion.schedule == "steps":
        return recursion.schedule_steps
    if recursion.schedule not in ("linear", "1-sqrt"):
        return (DepthStep(0.0, last),)
    reached = [(number, (number - first) / (last - first + 1)) for number in range(first, last + 1)]
    power = 1 if recursion.schedule == "linear" else 2
    return tuple(DepthStep(1 - (1 - share) ** power, number) for number, share in reached)


def final_recursions(recursion: RecursionConfig) -> int:
    """The most recursions at the end of training, and so at inference."""
    return depth_steps(recursion)[-1].recursions


def grows(recursion: RecursionConfig) -> bool:
    """Whether a run may end before it has trained all recursions."""
    return recursion.schedule not in ("constant", "sampled")


def with_recursions(config: Config, most: int) -> Config:
    """`config` of a run that stopped growing at so many recursions."""
    reached = replace(config.recursion, schedule="steps", schedule_steps=(DepthStep(0.0, most),))
    return config if most == final_recursions(config.recursion) else replace(config, recursion=reached)


def recursions_at(config: Config, used: float, step: int) -> int:
    """The most recursions of the step after `step` steps, when the fraction `used` of the run is done."""
    recursion = config.recursion
    if recursion.schedule == "sampled":
        drawn = hashlib.blake2b(f"{config.run.seed} {step}".encode(), digest_size=8).digest()
        choices = recursion.num_recursions - recursion.schedule_start + 1
        return recursion.schedule_start + int.from_bytes(drawn, "big") % choices
    return [item.recursions for item in depth_steps(recursion) if item.at <= used][-1]


def describe_schedule(recursion: RecursionConfig) -> str:
    """The schedule in words; empty if it is constant."""
    if recursion.schedule == "constant":
        return ""
    if recursion.schedule == "sampled":
        return f"{recursion.schedule_start} to {recursion.num_recursions}, drawn for each step"
    first, *later = depth_steps(recursion)
    return ", ".join([str(first.recursions), *(f"{item.recursions} from {item.at:.1%} of the run" for item in later)])
