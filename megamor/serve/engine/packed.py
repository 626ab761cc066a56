"""Projections on oneDNN's prepacked weights, for serving on a CPU.

A plain product with a weight of [out, in] reorders the weight in every call, which for the few rows of a batch takes as
long as multiplying. Here weights are stored once in the order that oneDNN's kernels read, and projections of the same
input (queries, keys and values; gate and up) become one product. On two x86 cores the 140 projections of 20 layers of
width 512 take about half the time at 8 rows, in fp32 and bf16.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from megamor.model import Transformer
from megamor.model.blocks import Block, SharedLinear

# How many rows the order of the weights is chosen for. Orders for 32 to 256 rows are alike and multiply one row as fast
# as the plain weight does; the one for a single row is the plain order.
ROWS = 32
# bf16 rounds to 8 bits, so it must be clearly faster.
BF16_RATIO = 0.85


class PackedLinear(nn.Module):
    """One product with several stacked weights [out, in], plus the low-rank updates of `maps`."""

    def __init__(self, weights: Sequence[Tensor], maps: Sequence[SharedLinear] = ()) -> None:
        super().__init__()
        weight = weights[0] if len(weights) == 1 else torch.cat([*weights])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.sizes = [len(each) for each in weights]
        self.down, self.up = (nn.ModuleList(getattr(each, name) for each in maps) for name in ("down", "up"))

    @classmethod
    def of(cls, *maps: SharedLinear) -> Self:
        """The product with the weights of `maps`, which have updates all or not at all."""
        return cls([each.weight for each in maps], [each for each in maps if len(each.up)])

    def forward(self, x: Tensor, recursion: int = 0) -> Any:
        """x [N, in] to [N, sum of out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        if len(self.up):
            pairs = zip(self.down, self.up, strict=True)
            y = y + torch.cat([up[recursion](down[recursion](x)) for down, up in pairs], dim=-1)  # type: ignore[index]
        return y


class FusedLinear(PackedLinear):
    """A `PackedLinear` whose result is split again."""

    def forward(self, x: Tensor, recursion: int = 0) -> Any:
        """x [N, in] to [N, out] for each weight."""
        return super().forward(x, recursion).split(self.sizes, dim=-1)


def why_not_packed(model: Transformer) -> str | None:
    """Why the weights of `model` can't be prepacked; None if they can."""
    weight = model.embed.weight
    if weight.device.type != "cpu":
        return f"{weight.device.type} has its own"
    if not torch._C._has_mkldnn:
        return "torch was built without oneDNN"
    if weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return None
    return f"oneDNN has no kernels for {str(weight.dtype).removeprefix('torch.')} on this processor"


def fastest_dtype(rows: int = 8, width: int = 1024, repeats: int = 10) -> tuple[torch.dtype, str]:
    """The faster of fp32 and bf16 for products of a few rows on this CPU, and a phrase that says why.

    Processors without instructions for bf16 (AVX512_BF16, AMX) emulate them, which is slower than fp32.
    """
    if not torch._C._has_mkldnn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32, "oneDNN has no bf16 kernels for this processor"
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    maps = {dtype: PackedLinear([torch.zeros(width, width, dtype=dtype)]) for dtype in seconds}
    # In turns and the shortest of each, as another process may slow down any of them.
    for dtype in [*seconds] * repeats:
        x, begin = torch.zeros(rows, width, dtype=dtype), time.perf_counter()
        maps[dtype](x)
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - begin)
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    phrase = f"a product of {rows} rows in bf16 takes {ratio:.2f} of its time in fp32 here"
    return (torch.bfloat16 if ratio < BF16_RATIO else torch.float32), phrase


def packed(model: Transformer) -> Transformer:
    """A copy of `model` for inference that multiplies with prepacked weights, or `model` if they can't be prepacked.

    The copy shares all other parameters, such as the embedding. The weights of the projections are freed with `model`.
    """
    if why_not_packed(model) or any(isinstance(module, PackedLinear) for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    for block in result.modules():
        if isinstance(block, Block):
            pack_block(block)
    result.head = PackedLinear([model.head_weight])  # type: ignore[assignment]
    return result


def pack_block(block: Block) -> None:
    """Replace the projections of `block`."""
    attention, ffn = block.attention, block.ffn
    attention.fused = FusedLinear.of(attention.q_proj, attention.k_proj, attention.v_proj)
    attention.o_proj = PackedLinear.of(attention.o_proj)  # type: ignore[assignment]
    ffn.fused = FusedLinear.of(ffn.gate_proj, ffn.up_proj)
    ffn.down_proj = PackedLinear.of(ffn.down_proj)  # type: ignore[assignment]
    del attention.q_proj, attention.k_proj, attention.v_proj, ffn.gate_proj, ffn.up_proj
