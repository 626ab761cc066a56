"""A study file: which models are compared, on what data, at which budget, with how many seeds.

    base: quickstart                     # what the arms have in common: a configuration file, or this one
    data: {text: [my_book.txt]}          # or a corpus of `megamor fetch-data`, or the data sets of the base
    arms: [vanilla, recursive, mor]      # presets; or names with changes: {wide: {set: {model: {dim: 256}}}}
    budget: {flops: 1e13}                # or {tokens: 1e7}; a list makes a run for each

docs/studies.md lists all keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any, Literal

from megamor.config import Config, ScoredConfig
from megamor.config.convert import ROUTERS
from megamor.config.derive import derive
from megamor.config.exits import ExitRule
from megamor.config.load import load_layers
from megamor.config.segments import stages
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.model.flops import expected_steps
from megamor.study.keys import checked_keys

Match = Literal["executed_flops", "tokens", "parameters", "none"]
DEFAULT_GRID = (0.4, 1.0, 2.5)
"""Learning rates that are tried, as multiples of the base's: with one rate for all, the arm that it suits wins."""
FEWEST_STEPS = 50
"""Of a run: with fewer, the last step alone could be more than the 2 % by which runs may differ."""
PARAMETER_TOLERANCE = 0.02
"""Largest relative difference of unique parameters that counts as matched."""
_FIXED = (
    "run", "data", "train.global_batch_size", "train.ramp", "train.max_steps", "train.max_tokens", "train.max_flops",
    "train.stop_at_step",
)  # fmt: skip
"""Settings that arms can't have of their own, since they would see other data, or another budget."""


@dataclass(frozen=True)
class Arm:
    """A model of the study. `config` lacks what a run adds: name, seed, budget, learning rate.

    `of` names the arm whose trained weights this one evaluates, with `exit`; such an arm isn't trained.
    """

    name: str
    config: Config
    rates: tuple[float, ...]
    of: str | None = None
    exit: ExitRule | None = None
    label: str = ""

    @property
    def parameters(self) -> tuple[int, int]:
        """Unique parameters with and without the embedding."""
        derived = derive(self.config, 1)
        return derived.unique_parameters_with_embedding, derived.unique_parameters


@dataclass(frozen=True)
class Study:
    """A study, read and checked. Budgets are executed FLOPs, or tokens where `match` isn't `executed_flops`; the only
    one is 0 with `none`, where each arm has a length of its own."""

    name: str
    file: Path
    arms: tuple[Arm, ...]
    budgets: tuple[float, ...]
    match: Match = "executed_flops"
    question: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    pilot: float = 0.25
    """Budget of a run that tries a learning rate, as a fraction of the smallest budget."""
    seeds: int = 3
    warmup: float = 0.05
    precision: str | None = None
    sequences: int | None = None
    ngrams: tuple[int, ...] = (1, 2, 3)
    tables: tuple[int, ...] = ()
    """Contexts, in tokens, of the count tables whose accuracy is a floor."""
    tasks: Mapping[str, Any] = field(default_factory=dict)
    """Downstream tasks to evaluate: `names`, `num_fewshot`, `limit`."""
    pairs: tuple[tuple[str, str], ...] = ()
    expected: tuple[Mapping[str, Any], ...] = ()
    law: Mapping[str, Any] = field(default_factory=dict)

    @property
    def limit(self) -> str:
        """The setting in `train` that the budget sets."""
        return "max_flops" if self.match == "executed_flops" else "max_tokens"

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def trained(self, arm: Arm) -> Arm:
        """The arm whose weights `arm` uses."""
        return arm if arm.of is None else self.arm(arm.of)


