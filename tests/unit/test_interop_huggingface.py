"""Export to Hugging Face: a process without megamor loads the directory and computes the same logits."""

from __future__ import annotations

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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megamor.cli import export_hf
from megamor.codec import TextCodec
from megamor.config import Config, CustomRouterConfig
from megamor.errors import CheckpointError, ConfigError
from megamor.interop.export import code_files, export_huggingface
from megamor.interop.weights import Imported, save_imported
from megamor.load import load_model
from megamor.model import Transformer
from tests.combinations import (
    KV_POLICIES,
    ROUTERS,
    SEQ_LEN,
    SHARINGS,
    lively_model,
    tiny_config,
    tokens,
    vanilla_config,
)
from tests.commands import refusal

pytest.importorskip("transformers")

CONFIGS: dict[str, Config] = {"vanilla": vanilla_config()}
CONFIGS |= {name: tiny_config(router) for name, router in ROUTERS.items() if name != "custom"}
CONFIGS |= {
    f"expert_choice-{kv_policy}-{sharing}": tiny_config(ROUTERS["expert_choice"], kv_policy, sharing)
    for kv_policy in KV_POLICIES
    for sharing in SHARINGS
}
CONFIGS |= {
    f"token_choice-{policy}": tiny_config(ROUTERS["token_choice"], policy) for policy in ("share_first", "hybrid")
}
CONFIGS["told_apart"] = replace(
    CONFIGS["expert_choice"],
    recursion=replace(CONFIGS["expert_choice"].recursion, recursion_embedding=True, separate_norms=True, lora_rank=2),
)
CONFIGS["stages"] = tiny_config(ROUTERS["expert_choice"], sharing="stages")
CONFIGS["multi_scale"] = replace(
    CONFIGS["expert_choice"],
    model=replace(CONFIGS["expert_choice"].model, attention="multi_scale", attention_window=4, attention_block=2),
)


DECODED = ["vanilla", "expert_choice", "expert_choice-share_first-middle_cycle", "act_hard"]
DECODED += ["told_apart", "multi_scale"]
"""Exports that are also asked to generate."""
TEXT = "no <|endoftext|>"

SCRIPT = """
import importlib.abc, json, os, sys
from pathlib import Path

class WithoutMegamor(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megamor", "tools", "pretrain", "tests"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutMegamor())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
root, found = Path(sys.argv[1]), {}
inputs = torch.load(root / "inputs.pt")

def load(name, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(root / name, trust_remote_code=True, **options).eval()

def lengths_seen(model):
    seen = []
    model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen

def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)

with torch.no_grad():
    once = type(load("vanilla"))  # the code file is the same in all: compiling it anew for each would take a second
    for name in json.loads(sys.argv[2]):
        found[name] = load(name, once)(inputs).logits
    for name in json.loads(sys.argv[3]):
        model = load(name)
        prompt, options = inputs[:, :8], dict(max_new_tokens=10, do_sample=False)
        seen = lengths_seen(model)
        found[f"{name}.greedy"] = model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options)
        found[f"{name}.lengths"] = list(seen)
        options["num_beams"] = 3
        found[f"{name}.beams"] = model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options)

    model = load("expert_choice")
    loss, logits = model(inputs, labels=inputs, return_dict=False)
    found["loss"], found["loss_logits"] = loss, logits
    found["hole"] = refusal(lambda: model(inputs, attention_mask=(inputs > 3).long()))
    mask = torch.ones_like(inputs[:, :8])
    mask[0, :3] = 0
    options = dict(max_new_tokens=6, do_sample=False)
    found["padded"] = model.generate(inputs[:, :8], attention_mask=mask, **options)[:1, 8:]
    found["alone"] = model.generate(inputs[:1, 3:8], **options)[:, 5:]
    found["overflow"] = refusal(lambda: model(inputs.repeat(1, 2), use_cache=True))
    half = load("expert_choice", dtype=torch.bfloat16)
    found["dtypes"] = {str(value.dtype) for value in half.model.stage.router.parameters()}, half.model.norm.weight.dtype
    found["half"] = half(inputs).logits
    fresh = AutoModelForCausalLM.from_config(load("act_hard").config, trust_remote_code=True)
    found["fresh"] = fresh.model.stage.router.bias, fresh.model.embed.weight.std()
    model.save_pretrained(root / "saved_again")
    found["saved_again"] = load("saved_again")(inputs).logits

    tokenizer = AutoTokenizer.from_pretrained(root / "with_tokenizer", trust_remote_code=True)
    encoded = tokenizer(sys.argv[4], return_tensors="pt")
    found["encoded"], found["decoded"] = encoded.input_ids, tokenizer.decode(encoded.input_ids[0])
    found["special"] = tokenizer.eos_token, tokenizer.pad_token_id, tokenizer.model_max_length
    found["generated"] = load("with_tokenizer").generate(**encoded, max_new_tokens=3)
torch.save(found, root / "found.pt")
"""


