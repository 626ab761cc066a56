"""What the training bench compares: models of equal effective depth, checkpointing policies, compiled or not.

A case is a configuration file with overrides; nothing here needs torch. The models of one configuration have the same
width, vocabulary and batch. The published sizes have a file each in configs/model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megamor.config import Config, load_config
from megamor.errors import ConfigError

REFERENCE = "vanilla"
MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"
_CACHE, _SHARE = "recursion.kv_policy=recursion_wise", "recursion.kv_policy=share_first"
_FIXED, _EXPERT, _TOKEN = "router.kind=fixed", "router.kind=expert_choice", "router.kind=token_choice"
_DENSE = ("recursion.num_recursions=1", "recursion.sharing=none", _CACHE, _FIXED)

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    REFERENCE: ("vanilla", _DENSE),
    "recursive": ("recursive, fixed depth", (_CACHE, _FIXED)),
    "mor_expert": ("MoR, expert-choice", (_CACHE, _EXPERT)),
    "mor_expert_share": ("MoR, expert-choice, share-first", (_SHARE, _EXPERT)),
    "mor_threshold": ("MoR, EMA threshold", (_CACHE, "router.kind=ema_threshold")),
    "mor_token": ("MoR, token-choice", (_CACHE, _TOKEN)),
}
"""Cases of one configuration: label and overrides by name."""
BASELINES = {"hf-llama": "Hugging Face Llama, SDPA"}
"""Other implementations of vanilla: label by name."""

SIZES = ("360m", "135m", "1.7b")
"""Published sizes by the prefix of their files in configs/model, most important first."""

POLICIES = ("none", "selective:sdpa+mm", "selective:sdpa", "recursion", "block")
"""Activation checkpointing policies; after the colon, the operations whose results `selective` keeps."""


@dataclass(frozen=True)
class Case:
    """One model to measure: a configuration file with overrides.

    `baseline` names another implementation of the dense model; None means megamor's.
    """

    name: str
    label: str
    path: Path
    overrides: tuple[str, ...]
    baseline: str | None = None
    policy: str | None = None
    """Activation checkpointing, where policies are compared."""
    fill: float | None = None
    """Mean fraction of real tokens in a window, the rest being padding; None: no padding."""
    computes_padding: bool = False
    accumulation: int = 1
    """Micro-batches of a step."""
    documents: bool = False
    """Whether the windows hold several documents, of lengths like those of web pages."""

    @property
    def fill_left_out(self) -> float | None:
        """`fill` where padding is left out, None where every row is computed."""
        return None if self.computes_padding else self.fill

    def config(self, micro_batch: int | None = None) -> Config:
        """Its configuration, with a step of `accumulation` micro-batches of `micro_batch` sequences (default: one step
        as configured).

        Raises:
            ConfigError: as `load_config`.
        """
        # Batches are random tokens, without documents unless a case is about them: no other may count on a mask that
        # makes attention cheaper.
        fixed = [f"data.document_mask={str(self.documents).lower()}"]
        if micro_batch is not None:
            batch = micro_batch * self.accumulation
            fixed += [f"train.micro_batch_size={micro_batch}", f"train.global_batch_size={batch}"]
        return load_config(self.path, [*self.overrides, *fixed])


def cases_of_config(
    path: str | Path, overrides: Sequence[str], names: Sequence[str], baselines: Sequence[str] = ()
) -> list[Case]:
    """The named cases and baselines of the configuration at `path`.

    Raises:
        ConfigError: an unknown name, the reference left out, or a configuration that isn't a recursive one.
    """
    check_names(names, CASES, "case")
    check_names(baselines, BASELINES, "baseline")
    if REFERENCE not in names:
        raise ConfigError(f"--cases has no {REFERENCE!r}, which the others are compared with; add it")
    if load_config(path, overrides).recursion.num_recursions == 1:
        raise ConfigError(f"{path}: recursion.num_recursions is 1, there is nothing to compare; choose 2 or more")
    # A router of the configuration's own kind keeps its settings; any other starts from its defaults.
    cases = [Case(name, CASES[name][0], Path(path), (*overrides, *CASES[name][1])) for name in dict.fromkeys(names)]
    others = [Case(name, BASELINES[name], Path(path), (*overrides, *_DENSE), name) for name in dict.fromkeys(baselines)]
    # The reference comes first: ratios are to the first case of a comparison.
    return sorted(cases, key=lambda case: case.name != REFERENCE) + others


def case_of_size(size: str, name: str, overrides: Sequence[str] = ()) -> Case:
    """A case of a published size by its parts: `vanilla`, or the file in configs/model, router and `share`."""
    shape, *words = name.split("_")
    own = [_SHARE if "share" in words else _CACHE] if shape != REFERENCE else []
    own += [_TOKEN if "token" in words else _EXPERT] if words else []
    # The files describe a shape alone; what else a run must say has no effect here.
    own += ["train.max_steps=1", "optim.warmup_steps=0", *overrides]
    suffix = "" if shape == REFERENCE else f"_{shape}"
    return Case(name, f"{size} {name}", MODELS / f"{size}{suffix}.yaml", tuple(own))


def with_policy(case: Case, policy: str) -> Case:
    """`case` under an activation checkpointing policy such as `block` or `selective:sdpa+mm`."""
    mode, _, kept = policy.partition(":")
    operations = [f"train.selective_ops=[{kept.replace('+', ',')}]"] if kept else []
    own = (*case.overrides, f"train.activation_checkpointing={mode}", *operations)
    return replace(case, overrides=own, policy=policy)


def with_padding(case: Case, fill: float) -> list[Case]:
    """`case` on windows with padding: computed like tokens, and left out."""
    computed = replace(case, name="computed", label=f"{case.label}, padding computed", fill=fill, computes_padding=True)
    return [computed, replace(case, name="left_out", label=f"{case.label}, padding left out", fill=fill)]


def check_names(names: Iterable[str], known: Collection[str], what: str) -> None:
    """Refuse names that are not `known`.

    Raises:
        ConfigError: for the first unknown name.
    """
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