def load_study(path: str | Path, *, seeds: int | None = None) -> Study:
    """Read and check a study file; `seeds` replaces its number of seeds.

    Raises:
        ConfigError: the file can't be read, a key is unknown, an arm's configuration is invalid, or the arms aren't
            matched (the message gives the two numbers).
    """
    path = Path(path)
    given = checked_keys(path)
    for key in ("arms" if "axes" not in given else "axes", "budget"):
        if not given.get(key) and not (key == "budget" and given.get("match") == "none"):
            raise ConfigError(f"{path}: {key} is missing; see docs/studies.md")
    if "arms" in given and "axes" in given:
        raise ConfigError(f"{path}: give either arms or axes")
    for key in ("max_steps", "max_tokens", "max_flops"):
        if key in (given.get("set", {}).get("train") or {}):
            raise ConfigError(f"{path}: set.train.{key}: the `budget` says how long to train; leave this out")
    match, budgets = _budgets(path, given)
    data = _data_layer(path, given.get("data", {}))
    limit = "max_flops" if match == "executed_flops" else "max_tokens"
    layers = [(f"{path}: data", data), (f"{path}: set", given.get("set", {}))]
    length: dict[str, Any] = {"max_steps": None, "max_tokens": None, "max_flops": None, limit: max(budgets)}
    if match == "none":
        length = {}
    final = ("budget", {"train": length, "optim": {"warmup_steps": 0}})  # every run sets its own warm-up
    base_path = _base(path, given.get("base"))
    base = load_layers(base_path, [*layers, final])
    arms = []
    for name, values in _arms(path, given).items():
        own_length = ("train.max_steps", "train.max_tokens") if match == "none" else ()
        changes = [_checked_changes(path, name, each, own_length) for each in values.get("set", [])]
        preset, of = values.get("preset", name if name in PRESETS else None), values.get("of")
        if of is not None and {"set", "preset", "lr"} & set(values):
            raise ConfigError(
                f"{path}: arms.{name}: an arm `of` another one has that one's settings; leave out `set`, `preset`, `lr`"
            )
        if ("exit" in values) != ("threshold" in values):
            raise ConfigError(f"{path}: arms.{name}: give both, exit and threshold, or neither")
        changes = [_preset(path, preset, base), *changes] if preset else changes
        config = load_layers(base_path, [*layers, *((f"{path}: arms.{name}", each) for each in changes), final])
        rule = ExitRule(values["exit"], values["threshold"]) if "exit" in values else None
        own = values.get("lr", given.get("lr", ()))
        tuned = match != "none" and config.init.branch_from is None
        own = own or [float(f"{factor * config.optim.lr:.3g}") for factor in (DEFAULT_GRID if tuned else (1.0,))]
        if not tuned and len(own) > 1:
            raise ConfigError(f"{path}: lr of {name} = {own}: an arm that branches or has its own length has one rate")
        if len({f"{rate:.3g}" for rate in own}) < len({*own}):
            raise ConfigError(f"{path}: lr of {name} = {own}: give rates that differ in three digits")
        arms.append(Arm(name, config, tuple(sorted({*own})), of, rule, values.get("label", name)))
    study = Study(
        name=path.stem,
        file=path,
        arms=tuple(arms),
        budgets=budgets,
        match=match,
        question=" ".join(given.get("question", "").split()),
        data=_located(path, given.get("data", {})),
        pilot=given.get("pilot", 0.25),
        seeds=seeds or given.get("seeds", 3),
        warmup=given.get("warmup", 0.05),
        precision=given.get("precision"),
        sequences=given.get("sequences"),
        ngrams=tuple(given.get("ngrams", (1, 2, 3))),
        tables=tuple(given.get("tables", ())),
        tasks=given.get("tasks", {}),
        pairs=tuple(given.get("pairs", ())),
        expected=tuple(given.get("expected", ())),
        law=given.get("law", {}),
    )
    study = replace(study, arms=tuple(_with_weights_of(study, arm) for arm in study.arms))
    _check(study)
    return study


def _base(path: Path, given: str | None) -> Path | None:
    """The configuration file that `base` names, relative to the study; `quickstart` comes with the package."""
    if given == "quickstart":
        return Path(__file__).parents[1] / "cli" / "quickstart.yaml"
    return None if given is None else path.parent / given


def _budgets(path: Path, given: Mapping[str, Any]) -> tuple[Match, tuple[float, ...]]:
    """What arms are matched by, and the budgets."""
    budget, match = given.get("budget", {}), given.get("match")
    if match == "none":
        if budget:
            raise ConfigError(f"{path}: budget = {budget!r} with match = none: give each arm its train.max_steps")
        return match, (0.0,)
    if len(budget) != 1:
        raise ConfigError(f"{path}: budget = {budget!r}: give either flops or tokens")
    unit, value = next(iter(budget.items()))
    implied: Match = "executed_flops" if unit == "flops" else "tokens"
    if match not in (None, implied, "parameters" if unit == "tokens" else implied):
        raise ConfigError(
            f"{path}: match = {match!r} doesn't fit a budget of {unit}: budgets of flops match executed_flops, those "
            "of tokens match tokens or parameters"
        )
    if len({f"{each:.2g}" for each in value}) < len({*value}):
        raise ConfigError(f"{path}: budget.{unit} = {value}: give numbers that differ in two digits")
    return match or implied, tuple(sorted({*value}))


