"""Which layer of which table each application of a block reads and writes: sharing and KV policy as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TypeVar

from megamor.errors import ConfigError
from megamor.model import Transformer
from megamor.serve.engine.pages import EVERY_TOKEN, TableSpec

T = TypeVar("T")


@dataclass(frozen=True)
class LayerAccess:
    """An application of a block reads `layer` of the pages in the table of recursion `table`, after writing if it does.

    Whoever writes is of that recursion.
    """

    table: int
    layer: int
    writes: bool


@dataclass(frozen=True)
class Layers:
    """`access` [recursion][place in the core]; `in_pool` counts the layers of a page; `schedule` are blocks."""

    schedule: tuple[tuple[int, ...], ...]
    access: tuple[tuple[LayerAccess, ...], ...]
    tables: tuple[TableSpec, ...]
    in_pool: dict[str, int]
    differ: bool
    """Whether recursions differ in the weights of a block, so that no call may mix them."""

    @staticmethod
    def of(model: Transformer) -> Layers:
        """The layers of a model.

        Raises:
            ConfigError: a KV policy that can't be served.
        """
        num_edge, stage = len(model.prelude) + len(model.coda), model.stage
        edge = (TableSpec("edge", EVERY_TOKEN),) if num_edge else ()
        if stage is None:
            return Layers((), (), edge, {"edge": num_edge}, differ=False)
        recursion = model.config.recursion
        if recursion.kv_policy == "hybrid":
            raise ConfigError(
                "recursion.kv_policy = hybrid can't be served: deeper recursions would need copies of all earlier "
                "keys; train with recursion_wise or share_first, or use megamor.cli.generate"
            )
        schedule = stage.schedule[: stage.router.num_recursions]
        access = own_layers(schedule) if recursion.kv_policy == "recursion_wise" else first_layers(schedule)
        written = [item for row in access for item in row if item.writes]
        core = tuple(TableSpec("core", table) for table in sorted({item.table for item in written}))
        in_pool = {"edge": num_edge} if num_edge else {}
        in_pool["core"] = 1 + max(item.layer for item in written)
        differ = recursion.separate_norms or recursion.lora_rank > 0
        return Layers(schedule, access, edge + core, in_pool, differ)

    @property
    def num_recursions(self) -> int:
        """How many there are at most."""
        return len(self.schedule)

    @property
    def num_places(self) -> int:
        """Blocks that a recursion applies."""
        return len(self.schedule[0])

    @cached_property
    def uniform(self) -> bool:
        """Whether all recursions go the same way through the same blocks and layers, so that one call fits all rows."""
        ways = {
            tuple(zip(blocks, (access.layer for access in row), strict=True))
            for blocks, row in zip(self.schedule, self.access, strict=True)
        }
        constant = all(len({(access.table, access.writes) for access in row}) == 1 for row in self.access)
        return len(ways) == 1 and constant and not self.differ

    def table(self, recursion: int) -> int:
        """The place of a table among those of a sequence."""
        return next(place for place, spec in enumerate(self.tables) if spec.recursion == recursion)

    def runs(self, place: int, parts: Sequence[T], key: Callable[[T], int]) -> Iterator[tuple[int, list[T]]]:
        """Neighbours among `parts`, whose recursion `key` tells, that may go through the block at `place` together."""

        def kind(part: T) -> tuple[int, int, int]:
            recursion = key(part)
            block = self.schedule[recursion][place]
            return block, self.access[recursion][place].layer, recursion if self.differ else 0

        for (block, _, _), run in groupby(parts, key=kind):
            yield block, list(run)


def own_layers(schedule: tuple[tuple[int, ...], ...]) -> tuple[tuple[LayerAccess, ...], ...]:
    """Recursion-wise: each application has its own keys and values."""
    return tuple(
        tuple(LayerAccess(recursion, place, True) for place in range(len(blocks)))
        for recursion, blocks in enumerate(schedule)
    )


def first_layers(schedule: tuple[tuple[int, ...], ...]) -> tuple[tuple[LayerAccess, ...], ...]:
    """Share-first: a block's first application writes, all later ones read that."""
    stored: dict[int, LayerAccess] = {}
    access = []
    for recursion, blocks in enumerate(schedule):
        row, count = [], 0
        for block in blocks:
            if block in stored:
                row.append(LayerAccess(stored[block].table, stored[block].layer, False))
                continue
            stored[block] = LayerAccess(recursion, count, True)
            count += 1
            row.append(stored[block])
        access.append(tuple(row))
    return tuple(access)
