"""Checks of the kernels of GPUs and of packed blocks with them, for Triton's interpreter and for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import ModelConfig
from megamor.model.blocks import Block, Differences, RotaryAngles, rotary_angles
from megamor.serve.engine.attention import KernelLayout, PagedKeysValues
from megamor.serve.engine.gpu_kernels import GpuKernels
from megamor.serve.engine.graphs import Record
from megamor.serve.engine.packed import PackedBlock

EXACT = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.02 * 2**-8}  # in 16 bits rounded once
# The interpreter cuts digits off where a GPU rounds to the nearest.
CUT = 2.0
PAGES = 12
CONFIG = ModelConfig(vocab_size=97, dim=96, num_layers=2, num_heads=6, num_kv_heads=2, ffn_dim=616, max_seq_len=256)
# Blocks of every kind, with the numbers of their rows. The heads of the second aren't a power of two.
BLOCKS = {
    "plain": (replace(CONFIG, head_width=16), Differences(), 8),
    "heads of 80": (replace(CONFIG, head_width=80, num_kv_heads=6), Differences(), 7),
    "norms everywhere": (replace(CONFIG, head_width=24, qk_norm=True, sandwich_norms=True), Differences(), 1),
    "GeGLU, scaled, updates": (
        replace(CONFIG, ffn_activation="gelu_tanh"),
        Differences(3, separate_norms=True, lora_rank=4, residual_scaling="inverse"),
        5,
    ),
}


def check_norms_and_activations(dtype: torch.dtype, device: torch.device) -> None:
    """As torch computes them in fp64, whatever the width; NaN stays in its row."""
    kernels, exact = GpuKernels(), EXACT[dtype] * (1.0 if device.type == "cuda" else CUT)
    generator = torch.Generator().manual_seed(0)
    compare = partial(torch.testing.assert_close, rtol=exact, atol=1e-6 if exact > 1e-6 else exact)
    for rows, dim in ((300, 77), (1, 96), (3, 1030)):
        x, weight, gate_up = (
            (3 * torch.randn(shape, generator=generator)).to(device, dtype)
            for shape in ((rows, dim), (dim,), (rows, 2 * dim))
        )
        x[0] *= 1e-3  # where eps counts
        want = F.rms_norm(x.double(), (dim,), weight.double(), 1e-5)
        compare(kernels.rms_norm(x, weight, 1e-5).double(), want)
        gate_up[0, :6] = torch.tensor([-1e4, -100.0, -88.0, 80.0, 100.0, 1e4])
        gate, up = gate_up.double().chunk(2, dim=1)
        compare(kernels.swiglu(gate_up).double(), F.silu(gate) * up)
        gate_up[-1, 0] = x[-1, 0] = float("nan")
        assert kernels.swiglu(gate_up)[-1].isnan().tolist() == [True] + (dim - 1) * [False]
        assert kernels.rms_norm(x, weight, 1e-5).isnan().all(1).tolist() == (rows - 1) * [False] + [True]


class BlockCase:
    """One of `BLOCKS` with random weights, beside its packed copy, and a batch that reads and writes pages."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device, page_size: int = 16) -> None:
        config, differences, rows = BLOCKS[name]
        torch.manual_seed(0)
        self.block = Block(config, differences).double()
        for parameter in self.block.parameters():
            parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
        self.block.to(device, dtype)
        self.packed = PackedBlock(deepcopy(self.block), GpuKernels())
        self.x = torch.randn(rows, config.dim, dtype=torch.float64).to(device, dtype)
        kept = PAGES, page_size, config.num_kv_heads, config.head_dim
        self.pages = torch.randn(2, *kept, dtype=torch.float64).to(device, dtype)
        tables = torch.randperm(PAGES, dtype=torch.int32).view(4, -1)
        owners, ends = torch.arange(rows) % 4, torch.randperm(3 * page_size)[:rows] + 1
        self.layout = KernelLayout(*(each.to(device) for each in (tables, owners, ends)))
        pages = tables[owners, (ends - 1) // page_size].long()
        self.addresses = (pages * page_size + (ends - 1) % page_size).to(device)
        self.angles = rotary_angles((ends - 1).to(device), config, dtype)
        self.recursion = differences.num_recursions - 1

    def stores(self) -> Iterator[PagedKeysValues]:
        """Pages of their own where all rows write, where none do, and where some do."""
        none, some = self.addresses.new_empty(0), torch.arange(0, len(self.x), 2, device=self.x.device)
        for addresses, rows in ((self.addresses, None), (none, none), (self.addresses[some], some)):
            k, v = self.pages.clone().unbind()
            yield PagedKeysValues(k, v, addresses, rows)

    @torch.inference_mode()
    def run(self, block: Block | PackedBlock, store: PagedKeysValues) -> Tensor:
        """The block's result, [N, dim]."""
        found: Tensor = block(self.x, self.angles, self.layout, store, self.recursion)[0]
        return found

    @torch.inference_mode()
    def exact(self, store: PagedKeysValues) -> Tensor:
        """The block's result in fp64, which `store` becomes too."""
        angles = RotaryAngles(self.angles.cos.double(), self.angles.signed_sin.double())
        block, x = deepcopy(self.block).double(), self.x.double()
        found: Tensor = block(x, angles, self.layout, store, self.recursion)[0]
        return found

    def check(self) -> None:
        """The packed block gives what the block does, in its result and in the pages, and leaves its input alone."""
        before = self.x.clone()
        for mine, theirs, store in zip(self.stores(), self.stores(), self.stores(), strict=True):
            wide = replace(store, k=store.k.double(), v=store.v.double())
            outs = [self.exact(wide), self.run(self.packed, mine), self.run(self.block, theirs)]
            assert_as_exact(*outs)
            for want, found, own in ((wide.k, mine.k, theirs.k), (wide.v, mine.v, theirs.v)):
                assert_as_exact(want, found, own)
            assert torch.equal(self.x, before)

    def check_replay(self, record: Record) -> None:
        """A recording computes again what it finds in the tensors of the batch."""
        store = next(self.stores())
        (out,), replay = record(lambda: (self.run(self.packed, store),))
        self.x.neg_()
        # Rows 0 and 1 write where the other did, and see what it saw.
        for swapped in (self.addresses, self.layout.ends, self.angles.cos, self.angles.signed_sin):
            swapped[:2] = swapped[:2].flip(0)
        self.layout.owners[:2] = self.layout.owners[:2].flip(0)
        replay()
        theirs, wide = next(self.stores()), next(self.stores())
        wide = replace(wide, k=wide.k.double(), v=wide.v.double())
        assert_as_exact(self.exact(wide), out, self.run(self.block, theirs))


def assert_as_exact(want: Tensor, found: Tensor, own: Tensor) -> None:
    """`found` is about as near to `want`, which is in fp64, as `own`, which the model's operations give."""
    mine, theirs = (float((each.double() - want).abs().max()) for each in (found, own))
    # In 32 bits, a GPU's exponentials and roots are a little less exact than torch's.
    allowed = max(1.5 * theirs, EXACT[found.dtype] / 2 * float(want.abs().max()))
    assert mine <= allowed * (1.0 if found.is_cuda else CUT), (mine, theirs, allowed)
