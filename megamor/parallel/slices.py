"""A tensor of which this rank holds some boxes: what torch.distributed.checkpoint is given where DTensor doesn't fit.

That is so for ZeRO, whose ranks hold ranges of flattened parameters, and for copies in host memory that are written
while training goes on. A box is where it begins in the whole tensor and its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, ...], Tensor]


class Slices(torch.Tensor):
    """Stands for a tensor of shape `size`; holds `boxes`, which may be none, and computes nothing.

    Fulfils the protocol by which torch.distributed.checkpoint asks a tensor what it has: to write it, and to read into
    it in place.
    """

    boxes: Sequence[Box]

    @staticmethod
    def __new__(cls: type[Slices], size: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box]) -> Slices:
        self: Slices = torch.Tensor._make_wrapper_subclass(cls, tuple(size), dtype=dtype)
        self.boxes = boxes
        return self

    def __init__(self, size: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box]) -> None:
        super().__init__()

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
    """The range of a flattened tensor of `shape` that begins at `start`, as boxes: views of `flat` [n].

    At most 2·dimensions - 1 of them: the end of a row, whole rows, the beginning of a row, and so on within each.
    """
    if len(shape) < 2:
        yield (start,) * len(shape), flat.view(shape if len(shape) == 0 else -1)
        return
    row = prod(shape[1:])
    first, skipped = divmod(start, row)
    if skipped or len(flat) < row:
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


def copied_to_host(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """What this rank has to write of `tensors`, in host memory of its own: later changes don't show in it.

    Of tensors that every rank holds whole, each is taken by one of them.
    """
    copies: dict[str, Tensor] = {}
    load = [0] * world_size
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            (chunk,) = tensor.__create_chunk_list__()
            boxes = [(tuple(chunk.offsets), _copy(tensor.to_local()))] if chunk.sizes.numel() else []
            copies[name] = Slices(tensor.shape, tensor.dtype, boxes)
        elif isinstance(tensor, Slices):
            boxes = [(offsets, _copy(values)) for offsets, values in tensor.boxes]
            copies[name] = Slices(tensor.shape, tensor.dtype, boxes)
        else:
            owner = load.index(min(load))
            load[owner] += tensor.numel()
            if owner == rank:
                copies[name] = _copy(tensor)
    return copies


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
