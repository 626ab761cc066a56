"""Compiles and calls `cpu_kernels.cpp`: the parts of a block that are not products, for a CPU with a C++ compiler.

torch brings a compiler for GPUs (Triton) but none for CPUs. The kernels have a plain C interface, without torch's
headers, so that they are compiled within two seconds when they are first needed, and kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamor.model.blocks import RotaryAngles
from megamor.serve.engine.attention import PagedKeysValues
from megamor.serve.engine.flight import Ints, PageIds

SOURCE = Path(__file__).with_suffix(".cpp")
# Keys and values are stored in blocks of as many as a vector of the kernels has lanes.
LANES = 16
# Query heads that share a key head: MOST_QUERIES of the kernels, which hold the scores of all.
MOST_GROUPED = 32
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
# Pointers and sizes of each function; the number of threads follows.
SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [POINTER] * 3 + [INTEGER] * 2 + [ctypes.c_float],
    "swiglu": [POINTER] * 2 + [INTEGER] * 2,
    "rotate_and_store": [POINTER] * 6 + [INTEGER] * 5,
    "attend": [POINTER] * 8 + [INTEGER] * 6,
}


class Kernels:
    """The compiled functions for tensors of `dtype`, all of them contiguous. They use as many threads as torch does."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = str(dtype).removeprefix("torch.")
        functions = [getattr(library, f"{name}_{suffix}") for name in SIGNATURES]
        for function, arguments in zip(functions, SIGNATURES.values(), strict=True):
            function.argtypes, function.restype = [*arguments, ctypes.c_int], None
        self._rms_norm, self._swiglu, self._rotate_and_store, self._attend = functions

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [N, dim] normalised, times weight [dim]."""
        assert x.dtype == weight.dtype, "the kernels are told addresses, not types"
        out, (rows, dim) = torch.empty_like(x), x.shape
        pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._rms_norm(*pointers, rows, dim, eps, torch.get_num_threads())
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """gate_up [N, 2 · dim] to SiLU(gate) · up, [N, dim]."""
        rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, dim)
        self._swiglu(gate_up.data_ptr(), out.data_ptr(), rows, dim, torch.get_num_threads())
        return out

    def attend(self, qkv: Tensor, angles: RotaryAngles, layout: Sight, pages: PagedKeysValues) -> Tensor:
        """Rotate queries and keys in qkv [N, heads + 2 · kv_heads, head_dim], store, attend: [N, heads · head_dim].

        k of the pages is [pages, kv_heads, page_size / LANES, head_dim, LANES]; all rows write, to the addresses of
        `layout`. qkv is changed.
        """
        rows, width, head_dim = qkv.shape
        page_size, kv_heads = pages.v.shape[1:3]
        heads, threads = width - 2 * kv_heads, torch.get_num_threads()
        k, v, sizes = pages.k.data_ptr(), pages.v.data_ptr(), (rows, heads, kv_heads, head_dim, page_size)
        pointers = qkv.data_ptr(), angles.cos.data_ptr(), angles.signed_sin.data_ptr(), layout.addresses
        self._rotate_and_store(*pointers, k, v, *sizes, threads)
        out = qkv.new_empty(rows, heads * head_dim)
        seen = layout.tables, layout.owners, layout.ends, layout.begins, out.data_ptr()
        self._attend(qkv.data_ptr(), k, v, *seen, *sizes, layout.table_length, threads)
        return out


@dataclass(frozen=True)
class Sight:
    """Where the rows of a batch write, and what they see; as addresses of arrays that `kept` keeps alive.

    Row i writes to `addresses`[i] and sees the entries up to `ends`[i] (and from `begins`[i]) of the pages in row
    `owners`[i] of `tables`.
    """

    addresses: int
    tables: int
    table_length: int
    owners: int
    ends: int
    begins: int | None
    kept: Any

    @staticmethod
    def of(tables: PageIds, addresses: Ints, owners: Ints, ends: Ints, begins: Ints | None = None) -> Sight:
        """Arrays of int64, in C order, and `tables` of int32."""
        kept = tables, addresses, owners, ends, begins
        begin = None if begins is None else begins.ctypes.data
        arrays = (array.ctypes.data for array in (addresses, tables, owners, ends))
        address, table, owner, end = arrays
        return Sight(address, table, tables.shape[1], owner, end, begin, kept)


@cache
def compiled() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    compiler = shutil.which(name := os.environ.get("CXX", "g++"))
    if compiler is None:
        return f"no {name}; CXX names another compiler"
    # torch's own copy of OpenMP, if it has one: a second would have a second team of threads for the same cores.
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    command = [compiler, *FLAGS, str(SOURCE), *map(str, own[:1]), "-Wl,--as-needed"]
    try:
        # What -march=native stands for differs between the machines that share a home directory.
        native = subprocess.run(
            [compiler, "-march=native", "-Q", "--help=target"], capture_output=True, check=True, timeout=60
        ).stdout
        key = hashlib.sha256(native + SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
        directory = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megamor"
        library = directory / f"cpu_kernels-{key}.so"
        if not library.exists():
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as name:
                built = Path(name) / library.name
                subprocess.run([*command, "-o", str(built)], capture_output=True, check=True, timeout=300)
                built.replace(library)  # at once, as another server may be starting
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.decode(errors='replace').strip()[:300]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"they can't be compiled: {error}"


def kernels_for(dtype: torch.dtype, head_dim: int, grouped: int, page_size: int) -> Kernels | str:
    """The kernels for a model on the CPU with `grouped` query heads for each key head, or why there are none."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"not for {str(dtype).removeprefix('torch.')}"
    if head_dim % LANES or page_size % LANES or grouped > MOST_GROUPED:
        return f"not for heads of {head_dim}, pages of {page_size}, {grouped} heads that share keys"
    library = compiled()
    return library if isinstance(library, str) else Kernels(library, dtype)
