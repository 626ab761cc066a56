"""What published laws give for a model and a number of training tokens: batch, learning rate, tokens.

- OLMo ladder (github.com/allenai/OLMo-core, after arXiv 2406.19146): batch 2048 * 160 (N / 108M)^(2/3) tokens, learning
  rate 0.0047 (N / 108M)^(-1/3) / 2, for N parameters without embeddings.
- nanochat (github.com/karpathy/nanochat, after arXiv 2505.13738): batch 2^19 (D / 1.16G)^0.383 for D tokens; the
  reference is its 12-layer model at 10.5 tokens per parameter.
- Chinchilla (arXiv 2203.15556): 20 tokens per parameter.
- Mixture-of-Recursions (arXiv 2507.10524): batch 1024 x 2048 tokens, learning rate 3e-3, published for 360M only.

No law for tied weights is published. N counts a shared block once for each recursion, as a token at full depth does.
"""

from __future__ import annotations

from megamor.config import Config
from megamor.config.batches import BatchSchedule
from megamor.config.derive import derive
from megamor.model.flops import expected_steps
from megamor.progress import format_count

FOLLOWS = 1.25
"""A setting within this factor of a law's value follows it."""


def laws(parameters: float, tokens: float) -> dict[str, dict[str, float]]:
    """Tokens in a batch, learning rate and training tokens, by source."""
    size = parameters / 108e6
    return {
        "OLMo ladder": {"batch": 2048 * 160 * size ** (2 / 3), "learning rate": 0.0047 * size ** (-1 / 3) / 2},
        "nanochat": {"batch": 2**19 * (tokens / 1.16e9) ** 0.383},
        "Chinchilla": {"tokens": 20 * parameters},
        "MoR paper": {"batch": 1024 * 2048, "learning rate": 3e-3},
    }


def recommendation(
    config: Config | None, parameters: float | None = None, tokens: float | None = None, flops: float | None = None
) -> str:
    """A line for each law and quantity, with the configuration's own value beside it.

    `parameters`, `tokens` and training FLOPs (6 per parameter and token) replace what follows from `config`.
    """
    own: dict[str, float] = {}
    if config is not None:
        parameters = parameters or derive(config, 1).effective_parameters
        own = {"batch": config.train.global_batch_size * config.data.seq_len, "learning rate": config.optim.lr}
        own["tokens"] = BatchSchedule.of(config).tokens(expected_steps(config))
    assert parameters is not None
    tokens = tokens or (flops / (6 * parameters) if flops else own.get("tokens", 20 * parameters))
    own |= {"tokens": tokens} if own else {}
    lines = [f"{format_count(parameters)} parameters at full depth without embedding, {format_count(tokens)} tokens"]
    for source, values in laws(parameters, tokens).items():
        for quantity, value in values.items():
            line = f"{source:<12} {quantity:<14} {value:>10.3g}"
            if quantity in own:
                factor = own[quantity] / value
                verdict = "follows" if 1 / FOLLOWS <= factor <= FOLLOWS else f"{factor:.3g} times the law's"
                line += f"   here {own[quantity]:.3g}: {verdict}"
            lines.append(line)
    return "\n".join(lines)
