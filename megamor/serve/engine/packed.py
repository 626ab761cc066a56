"""Blocks for serving: projections of the same input as one product, and few other operations.

Queries, keys and values are one product, gate and up another, and a residual is added by the product before it. On a
CPU weights are also prepacked: a plain product with a weight of [out, in] reorders the weight in every call, which for
the few rows of a batch takes as long as multiplying, so weights are stored once in the order that oneDNN's kernels
read. On two x86 cores the 140 projections of 20 layers of width 512 take about half the time at 8 rows, in fp32 and
bf16.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamor.model import Transformer
from megamor.model.attention import AttentionLayout
from megamor.model.blocks import Block, KeysValues, KeyValue, RMSNorm, RotaryAngles, SharedLinear
from megamor.serve.engine import attention
from megamor.serve.engine.attention import KernelLayout, PagedKeysValues
from megamor.serve.engine.cpu_kernels import Sight

# How many rows the order of the weights is chosen for. Orders for 32 to 256 rows are alike and multiply one row as fast
# as the plain weight does; the one for a single row is the plain order.
ROWS = 32
# bf16 rounds to 8 bits, so it must be clearly faster.
BF16_RATIO = 0.85


class BlockKernels(Protocol):
    """What computes the parts of a block that are not products: of a CPU (`cpu_kernels.py`) or of GPUs."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [N, dim] normalised, times weight [dim]."""

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """gate_up [N, 2 · dim] to SiLU(gate) · up, [N, dim]."""

    def attend(self, qkv: Tensor, angles: RotaryAngles, layout: Any, pages: PagedKeysValues) -> Tensor:
        """Rotate queries and keys in qkv [N, heads + 2 · kv_heads, head_dim], store, attend: [N, heads · head_dim].

        `layout` says what the rows see: a `Sight` for a CPU, a `KernelLayout` for a GPU. qkv may be changed.
        """


class PackedLinear(nn.Module):
    """One product with several stacked weights [out, in], plus the low-rank updates of `maps`.

    Where oneDNN can't prepack the stack, it is multiplied as it is.
    """

    def __init__(self, weights: Sequence[Tensor], maps: Sequence[SharedLinear] = ()) -> None:
        super().__init__()
        weight = (weights[0] if len(weights) == 1 else torch.cat([*weights])).detach()
        self.prepacked = why_not_prepacked(weight) is None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if self.prepacked else weight
        self.down, self.up = (nn.ModuleList(getattr(each, name) for each in maps) for name in ("down", "up"))
        self.updated = len(maps) > 0

    @classmethod
    def of(cls, *maps: SharedLinear) -> Self:
        """The product with the weights of `maps`, which have updates all or not at all."""
        result = cls([each.weight for each in maps], [each for each in maps if len(each.up)])
        if not result.prepacked and len(maps) > 1:
            # Parts of the stack from now on: a GPU's memory needn't hold both.
            parts = result.weight.split([each.out_features for each in maps])
            for each, part in zip(maps, parts, strict=True):
                each.weight.data = part
        return result

    def forward(self, x: Tensor, recursion: int = 0) -> Tensor:
        """x [N, in] to [N, sum of out]."""
        y: Tensor
        if self.prepacked:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        else:
            y = F.linear(x, self.weight)
        if self.updated:
            pairs = zip(self.down, self.up, strict=True)
            y = y + torch.cat([up[recursion](down[recursion](x)) for down, up in pairs], dim=-1)  # type: ignore[index]
        return y

    def plus(self, y: Tensor, x: Tensor, into: bool) -> Tensor:
        """x [N, out] plus the product of y [N, in], without low-rank updates; `into`: x may become the sum."""
        if self.prepacked:
            return torch.ops.mkldnn._linear_pointwise.binary(y, x, self.weight, None, "add")  # type: ignore[no-any-return]
        # Into another tensor, x would be copied first, by a kernel of its own.
        return torch.addmm(x, y, self.weight.t(), out=x if into else None)


class PackedBlock(nn.Module):
    """A `Block` for inference: stacked products, and few other operations.

    On a CPU, Python and the dispatch of small operations cost as much as the products of a few rows: the weights of
    each layer displace both from the caches. On a GPU small kernels take longer than the products. With `kernels` even
    fewer.
    """

    def __init__(self, block: Block, kernels: BlockKernels | None = None) -> None:
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
        return self.added(x, self.down_proj, hidden, self.ffn_out_norm, recursion, into=True), merged

    def attend(
        self, heads: Tensor, angles: RotaryAngles, layout: AttentionLayout | Sight, keys_values: KeysValues
    ) -> tuple[Tensor, KeyValue | None]:
        """Attention's result [N, heads · head_dim] for queries, keys and values in `heads` [N, all heads, head_dim]."""
        if self.kernels and isinstance(layout, Sight | KernelLayout) and isinstance(keys_values, PagedKeysValues):
            return self.kernels.attend(heads, angles, layout, keys_values), None
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

    def added(
        self, x: Tensor, product: PackedLinear, y: Tensor, norm: RMSNorm | None, recursion: int, into: bool = False
    ) -> Tensor:
        """The stream x [N, dim] plus the branch that ends with `product` of y; `into`: x may become the sum."""
        if norm is None and self.branch_scale == 1 and not product.updated:
            return product.plus(y, x, into)
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
    """Why the products of `model` take its weights as they are stored; None if they can be stacked or prepacked."""
    weight = model.embed.weight
    on_cpu = weight.device.type == "cpu" and not attention.reads_in_place(weight.device)
    return why_not_prepacked(weight) if on_cpu else None


def why_not_prepacked(weight: Tensor) -> str | None:
    """Why oneDNN can't prepack `weight`; None if it can."""
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


def packed(model: Transformer, kernels: BlockKernels | None = None) -> Transformer:
    """A copy of `model` for inference whose blocks are packed, or `model` if they can't be (`why_not_packed`).

    Its blocks use `kernels` for what isn't a product.

    The copy shares all other parameters, such as the embedding. On a CPU the weights of the projections are freed with
    `model`; on a GPU both share them.
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
