"""CUDA tensors without values, on a machine without a GPU: a stand-in for a device that must not be waited for.

Under `FakeTensorMode` an operation whose result's shape or host value depends on a tensor's data raises an error. What
that mode lets pass is checked here: copies that block, and events that the host waits for. Where the host does need a
number from the device, one is invented.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megamor.routing.plan import Incoming

CUDA = torch.device("cuda", 0)
COPIES = ("aten::_to_copy", "aten::copy_")
READS = {"aten::_local_scalar_dense": 1, "aten::bincount": 2, "aten::unique_consecutive": 1}
"""Operations that wait for the device, and how often."""
KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "_varlen_attn", "_flash_attention", "_efficient_attention"),
    "optimizer": ("_fused_adamw", "_foreach_"),
    "embedding": ("embedding",),
}
"""Operations by what their names begin with; all others are called pointwise."""


@lru_cache
def enable_autograd() -> None:
    """Let autograd run over fake CUDA tensors in a torch without CUDA."""
    if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("fake CUDA tensors need x86-64 Linux, or a torch with CUDA")
    source, root = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent
    with TemporaryDirectory() as directory:
        library = f"{directory}/fake_cuda.so"
        options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
        try:
            subprocess.run(["g++", *options, str(source), "-o", library, "-lc10", "-ltorch_cpu"], check=True)
        except FileNotFoundError:
            pytest.skip("fake CUDA tensors need a C++ compiler")
        ctypes.CDLL(library)


@dataclass
class Device(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, waits and bytes by kind; `sizes` are the numbers that the host is told when it asks for some.

    A wait that isn't for sizes or an event is an error, unless it is `lenient`. Bytes are those that an operation reads
    and writes if it keeps nothing on the chip.
    """

    sizes: dict[tuple[int, ...], list[Any]] = field(default_factory=dict)
    waits: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    masks: set[tuple[int, ...]] = field(default_factory=set)
    bytes: Counter[str] = field(default_factory=Counter)
    lenient: bool = False

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        self.operations[name] += not name.startswith("prim::")
        if self.lenient and name in READS:
            self.waits["others"] += READS[name]
            if name == "aten::bincount":
                return args[0].new_zeros(args[2] if len(args) > 2 else kwargs["minlength"])
            return True if name == "aten::_local_scalar_dense" else (args[0][:50],) * 3
        out = func(*args, **kwargs)
        if not func.is_view:
            kind = name.removeprefix("aten::").removeprefix("torch_attn::")
            kind = next((group for group, names in KINDS.items() if kind.startswith(names)), "pointwise")
            for x in tree_iter((args, kwargs, out)):
                self.bytes[kind] += x.nbytes if isinstance(x, Tensor) and x.device.type == "cuda" else 0
        if name in COPIES:
            tensors = [x for x in (out, *args) if isinstance(x, Tensor)]
            crosses = len({x.device.type for x in tensors}) > 1
            flags = [*args[2:], kwargs.get("non_blocking")] if name == "aten::copy_" else [kwargs.get("non_blocking")]
            assert not crosses or any(flags), f"{func} between host and device waits"
        return out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, enable_gqa: bool = False, **_: Any
    ) -> Tensor:
        """Replaces SDPA, which a torch without CUDA would take apart: the kernel that a GPU would use."""
        if attn_mask is None:
            found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
            return found[0]  # type: ignore[no-any-return]
        assert not torch._C._get_cudnn_sdp_enabled(), "cuDNN plans anew for each shape"
        assert not enable_gqa
        self.masks.add((q.shape[2], *attn_mask.shape))
        found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True)
        return found[0]  # type: ignore[no-any-return]

    def read(self, incoming: Incoming) -> list[Any]:
        # A number that has been read is known.
        self.waits["sizes"] += not getattr(incoming, "known", False)
        incoming.known = True  # type: ignore[attr-defined]
        return self.sizes[tuple(incoming.copy.shape)]


class Event:
    """Replaces `torch.cuda.Event`."""

    waits: Counter[str]

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        self.waits["events"] += 1


@contextmanager
def fake_cuda(sizes: dict[tuple[int, ...], list[Any]] | None = None, *, lenient: bool = False) -> Iterator[Device]:
    """Within it, tensors on `CUDA` can be created and computed with."""
    enable_autograd()
    device = Device(sizes or {}, lenient=lenient)
    event = type("Event", (Event,), {"waits": device.waits})
    with ExitStack() as stack:
        for name, value in {
            "torch.cuda.Event": event,
            "megamor.model.loss.HAS_TRITON": False,  # a kernel can't be launched on tensors without values
            "torch.cuda.get_device_capability": lambda *_: (9, 0),
            "torch.cuda.is_bf16_supported": lambda *_: True,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.current_stream": lambda *_: SimpleNamespace(record_event=event),
        }.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(patch.object(Incoming, "tolist", lambda incoming: device.read(incoming)))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", device.attend))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(device)
        yield device
