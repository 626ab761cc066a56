"""What MFU to expect on an H100, from counted FLOPs and bytes and assumed rates, with nothing overlapping.

FLOPs come from `model/flops.py`. Traffic is counted by operation, in bytes of high-bandwidth memory, forward and
backward together, from the shapes of `model/blocks.py`, `model/recursion.py` and `model/loss.py`. Host time isn't
counted, nor latencies of kernels: real steps take longer, small models most.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamor.config import Config
from megamor.config.segments import segments
from megamor.model.flops import nominal_flops, nominal_work
from megamor.plan.estimate import ADAMW_BYTES
from megamor.plan.memory import unit_parameters

GEMM, BANDWIDTH, PEAK = 650e12, 2.8e12, 989.4e12
"""FLOP/s of matrix products and bytes per second that kernels reach, and the peak that MFU is relative to."""
FLASH2, CUDNN = (260e12, 190e12), (370e12, 310e12)
"""FLOP/s of attention, forward and backward: FlashAttention 2, as documents need it, and cuDNN's on causal SDPA."""
REFERENCE_LOSS, FUSED_LOSS = (70.0, 682), (10.0, 11008)
"""Bytes per logit and rows of a chunk: a dozen operations over fp32; products and one kernel in place, in 16 bits."""
EAGER_POINTWISE, COMPILED_POINTWISE = 4.5, 1.0
"""Bytes of norms, rotations, residuals and SwiGLU relative to one fused kernel for each: counted, and at best."""


@dataclass(frozen=True)
class Way:
    """A way to run the same step."""

    name: str
    attention: tuple[float, float]
    loss: tuple[float, int]
    pointwise: float
    fused_projections: bool = False


WAYS = (
    Way("eager, documents", FLASH2, REFERENCE_LOSS, EAGER_POINTWISE),
    Way("compiled, documents", FLASH2, REFERENCE_LOSS, COMPILED_POINTWISE),
    Way("compiled, no documents", CUDNN, REFERENCE_LOSS, COMPILED_POINTWISE),
    Way("+ fused loss", CUDNN, FUSED_LOSS, COMPILED_POINTWISE),
    Way("+ fused qkv and gate-up", CUDNN, FUSED_LOSS, COMPILED_POINTWISE, fused_projections=True),
)


def seconds(config: Config, way: Way, micro_batch: int, accumulation: int) -> dict[str, float]:
    """Seconds of a step on one GPU by operation."""
    sequences = micro_batch * accumulation
    flops, tokens = nominal_flops(config, sequences), sequences * config.data.seq_len
    model, vocabulary = config.model, config.model.vocab_size
    (forward, backward), (per_logit, chunk_rows) = way.attention, way.loss
    # Rows that pass through a block, counted once for each block, and those that a recursion gathers and scatters.
    num_unshared = sum(segment.num_blocks for segment in segments(config) if not segment.schedule)
    rows, moved = float(num_unshared * tokens), 0.0
    work = iter(nominal_work(config, sequences))
    for segment in segments(config):
        for _ in segment.schedule:
            selected, _ = next(work)
            rows += segment.num_blocks * selected
            moved += selected if config.router.kind != "fixed" else 0
    parameters = sum(unit_parameters(config).values())
    return {
        "products": 3 * (flops.projections + flops.routers) / GEMM,
        "attention": flops.attention / forward + 2 * flops.attention / backward,
        "head": 3 * flops.head / GEMM,
        # Each chunk adds a product in bf16, written and read, to the fp32 gradient of the head, read and written.
        "loss": tokens * vocabulary * (per_logit + 12 * model.dim / chunk_rows) / BANDWIDTH,
        "pointwise": rows * block_bytes(config, way) / BANDWIDTH,
        # A stream's rows are gathered, scaled, added and scattered, and the same backward: 12 passes in bf16.
        "routing": moved * 12 * 2 * model.dim / BANDWIDTH,
        # Every micro-batch writes gradients in bf16, reads them and adds them to fp32 sums, read and written.
        "update": (ADAMW_BYTES + 12 * accumulation) * parameters / BANDWIDTH,
    }


def block_bytes(config: Config, way: Way) -> float:
    """Bytes that a block's pointwise operations move for one row, in bf16, forward and backward."""
    model = config.model
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    # A norm reads x and writes its result, and backward reads x and the gradient and writes one: 5 passes, twice a
    # block. Residual additions take 3 in each direction. Rotations read and write q and k in both directions. SwiGLU
    # reads gate and up and writes one, and backward reads three and writes two.
    norms, residuals, rotations = 2 * 5 * model.dim, 2 * 6 * model.dim, 4 * (heads + kv)
    # Without fused projections, three gradients of one input are added up, and two of another.
    inputs = 0 if way.fused_projections else 3 * 3 * model.dim
    return 2 * way.pointwise * (norms + residuals + rotations + 8 * model.ffn_dim + inputs)


def expected(config: Config, way: Way, micro_batch: int, accumulation: int = 4) -> tuple[float, float]:
    """MFU, and tokens per second."""
    total = sum(seconds(config, way, micro_batch, accumulation).values())
    flops = nominal_flops(config, micro_batch * accumulation).training
    return flops / total / PEAK, micro_batch * accumulation * config.data.seq_len / total
