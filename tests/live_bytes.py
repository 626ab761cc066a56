"""The peak number of bytes in live tensors during a step; exact, unlike the resident memory of the process."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the storages of all results of operations, and of the tensors that exist already.

    Sizes are read again after each operation, because FSDP frees gathered weights by resizing their storage.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, weakref.ref[UntypedStorage]] = {}
        self.peak = 0
        for tensor in existing:
            self.note(tensor)

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.storages.pop(key, None))

    def measure(self) -> None:
        """Update the peak."""
        alive = (reference() for reference in list(self.storages.values()))
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive if storage is not None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter((out, args)):
            if isinstance(value, Tensor) and not isinstance(value, DTensor):  # its local tensor is tracked separately
                self.note(value)
        self.measure()
        return out
