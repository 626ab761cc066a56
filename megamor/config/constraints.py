"""Which values a setting accepts, declared beside its type: `lr: Positive`, `router: Annotated[..., ByKind()]`.

The two markers speak pydantic's protocol for annotations (`__get_pydantic_core_schema__`) without importing it. The
schema is part of the code of exported models, which must load with torch and transformers alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any, get_args


@dataclass(frozen=True)
class Range:
    """The finite numbers between bounds: `gt` and `lt` are excluded, `ge` and `le` included. `words` say the same."""

    words: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        schema = handler(source)
        schema |= {name: getattr(self, name) for name in ("gt", "ge", "lt", "le") if getattr(self, name) is not None}
        if schema["type"] == "float":
            schema["allow_inf_nan"] = False
            return schema
        schema.setdefault("le", sys.maxsize)  # torch and numpy count in 64 bits
        return {"type": "function-before", "function": {"type": "no-info", "function": _whole}, "schema": schema}


def _whole(value: Any) -> Any:
    """`30e9` is the integer 30000000000: YAML has no exponents for integers. Other values as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class ByKind:
    """Marks a union of dataclasses whose field `kind` says which of them is meant."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        choices = {member.kind: handler.generate_schema(member) for member in get_args(source)}
        return {"type": "tagged-union", "discriminator": "kind", "choices": choices}


@dataclass(frozen=True)
class Location:
    """Marks a string that names a file or directory, or the beginning of file names; see `paths.py`."""

    words: str = "a string (path)"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(source)


PathName = Annotated[str, Location()]
PositiveInt = Annotated[int, Range("a positive integer", gt=0)]
NonNegativeInt = Annotated[int, Range("zero or a positive integer", ge=0)]
ZeroStage = Annotated[int, Range("an integer from 0 to 3", ge=0, le=3)]
Positive = Annotated[float, Range("a positive number", gt=0)]
NonNegative = Annotated[float, Range("zero or a positive number", ge=0)]
Fraction = Annotated[float, Range("a number from 0 to 1", ge=0, le=1)]
PositiveFraction = Annotated[float, Range("a number above 0 and at most 1", gt=0, le=1)]
BelowOne = Annotated[float, Range("a number from 0 to just below 1", ge=0, lt=1)]
BetweenZeroAndOne = Annotated[float, Range("a number between 0 and 1", gt=0, lt=1)]