def _arms(path: Path, given: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Arms by name, and what the file says about each. With `axes` they are all combinations of the axes' values."""
    if "axes" in given:
        arms: dict[str, Mapping[str, Any]] = {}
        for choice in product(*(values.items() for values in given["axes"].values())):
            merged: dict[str, Any] = {}
            for _, value in choice:
                merged = {**merged, **value, "set": [*merged.get("set", ()), *value.get("set", ())]}
            arms["_".join(str(name) for name, _ in choice)] = merged
        return arms
    found: dict[str, Mapping[str, Any]] = given["arms"]
    for name, values in found.items():
        if not values and name not in PRESETS:
            near = get_close_matches(str(name), PRESETS, n=1)
            hint = f"did you mean {near[0]}?" if near else "give it a `preset` or changes in `set`"
            raise ConfigError(f"{path}: arms.{name} is no preset ({', '.join(PRESETS)}); {hint}")
    return found


PRESETS = ("vanilla", "recursive", "mor", *(kind for kind in ROUTERS if kind not in ("fixed", "custom")))
"""Arms that need no changes of their own: models made from the base by its router or its sharing."""


def _preset(path: Path, name: str, base: Config) -> dict[str, Any]:
    """The changes that make the arm `name` of the base.

    Raises:
        ConfigError: there is no such preset, or the base has no shared core to route through.
    """
    if name not in PRESETS:
        raise ConfigError(f"{path}: preset = {name!r}: give one of {', '.join(PRESETS)}")
    if name == "vanilla":
        return {"recursion": {"num_recursions": 1, "sharing": "none"}, "router": {"kind": "fixed"}}
    if base.recursion.num_recursions < 2:
        raise ConfigError(
            f"{path}: the arm {name} needs recursion.num_recursions of 2 or more: name a `base` that has it, such as "
            "quickstart, or set it in `set`"
        )
    if name == "recursive":
        return {"router": {"kind": "fixed"}}
    kind = "expert_choice" if name == "mor" else name
    if kind == base.router.kind:
        return {}
    # The control must differ in what it selects, not in how much of the core's result it lets through.
    alpha = {"alpha": base.router.alpha} if isinstance(base.router, ScoredConfig) else {}
    return {"router": {"kind": kind, **(alpha if issubclass(ROUTERS[kind], ScoredConfig) else {})}}


def _checked_changes(path: Path, name: str, changes: Mapping[str, Any], allowed: tuple[str, ...]) -> Mapping[str, Any]:
    """`changes` of the arm `name`; ConfigError if they would make it see other data, or take another budget."""
    for section, keys in changes.items():
        for key in (section, *(f"{section}.{key}" for key in (keys if isinstance(keys, Mapping) else ()))):
            if key in _FIXED and key not in allowed:
                raise ConfigError(
                    f"{path}: arms.{name}.set has {key}: arms that differ in it aren't matched; set it for all of them "
                    "in `set` or `budget`"
                )
    return changes


def _data_layer(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that `data.prepare` fulfils; empty where the base's own data are used."""
    if ("text" in data) + ("corpus" in data) != (1 if data else 0):
        raise ConfigError(f"{path}: data: give `text` (files) or `corpus` (a name); found {', '.join(data)}")
    if data and data.get("validation", 0.03) > 0.5:
        raise ConfigError(f"{path}: data.validation = {data['validation']}: give the fraction to keep, at most 0.5")
    layer = {"model": {"vocab_size": data["vocab_size"]}} if "vocab_size" in data else {}
    return {**layer, "data": {"train": [], "validation": {}, "tokenizer": None}} if data else {}


def _located(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """The key `data`, with files looked for where the study is."""
    found = dict(data)
    if "text" in found:
        found["text"] = [str(path.parent / each) for each in found["text"]]
    if found.get("tokenizer", "bpe") not in ("bpe", "char"):
        found["tokenizer"] = str(path.parent / found["tokenizer"])
    return found


def _with_weights_of(study: Study, arm: Arm) -> Arm:
    if arm.of is None:
        return arm
    if (trained := next((each for each in study.arms if (each.name, each.of) == (arm.of, None)), None)) is None:
        raise ConfigError(
            f"{study.file}: arms.{arm.name}.of = {arm.of!r}: there is no such arm with weights of its own"
        )
    return replace(arm, config=trained.config, rates=trained.rates)


def _check(study: Study) -> None:
    """Raises ConfigError if an arm can't run, or the arms aren't matched."""
    names = [arm.name for arm in study.arms]
    for arm in study.arms:
        if arm.of is not None and (arm.of not in names or study.arm(arm.of).of is not None):
            raise ConfigError(f"{study.file}: arms.{arm.name}.of = {arm.of!r}: there is no such arm that is trained")
        try:
            validate(replace(arm.config, run=replace(arm.config.run, name=arm.name)))  # runs have it in their names
        except ConfigError as error:
            raise ConfigError(f"{study.file}: the arm {arm.name}: {error}") from error
        if arm.config.init.branch_from is not None and study.seeds > 1:
            raise ConfigError(
                f"{study.file}: the arm {arm.name} continues {arm.config.init.branch_from} in the order of its data, "
                f"so seeds = {study.seeds} can't differ: give seeds: 1"
            )
        if arm.exit and not any(len(stage.schedule) > arm.exit.first for stage in stages(arm.config)):
            raise ConfigError(f"{study.file}: the arm {arm.name} has too few recursions for exit = {arm.exit.name}")
        if study.law and len(stages(arm.config)) > 1:
            raise ConfigError(f"{study.file}: law: {arm.name} has several stages, and the law knows one depth only")
        train = replace(arm.config.train, max_flops=study.budgets[0])
        if (
            study.match == "executed_flops"
            and (steps := expected_steps(replace(arm.config, train=train))) < FEWEST_STEPS
        ):
            raise ConfigError(
                f"{study.file}: budget.flops = {study.budgets[0]:.3g} are {steps} steps of {arm.name}, and runs end "
                f"with whole steps: give at least {study.budgets[0] * FEWEST_STEPS / steps:.2g}, or lower "
                "train.global_batch_size"
            )
    if len({arm.label for arm in study.arms}) < len(names):
        raise ConfigError(f"{study.file}: two arms have the same label, and tables would mix them: rename one")
    for ending in (study.law.get("baseline"), *study.law.get("families", (None,))) if study.law else ():
        if not any(name.endswith(f"_{ending}") for name in names):
            raise ConfigError(f"{study.file}: law: give baseline and families; no arm's name ends with _{ending}")
    for key in ("seq_len", "vocab_size"):
        values = {
            getattr(arm.config.data if key == "seq_len" else arm.config.model, key): arm.name for arm in study.arms
        }
        if len(values) > 1:
            (first, one), (second, other) = list(values.items())[:2]
            raise ConfigError(f"{study.file}: {key} is {first} in {one} and {second} in {other}: not matched")
    if study.match == "parameters":
        counts = sorted((arm.parameters[1], arm.name) for arm in study.arms)
        (low, fewest), (high, most) = counts[0], counts[-1]
        if high > low * (1 + PARAMETER_TOLERANCE):
            raise ConfigError(
                f"{study.file}: match = parameters, but {fewest} has {low:,} and {most} has {high:,} unique parameters "
                "(no embedding): change their shapes, or match tokens or executed_flops"
            )
    for pair in study.pairs:
        if pair[0] == pair[1]:
            raise ConfigError(f"{study.file}: pairs: {pair[0]} is paired with itself")
        for name in pair:
            if name not in names:
                raise ConfigError(f"{study.file}: pairs: there is no arm {name!r}")
    for family in (study.law["baseline"], *study.law["families"]) if study.law else ():
        if not any(name.endswith(f"_{family}") for name in names):
            raise ConfigError(f"{study.file}: law: the name of no arm ends with _{family}: {', '.join(names)}")
    if len({f"{budget:.2g}" for budget in study.budgets}) < len(study.budgets):
        raise ConfigError(f"{study.file}: budget = {[*study.budgets]}: two of them are equal in two digits")
