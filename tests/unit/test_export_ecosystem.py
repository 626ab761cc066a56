"""What users of Hugging Face libraries do with an export: tokenizer, pipelines, Trainer, PEFT, TRL, lm-eval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.codec import TextCodec
from megamor.corpus.tokenizer import byte_tokenizer
from megamor.interop.export import export_huggingface
from tests.combinations import ROUTERS, lively_model, tiny_config

transformers: Any = pytest.importorskip("transformers")

TEXTS = ("def main(): pass", "x", "return 1 + 2", "a" * 20, "if y:")
NASTY = ("<|endoftext|>", "a<|endoftext|>b<|im_start|>user", "  two  ", "é 漢字 \x00", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert-choice model of bytes with a chat template."""
    root, config = tmp_path_factory.mktemp("export"), tiny_config(ROUTERS["expert_choice"])
    byte_tokenizer(SPECIAL).save(str(root / "tokenizer.json"))
    (root / "chat.jinja").write_text(TEMPLATE)
    config = replace(config, model=replace(config.model, vocab_size=256 + len(SPECIAL), max_seq_len=64))
    model = lively_model(config, dtype=torch.float32)
    export_huggingface(model, root / "hf", tokenizer=root / "tokenizer.json", chat_template=root / "chat.jinja")
    return root / "hf"


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(export, trust_remote_code=True)


def load(export: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, **options)


def training(tmp_path: Path, **options: Any) -> dict[str, Any]:
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return {"output_dir": str(tmp_path), "per_device_train_batch_size": 3, "max_steps": 1, **quiet, **options}


def test_the_tokenizer_is_that_of_the_server(export: Path, tokenizer: Any) -> None:
    codec = TextCodec.load(export / "tokenizer.json")
    assert [tokenizer(text).input_ids for text in NASTY] == [codec.encode(text) for text in NASTY]
    assert codec.end_of_text is not None
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == codec.end_of_text.id == 256
    # A chat is text in which the template spells special tokens out: they are recognised on request.
    chat: Any = [{"role": "user", "content": "hi"}]
    wanted = [257, *b"user\nhi", 258, *b"\n"]
    options: dict[str, Any] = {"tokenizer_kwargs": {"split_special_tokens": False}, "return_dict": False}
    assert tokenizer.apply_chat_template(chat, **options) == wanted
    other = transformers.AutoTokenizer.from_pretrained(export, trust_remote_code=True, split_special_tokens=False)
    assert other.apply_chat_template(chat, return_dict=False) == wanted
    assert tokenizer(NASTY[0]).input_ids == codec.encode(NASTY[0])


def test_a_batched_pipeline_writes_what_single_prompts_do(export: Path, tokenizer: Any) -> None:
    pipe = transformers.pipeline("text-generation", model=load(export), tokenizer=tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert pipe(list(TEXTS), batch_size=3, **options) == [pipe(text, **options) for text in TEXTS]


@pytest.mark.parametrize("collator", ["language_modeling", "padding"])
def test_trainer_takes_uneven_texts(collator: str, export: Path, tmp_path: Path) -> None:
    # On the left, Trainer would also count each text's first token, which nothing predicts.
    tokenizer = transformers.AutoTokenizer.from_pretrained(export, trust_remote_code=True, padding_side="right")
    rows = [{"input_ids": tokenizer(text).input_ids} for text in TEXTS[:3]]
    if collator == "language_modeling":
        collate: Any = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    else:
        pad = transformers.DataCollatorWithPadding(tokenizer)
        collate = lambda batch: (lambda x: {**x, "labels": x["input_ids"]})(pad(batch))  # noqa: E731
    model = load(export)
    wanted = [(len(row["input_ids"]) - 1, torch.tensor([row["input_ids"]])) for row in rows]
    with torch.no_grad():
        sums = sum(model(ids, labels=ids).loss * count for count, ids in wanted if count)
    arguments = transformers.TrainingArguments(**training(tmp_path))
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    loss = trainer.train().training_loss
    if collator == "language_modeling":
        assert loss == pytest.approx(float(sums) / sum(count for count, _ in wanted), rel=1e-4)
    assert loss > 0


def test_lora_of_peft_merges_to_the_same_logits(export: Path, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    ids = torch.arange(24).view(2, 12)
    model = peft.get_peft_model(load(export), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    model.train()(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora" in name:
                assert value.grad is not None
                value.add_(0.1)
    model.eval().save_pretrained(tmp_path)
    wanted = model(ids, use_cache=False).logits
    assert not torch.allclose(wanted, load(export)(ids).logits, atol=1e-3)
    again = peft.PeftModel.from_pretrained(load(export), tmp_path).eval()
    assert torch.equal(again(ids, use_cache=False).logits, wanted)
    torch.testing.assert_close(again.merge_and_unload()(ids, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(device_map: str, export: Path) -> None:
    pytest.importorskip("accelerate")
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(load(export, device_map=device_map)(ids).logits, load(export)(ids).logits)


@pytest.mark.slow
def test_supervised_fine_tuning_of_trl(export: Path, tokenizer: Any, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": text, "completion": text[::-1]} for text in TEXTS]
    for data in ([{"text": text} for text in TEXTS], rows):
        model = load(export)
        before = model.model.embed.weight.detach().clone()
        arguments = trl.SFTConfig(**training(tmp_path, max_steps=2, learning_rate=0.01, bf16=False))
        options: dict[str, Any] = {"train_dataset": datasets.Dataset.from_list(data), "processing_class": tokenizer}
        trainer = trl.SFTTrainer(model, args=arguments, **options)
        assert 0 < trainer.train().training_loss < 20
        assert not torch.equal(model.model.embed.weight, before)


@pytest.mark.slow
def test_generate_until_of_lm_eval_in_batches(export: Path, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    options = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    found = []
    for size in (1, 3):
        requests = [Instance("generate_until", {}, (text, options), 0) for text in TEXTS]
        harness: Any = HFLM(load(export), tokenizer=tokenizer, batch_size=size, device="cpu")
        found.append(harness.generate_until(requests))
    assert found[0] == found[1]
