"""The keys of a study file and the types of their values; docs/studies.md says what they mean."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, with_config
from typing_extensions import Required, TypedDict

from megamor.config import constraints as c
from megamor.config import read_mapping
from megamor.errors import ConfigError

Item = TypeVar("Item")
Several = Annotated[
    list[Item], Field(min_length=1), BeforeValidator(lambda value: value if isinstance(value, list) else [value])
]
"""A list, which may be given as its only item."""
Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.+-]*$")]
"""A part of a directory's name."""
_closed = with_config(ConfigDict(extra="forbid"))


@_closed
class _Arm(TypedDict, total=False):
    preset: str
    set: Several[dict[str, Any]]
    of: str
    exit: str
    threshold: float
    lr: Several[c.Positive]
    label: str


@_closed
class _Budget(TypedDict, total=False):
    flops: Several[c.Positive]
    tokens: Several[c.PositiveInt]


@_closed
class _Tasks(TypedDict, total=False):
    names: Required[Several[str]]
    num_fewshot: c.NonNegativeInt
    limit: c.PositiveInt


@_closed
class _Expected(TypedDict):
    what: str
    value: Any
    source: str


@_closed
class _Law(TypedDict):
    baseline: str
    families: Several[str]


_Data = TypedDict(
    "_Data",
    {"text": Several[str], "corpus": str, "from": str, "tokenizer": str, "vocab_size": c.PositiveInt,
     "validation": c.BetweenZeroAndOne, "validation_split": str},
    total=False,
)  # fmt: skip
_closed(_Data)


def _named(arms: Any) -> Any:
    """A list of presets as a mapping."""
    if not isinstance(arms, list):
        return arms
    if not all(isinstance(name, str) for name in arms) or len({*arms}) < len(arms):
        raise ValueError("give each preset once, or a mapping {name: {preset: NAME, set: {...}}, ...}")
    return dict.fromkeys(arms)


_Arms = Annotated[dict[Name, Annotated[_Arm, BeforeValidator(lambda value: {} if value is None else value)]],
                  BeforeValidator(_named)]  # fmt: skip


@_closed
class _File(TypedDict, total=False):
    question: str
    base: str
    set: dict[str, Any]
    data: _Data
    arms: _Arms
    axes: dict[str, _Arms]
    match: Literal["executed_flops", "tokens", "parameters", "none"]
    budget: _Budget
    lr: Several[c.Positive]
    pilot: c.PositiveFraction
    seeds: c.PositiveInt
    warmup: c.Fraction
    precision: Literal["auto", "bf16", "fp32"]
    sequences: c.PositiveInt
    ngrams: list[c.PositiveInt]
    tables: list[c.NonNegativeInt]
    tasks: Annotated[_Tasks, BeforeValidator(lambda value: {"names": value} if isinstance(value, list) else value)]
    pairs: list[tuple[str, str]]
    expected: list[_Expected]
    law: _Law


@cache
def _adapter() -> TypeAdapter[_File]:
    return TypeAdapter(_File)


def checked_keys(path: Path) -> dict[str, Any]:
    """What a study file says, in one form: lists are lists, presets a mapping, and what is null is left out.

    Raises:
        ConfigError: the file can't be read, or keys or types are wrong (all of them in one message).
    """
    given = {key: value for key, value in read_mapping(path).items() if value is not None}
    try:
        return {**_adapter().validate_python(given)}
    except ValidationError as error:
        problems = [_explained(problem) for problem in error.errors(include_url=False)]
    raise ConfigError("\n  ".join([f"{path} is no study (docs/studies.md):", *problems]))


def _explained(problem: Any) -> str:
    """A line about one of pydantic's problems."""
    *around, name = problem["loc"]
    key, words = ".".join(map(str, problem["loc"])).replace(".[key]", ""), problem["msg"]
    if problem["type"] == "extra_forbidden":
        known = {(): _File, ("data",): _Data, ("budget",): _Budget, ("tasks",): _Tasks, ("law",): _Law}
        keys = known.get(tuple(around), _Expected if "expected" in around else _Arm).__annotations__
        near = get_close_matches(str(name), keys, n=1)
        return f"{key}: unknown key; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(keys)}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    if problem["type"] == "string_pattern_mismatch":
        words = "give letters, digits, _ . + and -"
    words = words.removeprefix("Value error, ").replace("valid dictionary", "mapping").replace("valid tuple", "pair")
    return f"{key} = {problem['input']!r}: {words[0].lower()}{words[1:]}"
