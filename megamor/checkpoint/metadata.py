"""Reading `state/` without running code that somebody has put into it.

torch.distributed.checkpoint stores its metadata as a pickle, which can call any function while it is read, and loads
entries that aren't tensors with `weights_only=False`. Here the pickle may name only what describes tensors, and nothing
but tensors is loaded. The tensors themselves are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _validate_global_plan
from torch.distributed.checkpoint.planner import ReadItem

from megamor.errors import CheckpointError


def _memory_format(enum: Any, name: str) -> Any:
    """What `getattr` is used for by the versions of Python that pickle a member of an enumeration by its name."""
    if enum is not dcp._MEM_FORMAT_ENCODING:
        raise CheckpointError("the metadata call getattr, which describes no tensor")
    return enum[name]


_CLASSES = (
    dcp.BytesStorageMetadata,
    dcp.ChunkStorageMetadata,
    dcp.Metadata,
    dcp.MetadataIndex,
    dcp.StorageMeta,
    dcp.TensorProperties,
    dcp.TensorStorageMetadata,
    dcp._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    OrderedDict,
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(each.__module__, each.__name__): each for each in _CLASSES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("builtins", "getattr"): _memory_format,
    # Where the checkpoint was written. Nothing reads it, and no path of this system is made of it.
    **{(room, name): PurePosixPath for room in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}
_CALLABLE = (type, type(_memory_format))


class _Unpickler(pickle._Unpickler):
    """Knows the classes above and torch's data types; imports nothing.

    The Python implementation, because the one in C can't be kept from setting attributes of a class.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"the metadata name {module}.{name}, which describes no tensor; it was not run")
        return _ALLOWED[module, name]

    def load_build(self) -> None:
        if isinstance(self.stack[-2], _CALLABLE):  # type: ignore[attr-defined]
            raise CheckpointError(f"the metadata change {self.stack[-2]!r}")  # type: ignore[attr-defined]
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]


class TensorReader(filesystem.FileSystemReader):
    """`FileSystemReader` for `state/` of a checkpoint that may come from anybody.

    Raises:
        CheckpointError: by `read_metadata`, if the metadata describe anything but tensors in files of `state/`.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """The metadata; see the class."""
        content = Path(self.path, ".metadata").read_bytes()
        metadata = _Unpickler(io.BytesIO(content)).load()
        _check(metadata)
        metadata.storage_meta = dcp.StorageMeta(load_id=self.load_id)
        return metadata  # type: ignore[no-any-return]


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        """Refuse an object that was stored instead of a tensor."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is an object, not a tensor")


def _check(metadata: Any) -> None:
    """Raise CheckpointError unless every part of the metadata has its type and every file is one of `state/`."""
    if not (isinstance(metadata, dcp.Metadata) and isinstance(metadata.state_dict_metadata, dict)):
        raise CheckpointError("the metadata are of another kind")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not (isinstance(entry, dcp.BytesStorageMetadata) or _describes_tensor(entry)):
            raise CheckpointError(f"the metadata of {name!r} describe no tensor")
        # What no chunk covers would keep whatever the memory held before.
        if isinstance(entry, dcp.TensorStorageMetadata) and not _is_whole(entry):
            raise CheckpointError(f"the chunks of {name!r} don't make up a tensor of {tuple(entry.size)}")
    if not isinstance(metadata.storage_data, dict):
        raise CheckpointError("the metadata don't say where tensors are")
    for index, info in metadata.storage_data.items():
        path = getattr(info, "relative_path", None)
        if not isinstance(index, dcp.MetadataIndex) or not isinstance(path, str) or Path(path).name != path:
            raise CheckpointError(f"the metadata say that {index} is in {path!r}, which is no file of this directory")


def _is_whole(entry: dcp.TensorStorageMetadata) -> bool:
    """Whether the chunks lie in the tensor, don't overlap and leave nothing out."""
    if any(not len(chunk.offsets) == len(chunk.sizes) == len(entry.size) for chunk in entry.chunks):
        return False
    volume = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if volume != math.prod(entry.size) or min(entry.size, default=0) < 0:
        return False
    faults: Any = _validate_global_plan([], dcp.Metadata({"": entry}))
    return faults is True or faults == []  # earlier versions of torch say whether it is valid


def _describes_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, dcp.TensorStorageMetadata)
        and isinstance(entry.size, torch.Size)
        and isinstance(entry.properties, dcp.TensorProperties)
        and isinstance(entry.properties.dtype, torch.dtype)
        and all(
            isinstance(chunk, dcp.ChunkStorageMetadata)
            and isinstance(chunk.offsets, torch.Size)
            and isinstance(chunk.sizes, torch.Size)
            for chunk in entry.chunks
        )
    )