def make_model(name: str) -> Transformer:
    """A model of CONFIGS in fp32 without zero parameters (some for single recursions are initialised to zero)."""
    model = lively_model(CONFIGS[name], dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes and an end-of-text token."""
    alphabet = [*map(chr, range(33, 127)), "Ġ"]  # printable ASCII; Ġ is the space
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """Every model of CONFIGS exported, and one through a checkpoint and the command."""
    root = tmp_path_factory.mktemp("hf")
    for name in CONFIGS:
        export_huggingface(make_model(name), root / name)
    model = make_model("expert_choice")
    save_imported(Imported(model.config, dict(model.state_dict())), root / "checkpoints", tokenizer_file)
    export_hf.main(["--checkpoint", str(root / "checkpoints"), "--output", str(root / "with_tokenizer")])
    torch.save(tokens(), root / "inputs.pt")
    return root


@pytest.fixture(scope="module")
def found(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results that a process without megamor computed from the exports."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(elsewhere), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(exports), json.dumps(list(CONFIGS)), json.dumps(DECODED), TEXT]
    command = [sys.executable, "-I", "-c", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not initialized" not in done.stderr, done.stderr
    result: dict[str, Any] = torch.load(exports / "found.pt")
    return result


def expected_logits(name: str) -> torch.Tensor:
    """megamor's logits under the inference rule."""
    with torch.no_grad():
        return make_model(name)(tokens(), mode="causal").logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_same(name: str, found: dict[str, Any]) -> None:
    # The code is the same, but rounding depends on memory alignment, which differs by process (1e-6 at most).
    torch.testing.assert_close(found[name], expected_logits(name), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", DECODED)
def test_generation_uses_the_cache_and_equals_that_without(name: str, found: dict[str, Any]) -> None:
    assert found[f"{name}.lengths"] == [8, *[1] * 9, *range(8, 18)]
    for way in ("greedy", "beams"):
        with_cache, without = found[f"{name}.{way}"]
        assert torch.equal(with_cache, without)
        assert with_cache.shape == (3, 18)


def test_the_loss_is_that_of_the_next_token(found: dict[str, Any]) -> None:
    logits, inputs = expected_logits("expert_choice"), tokens()
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
    torch.testing.assert_close(found["loss"], wanted)
    torch.testing.assert_close(found["loss_logits"], logits)


def test_what_it_cannot_do_is_refused(found: dict[str, Any]) -> None:
    assert "attention_mask has a hole" in found["hole"]
    assert f"holds {SEQ_LEN} tokens" in found["overflow"]


def test_padding_has_no_influence_on_generation(found: dict[str, Any]) -> None:
    assert torch.equal(found["padded"], found["alone"])


def test_routers_stay_in_fp32(found: dict[str, Any]) -> None:
    assert found["dtypes"] == ({"torch.float32"}, torch.bfloat16)
    assert found["half"].isfinite().all()


def test_a_model_from_its_config_is_initialised(found: dict[str, Any]) -> None:
    bias, deviation = found["fresh"]
    assert bias.item() == 1.0
    assert 0.018 < deviation.item() < 0.022


def test_saving_again_keeps_the_model(found: dict[str, Any], exports: Path) -> None:
    assert torch.equal(found["saved_again"], found["expert_choice"])
    assert (exports / "saved_again" / "modeling_megamor.py").is_file()


def test_the_tokenizer_is_exported(found: dict[str, Any], tokenizer_file: Path) -> None:
    codec = TextCodec.load(tokenizer_file)
    assert codec.end_of_text is not None
    assert found["encoded"].tolist() == [codec.encode(TEXT)]
    assert found["encoded"].shape == (1, len(TEXT)), "special tokens that a text spells out are text"
    assert found["decoded"] == TEXT
    assert found["special"] == ("<|endoftext|>", codec.end_of_text.id, SEQ_LEN)
    assert found["generated"].shape[1] > len(TEXT)


@pytest.mark.parametrize("name", CONFIGS)
def test_megamor_reads_it_back(name: str, exports: Path) -> None:
    loaded, model = load_model(exports / name, "cpu"), make_model(name)
    for section in ("model", "recursion", "router"):
        assert getattr(loaded.config, section) == getattr(model.config, section)
    for setting in ("seq_len", "document_mask"):  # otherwise the validation loss would differ
        assert getattr(loaded.config.data, setting) == getattr(model.config.data, setting)
    torch.testing.assert_close(loaded.model.state_dict(), model.float().state_dict(), rtol=0, atol=0)
    assert (loaded.name, loaded.step) == (name, None)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        loaded.tokenizer()


def test_routers_are_not_rounded_when_loaded(exports: Path) -> None:
    stored = load_file(exports / "ema_threshold" / "model.safetensors")
    loaded = load_model(exports / "ema_threshold", "cpu", torch.bfloat16).model.state_dict()
    routers = {name for name in loaded if ".router." in name}
    assert routers
    assert {value.dtype for name, value in loaded.items() if name not in routers} == {torch.bfloat16}
    for name in routers:
        assert torch.equal(loaded[name], stored[f"model.{name}"])


def test_what_is_no_export_of_a_whole_model_is_refused(exports: Path, tmp_path: Path) -> None:
    whole = load_model(exports / "with_tokenizer", "cpu")
    assert whole.config.data.tokenizer == str(whole.tokenizer_path)
    assert whole.tokenizer().get_vocab_size() > 0
    weights = (exports / "vanilla" / "model.safetensors").read_bytes()
    settings = json.loads((exports / "vanilla" / "config.json").read_text())
    sections = settings["megamor"]
    narrower = {**settings, "megamor": {**sections, "model": {**sections["model"], "ffn_dim": 8}}}
    cases = (
        ({"model_type": "llama"}, weights, "'llama', not 'megamor'"),
        ({"model_type": "megamor"}, weights, "KeyError: 'megamor'"),
        ([], weights, "can't be read as an exported model"),
        (settings, weights[:-100], "can't read the weights in"),
        (settings, None, "contains none of model.safetensors"),
        (narrower, weights, "belongs to another model"),
    )
    for number, (config, stored, message) in enumerate(cases):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        if stored is not None:
            (directory / "model.safetensors").write_bytes(stored)
        with pytest.raises(CheckpointError, match=message):
            load_model(directory, "cpu")


def test_an_export_in_shards_is_read(exports: Path, tmp_path: Path) -> None:
    """`save_pretrained(max_shard_size=...)` writes several files."""
    whole = load_file(exports / "vanilla" / "model.safetensors")
    shutil.copy(exports / "vanilla" / "config.json", tmp_path)
    names = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(whole)}
    for file in {*names.values()}:
        save_file({name: whole[name] for name in whole if names[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = load_model(tmp_path, "cpu").model.state_dict()
    torch.testing.assert_close(found, load_model(exports / "vanilla", "cpu").model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_unfinished_export_leaves_nothing(error: BaseException, tmp_path: Path, monkeypatch: Any) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise error

    model = lively_model(CONFIGS["vanilla"])
    with monkeypatch.context() as patched:
        patched.setattr("megamor.interop.export.save_file", save)
        with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
            export_huggingface(model, tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]
    assert tmp_path / "out" / "model.safetensors" in export_huggingface(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["vanilla", "expert_choice", "token_choice"])
def test_each_weight_is_stored_once(name: str, exports: Path) -> None:
    stored = load_file(exports / name / "model.safetensors")
    model = lively_model(CONFIGS[name])
    buffers = sum(buffer.numel() for buffer in model.buffers())
    assert sum(value.numel() for value in stored.values()) == model.num_parameters() + buffers
    assert (exports / name / "model.safetensors").stat().st_mode & 0o044 == (exports / name).stat().st_mode & 0o044


def test_half_precision_files_are_half_as_large(tmp_path: Path) -> None:
    export_huggingface(lively_model(CONFIGS["ema_threshold"]), tmp_path / "out", dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert {dtype for name, dtype in dtypes.items() if ".router." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".router." not in name} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_refused_exports(tmp_path: Path, exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    custom = replace(CONFIGS["expert_choice"], router=CustomRouterConfig("tests.unit.nowhere:Router"))
    model = lively_model(CONFIGS["vanilla"])
    model.config = custom
    with pytest.raises(ConfigError, match=r"tests\.unit\.nowhere:Router can't be exported"):
        export_huggingface(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    arguments = ("--checkpoint", exports / "checkpoints", "--output", exports)
    assert "not an empty directory" in refusal(capsys, export_hf.main, *arguments)


def test_all_exports_have_the_same_code(exports: Path) -> None:
    for name in CONFIGS:
        assert {path.name: path.read_text() for path in (exports / name).glob("*.py")} == code_files()


def test_the_code_is_copied_from_megamors_modules() -> None:
    files = code_files()
    assert not [name for name, source in files.items() if re.search(r"^\s*(from|import) megamor", source, re.MULTILINE)]
    original = (Path(__file__).parents[2] / "megamor" / "model" / "kv_policy.py").read_text()
    assert original[original.index("class KVPolicy:") :].strip() in files["model_kv_policy.py"]


def test_an_export_in_one_code_file_is_read(exports: Path, tmp_path: Path) -> None:
    """Until 0.1 the code was a single file; configuration and weights are the same."""
    shutil.copytree(exports / "vanilla", tmp_path / "old", ignore=shutil.ignore_patterns("model_*.py", "routing*.py"))
    assert torch.equal(load_model(tmp_path / "old", "cpu").model(tokens()).logits, expected_logits("vanilla"))
