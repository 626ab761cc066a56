"""The most recursions of each training step: `recursion.schedule`, a function of the run's progress.

Nothing is remembered, so a resumed run needs nothing but its progress, and every rank computes the same number.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from megamor.config.schema import Config, DepthStep
from megamor.config.segments import stages


def depth_steps(config: Config) -> tuple[DepthStep, ...]:
    """A schedule that grows, as steps. Others have one: full depth.

    With n numbers of recursions to pass through, `linear` reaches the i-th (from 0) at u = i/n of the run, and `1-sqrt`
    where 1 - sqrt(1 - u) is i/n: it stays low for longer.
    """
    recursion, last = config.recursion, most_recursions(config)
    first = recursion.schedule_start
    if recursion.schedule == "steps":
        return recursion.schedule_steps
    if recursion.schedule not in ("linear", "1-sqrt"):
        return (DepthStep(0.0, last),)
    reached = [(number, (number - first) / (last - first + 1)) for number in range(first, last + 1)]
    power = 1 if recursion.schedule == "linear" else 2
    return tuple(DepthStep(1 - (1 - share) ** power, number) for number, share in reached)


def most_recursions(config: Config) -> int:
    """Recursions of the stage that has most; 1 without one."""
    return max((len(stage.schedule) for stage in stages(config)), default=1)


def final_recursions(config: Config) -> int:
    """The most recursions of a stage at the end of training, and so at inference."""
    return depth_steps(config)[-1].recursions


def grows(config: Config) -> bool:
    """Whether a run may end before it has trained all recursions."""
    return config.recursion.schedule not in ("constant", "sampled")


def with_recursions(config: Config, most: int) -> Config:
    """`config` of a run that stopped growing at so many recursions."""
    reached = replace(config.recursion, schedule="steps", schedule_steps=(DepthStep(0.0, most),))
    return config if most == final_recursions(config) else replace(config, recursion=reached)


def recursions_at(config: Config, used: float, step: int) -> int:
    """The most recursions of the step after `step` steps, when the fraction `used` of the run is done."""
    recursion = config.recursion
    if recursion.schedule == "sampled":
        drawn = hashlib.blake2b(f"{config.run.seed} {step}".encode(), digest_size=8).digest()
        choices = most_recursions(config) - recursion.schedule_start + 1
        return recursion.schedule_start + int.from_bytes(drawn, "big") % choices
    return [item.recursions for item in depth_steps(config) if item.at <= used][-1]


def describe_schedule(config: Config) -> str:
    """The schedule in words; empty if it is constant."""
    if config.recursion.schedule == "constant":
        return ""
    if config.recursion.schedule == "sampled":
        return f"{config.recursion.schedule_start} to {most_recursions(config)}, drawn for each step"
    first, *later = depth_steps(config)
    return ", ".join([str(first.recursions), *(f"{item.recursions} from {item.at:.1%} of the run" for item in later)])
