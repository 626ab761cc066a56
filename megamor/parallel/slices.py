"""A tensor of which this rank holds some boxes, for torch.distributed.checkpoint where DTensor doesn't fit.

ZeRO's ranks hold ranges of flattened parameters, which are not boxes of the parameter and so no DTensor; a copy in
host memory isn't one either. A box is its offsets in the whole tensor and its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], Tensor]


class Slices(torch.Tensor):
    """Stands for a tensor of shape `size` of which this rank holds `boxes` (possibly none). It can't compute.

    The three methods at the end are torch.distributed.checkpoint's protocol: it asks a tensor what there is to write,
    and for the memory to read into.
    """

    boxes: Sequence[Box]

    @staticmethod
    def __new__(cls: type[Slices], size: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box]) -> Slices:
        self: Slices = torch.Tensor._make_wrapper_subclass(cls, tuple(size), dtype=dtype)
        self.boxes = boxes
        return self

    def __init__(self, size: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box]) -> None:
        super().__init__()

    # torch.distributed.checkpoint accepts tensors only, so this is one. It has no memory: any operation is a mistake.
    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise TypeError(f"{function} was called on slices of a tensor")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Slices({tuple(self.shape)}, {[(offsets, tuple(values.shape)) for offsets, values in self.boxes]})"

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(values), self.shape),
            )
            for chunk, (_, values) in zip(self.__create_chunk_list__(), self.boxes, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), values.shape) for offsets, values in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(values for offsets, values in self.boxes if torch.Size(offsets) == index.offset)


def boxes_of_range(flat: Tensor, start: int, shape: Sequence[int]) -> Iterator[Box]:
    """The range of a flattened tensor of `shape` that begins at element `start`, as boxes: views of `flat` [n].

    There are at most 2·dimensions - 1 of them. In two dimensions these are the end of a row, whole rows, and the
    beginning of a row; in more, the two incomplete ones are divided again.
    """
    if len(shape) < 2:
        yield (start,) * len(shape), flat.view(shape if len(shape) == 0 else -1)
        return
    row = prod(shape[1:])
    first, skipped = divmod(start, row)
    if skipped or len(flat) < row:  # an incomplete row comes first: it is a range of a smaller tensor
        count = min(row - skipped, len(flat))
        for offsets, values in boxes_of_range(flat[:count], skipped, shape[1:]):
            yield (first, *offsets), values.unsqueeze(0)
        if count < len(flat):
            yield from boxes_of_range(flat[count:], start + count, shape)
        return
    rows = len(flat) // row
    yield (first,) + (0,) * (len(shape) - 1), flat[: rows * row].view(rows, *shape[1:])
    if rows * row < len(flat):
        yield from boxes_of_range(flat[rows * row :], start + rows * row, shape)
