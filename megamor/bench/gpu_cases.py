"""Which models the GPU bench trains: published sizes, vanilla and recursive and MoR, in order of importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamor.config import Config, load_config
from megamor.errors import ConfigError

REFERENCE = "vanilla"
MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"


@dataclass(frozen=True)
class Size:
    """Name of the files in configs/model, and how many sequences a micro-batch begins with under `auto`."""

    prefix: str
    micro_batch: int


SIZES = {"360m": Size("360m", 16), "135m": Size("135m", 32), "1.7b": Size("1.7b", 8)}
"""By name, most important first."""

_CACHE, _SHARE = "recursion.kv_policy=recursion_wise", "recursion.kv_policy=share_first"
_EXPERT, _TOKEN = "router.kind=expert_choice", "router.kind=token_choice"

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    REFERENCE: ("", ()),
    "mor3_expert": ("_mor3", (_EXPERT, _CACHE)),
    "mor2_expert": ("_mor2", (_EXPERT, _CACHE)),
    "mor3_expert_share": ("_mor3", (_EXPERT, _SHARE)),
    "mor3_token": ("_mor3", (_TOKEN, _CACHE)),
    "mor4_expert": ("_mor4", (_EXPERT, _CACHE)),
    "rec3": ("_rec3", (_CACHE,)),
    "mor3_token_share": ("_mor3", (_TOKEN, _SHARE)),
    "mor2_expert_share": ("_mor2", (_EXPERT, _SHARE)),
    "mor4_expert_share": ("_mor4", (_EXPERT, _SHARE)),
    "mor2_token": ("_mor2", (_TOKEN, _CACHE)),
    "mor4_token": ("_mor4", (_TOKEN, _CACHE)),
    "rec2": ("_rec2", (_CACHE,)),
    "rec4": ("_rec4", (_CACHE,)),
}
"""Suffix of the file in configs/model and overrides, by name, most important first."""


@dataclass(frozen=True)
class Case:
    """One measurement to make. `overrides` are the user's, for all cases."""

    size: str
    name: str
    compiled: bool
    backend: str
    overrides: tuple[str, ...] = ()

    def config(self, micro_batch: int) -> Config:
        """Its configuration: one micro-batch a step, nothing that training needs and a bench doesn't."""
        suffix, own = CASES[self.name]
        fixed = (
            f"train.micro_batch_size={micro_batch}",
            f"train.global_batch_size={micro_batch}",
            f"train.compile={str(self.compiled).lower()}",
            f"parallel.backend={self.backend}",
            "train.max_steps=1",
            "optim.warmup_steps=0",
        )
        return load_config(MODELS / f"{SIZES[self.size].prefix}{suffix}.yaml", [*own, *fixed, *self.overrides])


def plan_cases(
    sizes: Sequence[str], names: Sequence[str], modes: Sequence[bool], backend: str, overrides: Sequence[str]
) -> list[Case]:
    """The measurements in order: per mode (compiled or not) and size all cases between two of vanilla.

    Raises:
        ConfigError: an unknown size or case.
    """
    for known, given in ((SIZES, sizes), (CASES, names)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(f"unknown {unknown[0]!r}; there are {', '.join(known)}")
    others = [name for name in CASES if name in names and name != REFERENCE]
    order = [REFERENCE, *others, REFERENCE] if others else [REFERENCE]
    return [
        Case(size, name, compiled, backend, tuple(overrides)) for compiled in modes for size in sizes for name in order
    ]
