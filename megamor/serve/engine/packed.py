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
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.model import Transformer
from megamor.model.attention import AttentionLayout
from megamor.model.blocks import Block, KeysValues, KeyValue, RMSNorm, RotaryAngles, SharedLinear
from megamor.serve.engine.attention import PagedKeysValues
from megamor.serve.engine.cpu_kernels import Kernels, Sight

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
        self.down, self.up = (nn.ModuleList(getattr(each, name) for each in maps) for name in ("down", "up"))
        self.updated = len(maps) > 0

    @classmethod
    def of(cls, *maps: SharedLinear) -> Self:
        """The product with the weights of `maps`, which have updates all or not at all."""
        return cls([each.weight for each in maps], [each for each in maps if len(each.up)])

    def forward(self, x: Tensor, recursion: int = 0) -> Tensor:
        """x [N, in] to [N, sum of out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        if self.updated:
            pairs = zip(self.down, self.up, strict=True)
            y = y + torch.cat([up[recursion](down[recursion](x)) for down, up in pairs], dim=-1)  # type: ignore[index]
        return y


class PackedBlock(nn.Module):
    """A `Block` for inference: prepacked products, and few other operations.

    Python and the dispatch of small operations cost as much as the products of a few rows: the weights of each layer
    displace both from the caches. With `kernels` even fewer.
    """

    def __init__(self, block: Block, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.kernels = kernels
        attention, ffn = block.attention, block.ffn
        self.head_dim, self.num_heads = attention.head_dim, attention.q_proj.out_features // attention.head_dim
        self.num_rotated = self.num_heads + attention.k_proj.out_features // self.head_dim
        self.qkv = PackedLinear.of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj, self.down_proj = PackedLinear.of(attention.o_proj), PackedLinear.of(ffn.down_proj)
        self.gate_up = PackedLinear.of(ffn.gate_proj, ffn.up_proj)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.attention_out_norm, self.ffn_out_norm = block.attention_out_norm, block.ffn_out_norm
        self.activation, self.branch_scale = ffn.activation, block.branch_scale

    def forward(
        self,
        x: Tensor,
        angles: RotaryAngles,
        layout: AttentionLayout | Sight,
        keys_values: KeysValues,
        recursion: int = 0,
    ) -> tuple[Tensor, KeyValue | None]:
        """As `Block.forward`."""
        heads = self.qkv(self.normed(self.attention_norm, x, recursion), recursion).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = heads.tensor_split((self.num_heads, self.num_rotated), dim=1)
            heads = torch.cat((normed(self.q_norm, q, recursion), normed(self.k_norm, k, recursion), v), dim=1)
        attended, merged = self.attend(heads, angles, layout, keys_values)
        x = self.added(x, self.o_proj, attended, self.attention_out_norm, recursion)
        hidden = self.activated(self.gate_up(self.normed(self.ffn_norm, x, recursion), recursion))
        return self.added(x, self.down_proj, hidden, self.ffn_out_norm, recursion), merged

    def attend(
        self, heads: Tensor, angles: RotaryAngles, layout: AttentionLayout | Sight, keys_values: KeysValues
    ) -> tuple[Tensor, KeyValue | None]:
        """Attention's result [N, heads · head_dim] for queries, keys and values in `heads` [N, all heads, head_dim]."""
        if self.kernels and isinstance(layout, Sight) and isinstance(keys_values, PagedKeysValues):
            return self.kernels.attend(heads, angles, layout, keys_values.k, keys_values.v), None
        assert not isinstance(layout, Sight)
        rotated, v = angles.rotate(heads[:, : self.num_rotated]), heads[:, self.num_rotated :]
        q, k = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        merged = keys_values.merge((k, v) if keys_values.needs_fresh else None)
        return layout.attend(q, *keys_values.resolve(merged)), merged

    def activated(self, gate_up: Tensor) -> Tensor:
        """The feed-forward's hidden units [N, ffn_dim] for gate_up [N, 2 · ffn_dim]."""
        if self.kernels and self.activation is F.silu:
            return self.kernels.swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate).mul_(up)

    def added(self, x: Tensor, product: PackedLinear, y: Tensor, norm: RMSNorm | None, recursion: int) -> Tensor:
        """The stream x [N, dim] plus the branch that ends with `product` of y."""
        if norm is None and self.branch_scale == 1 and not product.updated:
            return torch.ops.mkldnn._linear_pointwise.binary(y, x, product.weight, None, "add")  # type: ignore[no-any-return]
        y = product(y, recursion)
        return torch.add(x, y if norm is None else self.normed(norm, y, recursion), alpha=self.branch_scale)

    def normed(self, norm: RMSNorm, x: Tensor, recursion: int) -> Tensor:
        """As `norm(x, recursion)`."""
        if self.kernels is None:
            return normed(norm, x, recursion)
        return self.kernels.rms_norm(x, norm.weight_of(recursion), norm.eps)


def normed(norm: RMSNorm, x: Tensor, recursion: int) -> Tensor:
    """As `norm(x, recursion)`, in fewer operations."""
    weight = norm.weight_of(recursion)
    return F.rms_norm(x, weight.shape, weight, norm.eps)


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


def packed(model: Transformer, kernels: Kernels | None = None) -> Transformer:
    """A copy of `model` for inference that multiplies with prepacked weights, or `model` if they can't be prepacked.

    Its blocks use `kernels` for what isn't a product.

    The copy shares all other parameters, such as the embedding. The weights of the projections are freed with `model`.
    """
    if why_not_packed(model) or any(isinstance(module, PackedLinear) for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    for parent in [*result.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, Block):
                setattr(parent, name, PackedBlock(child, kernels))
    result.head = PackedLinear([model.head_weight])  # type: ignore[assignment]
    return result
