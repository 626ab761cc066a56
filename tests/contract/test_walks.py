"""The commands of the documentation, extracted from its pages and run in order as a new user would.

From an empty directory with a few files in The Pile's form to a step of `mor_1b`. Only the sizes of model and batch are
changed: paths, tokenizer, vocabulary and configuration are those of the pages.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import yaml
import zstandard

from megamor.checkpoint import TrainerState
from megamor.cli import main
from megamor.corpus.bpe import train_bpe
from tests.commands import refusal, status
from tests.serve.process import server_process

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TINY = ["model.dim=32", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=64", "data.seq_len=32"]
ONE_STEP = ["train.global_batch_size=2", "train.micro_batch_size=1", "train.stop_at_step=1", "train.precision=fp32"]


def section(page: Path, heading: str) -> str:
    """The text below a heading, up to the next one."""
    below = page.read_text(encoding="utf-8").split(f"{heading}\n", 1)[1]
    return re.split(r"^##+ ", below, maxsplit=1, flags=re.MULTILINE)[0]


def blocks(text: str, language: str = "") -> list[str]:
    """The code blocks of a page's text in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for own, block in found if own == language]


def commands(block: str) -> list[list[str]]:
    """The commands of a block as words, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


PILE = commands(blocks(section(DOCS / "data.md", "### The Pile"))[0])
OWN = commands(blocks(section(DOCS / "data.md", "### Your own text"))[0])
RECIPE = blocks(section(DOCS / "data.md", "### Your own text"), "yaml")[0]


def documents() -> Iterator[str]:
    """Text to learn from: the sections of these pages."""
    for page in sorted(DOCS.glob("*.md")):
        yield from (part for part in page.read_text(encoding="utf-8").split("\n## ") if len(part) > 100)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout with a directory of Pile files and one of text files; it is the working directory."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    texts = [*documents()]
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Docs"}}) + "\n" for text in texts]
    (tmp_path / "pile" / "train").mkdir(parents=True)
    for number in range(20):
        packed = zstandard.compress("".join(lines[number::22]).encode())
        (tmp_path / "pile" / "train" / f"{number:02}.jsonl.zst").write_bytes(packed)
    (tmp_path / "pile" / "val.jsonl.zst").write_bytes(zstandard.compress("".join(lines[20::22]).encode()))
    (tmp_path / "mine").mkdir()
    for number, text in enumerate(texts * 6):  # so many that one in fifty of them is always some
        (tmp_path / "mine" / f"{number:03}.txt").write_text(f"{number}\n{text}", encoding="utf-8")
    return tmp_path


def walk(command: list[str], *changes: str) -> None:
    """Run a command of a page, `pretrain` with `changes`."""
    assert command[0] == "megamor", command
    words = command[1:] + (list(changes) if command[1] == "pretrain" else [])
    assert status(main, *words) == 0, shlex.join(command)


def test_from_a_dense_model_to_a_served_one_in_five_commands(fresh: Path) -> None:
    transformers = pytest.importorskip("transformers")
    block = next(each for each in blocks((ROOT / "README.md").read_text()) if "convert-depth" in each)
    found = commands(block)
    start = next(number for number, words in enumerate(found) if words[1:2] == ["import"])
    five = found[start : start + 5]
    assert [words[1] for words in five] == ["import", "preprocess", "convert-depth", "pretrain", "serve"]
    # In place of the published model, one of the same class; and texts with enough documents for the split.
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    dense = transformers.LlamaConfig(
        **shape, vocab_size=512, num_hidden_layers=32, max_position_embeddings=2048, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, eos_token_id=0, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(dense).save_pretrained(fresh / "published")
    texts = [*documents()]
    tokenizer = train_bpe(iter(texts), 512, ["<|endoftext|>"])
    tokenizer.save(str(fresh / "published" / "tokenizer.json"))
    lines = "".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number, text in enumerate(texts * 4))
    (fresh / "text").mkdir()
    (fresh / "text" / "0.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    tiny = [*TINY, "model.vocab_size=512"]
    walk([word.replace("HuggingFaceTB/SmolLM2-135M", str(fresh / "published")) for word in five[0]])
    walk(five[1])
    walk([*five[2], *tiny])
    walk(five[3], *tiny, *ONE_STEP)
    state = TrainerState.read(fresh / "runs/uptrain_smollm2_135m/checkpoints/step_00000001")
    kinds = [state.started_from["kind"], state.started_from["started_from"]["kind"]]
    assert kinds == ["init", "convert-depth"]
    checkpoint = fresh / five[4][five[4].index("--checkpoint") + 1]
    with server_process(checkpoint, fresh) as server:
        request = {"prompt": "The model", "max_tokens": 5}
        answer = httpx.post(server.url + "/v1/completions", json=request, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 5


def test_from_the_piles_files_to_a_step_of_mor_1b(fresh: Path, capsys: pytest.CaptureFixture) -> None:
    assert [command[1] for command in PILE] == ["tokenizer", "preprocess", "preprocess", "pretrain", "pretrain"]
    problems = refusal(capsys, main, *PILE[3][1:])  # the dry run, before anything is there
    for name in ("data/tokenizer.json", "data/pile_train", "data/pile_val"):
        assert name in problems
    for command in PILE:
        walk(command, *TINY, *ONE_STEP)
    assert (fresh / "runs" / "mor_1b" / "checkpoints" / "step_00000001" / "tokenizer.json").exists()
    assert "mor_1b is at step 1" in capsys.readouterr().out


def test_the_split_in_place_of_a_validation_file(fresh: Path) -> None:
    options = re.search(r"`(--output-prefix data/pile --append-eod --split [\d.,]+)`", (DOCS / "data.md").read_text())
    assert options is not None
    (fresh / "pile" / "val.jsonl.zst").unlink()
    walk(PILE[0])
    split = shlex.split(options[1].replace("0.999,0.001", "0.9,0.1"))  # of a hundred documents
    walk([*PILE[1][: PILE[1].index("--output-prefix")], *split])
    walk(PILE[3], *TINY, *ONE_STEP)


def test_the_readme_prepares_the_same_data(fresh: Path) -> None:
    block = next(block for block in blocks((ROOT / "README.md").read_text()) if "megamor tokenizer" in block)
    data = [words for words in commands(block) if words[1:2] in (["tokenizer"], ["preprocess"])]
    outputs = ("--output", "--output-prefix", "--tokenizer", "--input", "--vocab-size")
    picked = lambda words: {name: words[words.index(name) + 1] for name in outputs if name in words}  # noqa: E731
    assert [picked(words) for words in data[:3]] == [picked(words) for words in PILE[:3]]


def test_a_text_of_ones_own_takes_four_lines(fresh: Path) -> None:
    lines = [line for line in RECIPE.splitlines() if not line.startswith("#")]
    assert len(lines) <= 4
    (fresh / "mine.yaml").write_text(RECIPE)
    assert set(yaml.safe_load(RECIPE)["data"]["validation"]) == {"mine"}  # and not the recipe's own set
    for command in OWN:
        walk(command, *TINY)
    walk(["megamor", "pretrain", "--config", "mine.yaml"], *TINY, *ONE_STEP)
    assert (fresh / "runs" / "mine" / "checkpoints" / "latest").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["data.tokenizer=none.json"], "tokenizer none.json can't be read"),
        (["data.train=[data/pile_trian]"], "data/pile_trian.idx doesn't exist"),
        (["data.validation={pile: data/none}"], "data/none.idx doesn't exist"),
        (["model.vocab_size=300"], "tokenizer data/tokenizer.json has"),
        (["model.vocab_size=300"], "more than model.vocab_size 300"),
        (
            ["--nodes", "3", "--processes", "8"],
            "train.global_batch_size = 1024 isn't divisible by train.micro_batch_size",
        ),
        (["data.tokenizer=configs/mor_1b.yaml"], "is not a tokenizer.json of the tokenizers library"),
        (["data.train=[data/pile_train, data/pile_train]"], "data.train names the same data twice"),
        (["data.seq_len=1000000", "model.max_seq_len=1000000"], "too few for one window"),
        (["data.tokenizer=$NO_SUCH_VARIABLE/t.json"], "the environment variable NO_SUCH_VARIABLE isn't set"),
    ],
)
def test_a_dry_run_finds_what_would_end_the_run(
    fresh: Path, capsys: pytest.CaptureFixture, change: list[str], said: str
) -> None:
    for command in PILE[:3]:
        walk(command)
    walk(PILE[3])
    assert said in refusal(capsys, main, *PILE[3][1:], *change)
    assert not (fresh / "runs").exists()


def test_a_dry_run_reports_all_at_once(fresh: Path, capsys: pytest.CaptureFixture) -> None:
    problems = refusal(capsys, main, *PILE[3][1:])
    assert len(problems.splitlines()) == 4
    assert "--nodes and --processes are for --dry-run" in refusal(capsys, main, *PILE[4][1:], "--nodes", "2")


def test_a_tokenizer_is_the_same_every_time(fresh: Path, capsys: pytest.CaptureFixture) -> None:
    walk(PILE[0])
    first = (fresh / "data" / "tokenizer.json").read_bytes()
    assert "data/tokenizer.json exists" in refusal(capsys, main, *PILE[0][1:])
    (fresh / "data" / "tokenizer.json").unlink()
    environment = {**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-m", *PILE[0]], check=True, env=environment, capture_output=True)
    assert (fresh / "data" / "tokenizer.json").read_bytes() == first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--vocab-size", "100"], "give at least 257, for the 256 bytes and the 1 special tokens"),
        (["--vocab-size", "300", "--input", "none/*.txt"], "none/*.txt: no such file"),
        (["--vocab-size", "300", "--sample-bytes", "0"], "give a positive number of bytes"),
        (["--vocab-size", "300", "--special-tokens", "<a>", "<a>"], "name each once"),
        (["--vocab-size", "300", "--json-key", "body"], "body"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained(
    fresh: Path, capsys: pytest.CaptureFixture, options: list[str], said: str
) -> None:
    default = ["tokenizer", "train", "--input", "pile/train/*.jsonl.zst", "--output", "t/tok.json"]
    assert said in refusal(capsys, main, *default, *options)
    assert not (fresh / "t").exists()


def test_the_sample_is_taken_from_all_files(fresh: Path, capsys: pytest.CaptureFixture) -> None:
    (fresh / "two").mkdir()
    for name, word in (("a", "apple "), ("b", "banana ")):
        text = json.dumps({"text": word * 3000}) + "\n"
        (fresh / "two" / f"{name}.jsonl").write_text(text * 150)
    train = ["tokenizer", "train", "--input", "two/*.jsonl", "--vocab-size", "300", "--output", "tok.json"]
    assert status(main, *train, "--sample-bytes", "1e6", "--special-tokens", "<pad>") == 0
    vocabulary = json.loads((fresh / "tok.json").read_text())["model"]["vocab"]
    assert {"Ġapple", "Ġbanana"} <= vocabulary.keys()
    assert (vocabulary["<|endoftext|>"], vocabulary["<pad>"]) == (0, 1)
    assert "the text has no more pairs" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_walk_with_the_model_as_it_is(fresh: Path) -> None:
    """In processes of their own, down to a step of the real `mor_1b` of 128 tokens in 14 GB."""
    if psutil.virtual_memory().available < 16e9 or shutil.disk_usage(fresh).free < 12e9:
        pytest.skip("needs 16 GB of memory and 12 GB of disk")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in PILE:
        changes = [*ONE_STEP, "data.seq_len=128"] if command[1] == "pretrain" else []
        done = subprocess.run(
            [sys.executable, "-m", *command, *changes], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "771,801,088 unique with embedding" in done.stdout
    assert "mor_1b is at step 1" in done.stdout


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_every_command_of_a_page_exists(page: Path, capsys: pytest.CaptureFixture) -> None:
    """Its options and the configurations it names too."""
    text = "".join(blocks(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
    for line in re.findall(r"^(?:\$ )?(megamor \w.*)$", text, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        assert status(main, words[1], "--help") == 0, line
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        if words[1] not in ("launch", "bench", "tokenizer"):  # which pass options on, or have subcommands
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line
        for file in re.findall(r"configs/\S+\.yaml", line):
            assert (ROOT / file).exists(), line
