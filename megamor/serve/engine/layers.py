"""Parameter sharing and KV policy as data: which pages each application of a block reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from megamor.errors import ConfigError
from megamor.model import Transformer
from megamor.serve.engine.pages import EVERY_TOKEN, TableSpec


@dataclass(frozen=True)
class LayerAccess:
    """One application of a block reads `layer` of the pages in the table of recursion `table`.

    If it `writes`, it does so before it reads, and `table` is its own recursion.
    """

    table: int
    layer: int
    writes: bool


@dataclass(frozen=True)
class Layers:
    """The layers of a model. `schedule` [recursion][index] names the core block applied there, `access` its KV access.

    `tables` are those of each sequence, `in_pool` counts the layers that a page of each pool stores.
    """

    schedule: tuple[tuple[int, ...], ...]
    access: tuple[tuple[LayerAccess, ...], ...]
    tables: tuple[TableSpec, ...]
    in_pool: dict[str, int]
    # Whether recursions use different weights in the same block (norms, LoRA), so that no call may mix them.
    differ: bool

    @staticmethod
    def of(model: Transformer) -> Layers:
        """The layers of `model`.

        Raises:
            ConfigError: its attention or KV policy can't be served, or it has several recursion stages.
        """
        if model.config.model.attention != "full":
            raise ConfigError(
                f"model.attention = {model.config.model.attention} can't be served: pages hold keys, not means of "
                "blocks. Use `megamor generate`, or export the model and use transformers"
            )
        if model.stages.keys() - {""}:
            # A batch brings together tokens at different depths of one core. With several cores a token would have to
            # wait for each of them, which the order of batches doesn't know yet.
            raise ConfigError(
                "a model of recursion.stages or router_layers can't be served: batches are formed around one shared "
                "core. Use `megamor generate`, or export the model and use transformers"
            )
        num_edge, stage = len(model.prelude) + len(model.coda), model.stage
        edge = (TableSpec("edge", EVERY_TOKEN),) if num_edge else ()
        if stage is None:
            return Layers((), (), edge, {"edge": num_edge}, differ=False)
        recursion = model.config.recursion
        if recursion.kv_policy in ("hybrid", "halted_reuse"):
            raise ConfigError(
                f"recursion.kv_policy = {recursion.kv_policy} can't be served: every recursion would need its own copy "
                "of all earlier keys. Train with recursion_wise or share_first, or use `megamor generate`"
            )
        if getattr(model.config.router, "granularity", "token") == "sequence":
            raise ConfigError(
                "router.granularity = sequence can't be served: the mean over a text isn't kept with its cached pages. "
                "Train with granularity: token, or use `megamor generate`"
            )
        schedule = stage.schedule[: stage.router.num_recursions]
        access = accesses(schedule, shared=recursion.kv_policy == "share_first")
        written = [item for row in access for item in row if item.writes]
        core = tuple(TableSpec("core", table) for table in sorted({item.table for item in written}))
        in_pool = {"edge": num_edge} if num_edge else {}
        in_pool["core"] = 1 + max(item.layer for item in written)
        differ = recursion.separate_norms or recursion.lora_rank > 0
        return Layers(schedule, access, edge + core, in_pool, differ)

    @property
    def num_recursions(self) -> int:
        """Most recursions a token can take; 0 for a model without a shared core."""
        return len(self.schedule)

    @cached_property
    def table_of(self) -> dict[int, int]:
        """Index among the tables of a sequence, by recursion."""
        return {spec.recursion: index for index, spec in enumerate(self.tables)}

    @cached_property
    def uniform(self) -> bool:
        """Whether one call of each block fits all rows of a core batch, whatever recursion they take.

        That needs the same blocks on the same layers in every recursion, and one table for all blocks of a recursion.
        """
        paths = {
            tuple(zip(blocks, (access.layer for access in row), strict=True))
            for blocks, row in zip(self.schedule, self.access, strict=True)
        }
        constant = all(len({(access.table, access.writes) for access in row}) == 1 for row in self.access)
        return len(paths) == 1 and constant and not self.differ

    def runs(self, index: int, recursions: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Split `recursions` into runs of neighbours that may go through their block at `index` in one call."""

        def kind(recursion: int) -> tuple[int, int, int]:
            # Rows of one call share the block's weights, and the tensor that holds the layer's pages.
            block = self.schedule[recursion][index]
            return block, self.access[recursion][index].layer, recursion if self.differ else 0

        for (block, _, _), run in groupby(recursions, key=kind):
            yield block, list(run)


def accesses(schedule: tuple[tuple[int, ...], ...], shared: bool) -> tuple[tuple[LayerAccess, ...], ...]:
    """Share-first if `shared`: the first application of a block writes, all later ones read what it wrote.

    Otherwise recursion-wise: every application has keys and values of its own.
    """
    stored: dict[int, LayerAccess] = {}
    table = []
    for recursion, blocks in enumerate(schedule):
        row, num_written = [], 0
        for block in blocks:
            if shared and block in stored:
                row.append(replace(stored[block], writes=False))
                continue
            # A page has layers only for the blocks that write in its recursion, which under share-first may be few.
            stored[block] = LayerAccess(recursion, num_written, True)
            num_written += 1
            row.append(stored[block])
        table.append(tuple(row))
    return tuple(table)
