"""Names of the shards that the jobs of an array write, and which of them exist.

Shard 3 of 16 (counted from 0) of the data set `data/pile` is the data set `data/pile_shard_00003_of_00016`; the name of
a split comes first: `data/pile_train_shard_00003_of_00016`. Merged in order they give what one run would have written.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable

from megamor.errors import ConfigError, DataError

_NAME = re.compile(r"(?P<base>.+)_shard_(?P<index>\d{5,})_of_(?P<count>\d{5,})", re.DOTALL)
_MISSING_SHOWN = 8


def parse_shard(text: str) -> tuple[int, int]:
    """Index and count from `i/n`, such as 3/16. Raises ConfigError unless 0 <= i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 <= index < count:
        raise ConfigError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/16 to 15/16")
    return index, count


def shard_prefix(prefix: str, index: int, count: int) -> str:
    """Prefix of shard `index` (from 0) of `count`."""
    return f"{prefix}_shard_{index:05d}_of_{count:05d}"


def split_shard_prefix(prefix: str) -> tuple[str, int, int] | None:
    """Base prefix, index and count of a name made by `shard_prefix`, or None for any other name."""
    match = _NAME.fullmatch(prefix)
    return (match["base"], int(match["index"]), int(match["count"])) if match else None


def find_shards(prefix: str) -> list[str]:
    """Prefixes of all shards of `prefix`, in order. DataError if none or some are missing, or if counts differ."""
    found = [path.removesuffix(".idx") for path in glob.glob(f"{glob.escape(prefix)}_shard_*_of_*.idx")]
    shards = [shard for shard in map(split_shard_prefix, found) if shard and shard[0] == prefix]
    counts = sorted({count for _, _, count in shards})
    if not shards:
        raise DataError(f"there are no shards {prefix}_shard_*_of_*.idx; write them with --shard i/n")
    if len(counts) > 1:
        raise DataError(
            f"there are shards of {prefix} from runs with {' and '.join(map(str, counts))} shards; remove the old "
            "ones, or name those to merge with --inputs"
        )
    prefixes = [shard_prefix(prefix, index, counts[0]) for index in sorted(index for _, index, _ in shards)]
    require_complete(prefixes)
    return prefixes


def require_complete(prefixes: Iterable[str]) -> None:
    """Raise DataError, naming the missing ones, if some shards of a set are among `prefixes` and others aren't."""
    sets: dict[tuple[str, int], set[int]] = {}
    for shard in map(split_shard_prefix, prefixes):
        if shard:
            base, index, count = shard
            sets.setdefault((base, count), set()).add(index)
    for (base, count), present in sets.items():
        missing = [index for index in range(count) if index not in present]
        if missing:
            shown = ", ".join(map(str, missing[:_MISSING_SHOWN])) + (", …" if len(missing) > _MISSING_SHOWN else "")
            raise DataError(
                f"{len(missing)} of the {count} shards of {base} are missing: {shown}; write them with --shard "
                f"{missing[0]}/{count} and so on (first missing: {shard_prefix(base, missing[0], count)}.idx)"
            )
