"""Other people's implementations of the dense model, to hold ours against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megamor.config import Config
from megamor.errors import ConfigError
from megamor.model import ModelOutput
from megamor.model.loss import IGNORE

BASELINES = {"hf-llama": "Hugging Face Llama, SDPA"}
"""Label by name."""


def build_baseline(name: str, config: Config, device: torch.device) -> nn.Module:
    """A module that is called like `Transformer`, of the same shape as the dense model of `config`.

    Raises:
        ConfigError: transformers is not installed.
    """
    assert name == "hf-llama"
    try:
        import transformers
    except ImportError:
        raise ConfigError("this needs transformers: pip install 'megamor[hf]'") from None
    torch.manual_seed(config.run.seed)
    shape: dict[str, Any] = {
        "vocab_size": config.model.vocab_size,
        "hidden_size": config.model.dim,
        "intermediate_size": config.model.ffn_dim,
        "num_hidden_layers": config.model.num_layers,
        "num_attention_heads": config.model.num_heads,
        "num_key_value_heads": config.model.num_kv_heads,
        "head_dim": config.model.head_dim,
        "max_position_embeddings": config.model.max_seq_len,
        "rms_norm_eps": config.model.norm_eps,
        "rope_theta": config.model.rope_theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    return HuggingFaceLlama(model.to(device))


class HuggingFaceLlama(nn.Module):
    """LlamaForCausalLM with its own loss, behind the signature of `Transformer`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor) -> ModelOutput:
        """inputs [B, S], labels [B, S] of the next tokens."""
        num_tokens = (labels != IGNORE).sum()
        # `shift_labels`: ours are shifted already. It averages over all positions, which are all valid in a bench.
        loss = self.model(input_ids=inputs, labels=labels, shift_labels=labels).loss
        return ModelOutput(None, loss * num_tokens, num_tokens, {}, {}, {}, None, None)
