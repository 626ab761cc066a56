"""Text is UTF-8 whatever the locale: every file is opened as such, and commands run so under LC_ALL=C and the like."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megamor.config import config_to_yaml
from megamor.data.meta import read_meta
from tests.resume.runs import tiny_run

ROOT = Path(__file__).parents[2]
OPENING = {"open": 1, "read_text": 0, "write_text": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TextIOWrapper": 1}
"""Calls that take the locale's encoding by default → position of the mode (or of the encoding)."""
NOT_FILES = ("self.open", "os.open", "TrainingData.open", "TokenShard.open", "webbrowser.open")


def calls_by_locale(tree: ast.AST) -> list[int]:
    """Lines with a call that reads or writes text in the encoding of the locale."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        is_pipe = "True" in (keywords.get("text"), keywords.get("universal_newlines"))
        last = name.rpartition(".")[2]
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)] + [
            keywords.get("mode", "")
        ]
        is_binary = any(isinstance(mode, str) and "b" in mode and len(mode) < 5 for mode in modes)
        is_text = last in OPENING and name not in NOT_FILES and not is_binary
        if (is_pipe or is_text) and "encoding" not in keywords:
            found.append(node.lineno)
    return found


def test_every_file_is_opened_as_utf_8() -> None:
    wrong = []
    for path in [*ROOT.glob("megamor/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "pretrain.py"]:
        wrong += [f"{path.relative_to(ROOT)}:{line}" for line in calls_by_locale(ast.parse(path.read_text("utf-8")))]
    assert not wrong


def test_the_check_sees_what_it_should() -> None:
    for code, wrong in (
        ("open(p)", True),
        ("open(p, 'rb')", False),
        ("p.open('w')", True),
        ("p.open(mode='wb')", False),
        ("open(p, encoding='utf-8')", False),
        ("p.read_text()", True),
        ("p.write_text('b')", False),  # a mode by its looks, which costs a false negative
        ("p.write_text(text)", True),
        ("subprocess.run(c, text=True)", True),
        ("os.open(p, os.O_RDONLY)", False),
    ):
        assert bool(calls_by_locale(ast.parse(code))) == wrong, code


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}


def command(directory: Path, locale: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    unset = ("LC_", "LANG", "PYTHONUTF8", "PYTHONIOENCODING")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=directory,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **locale},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose name isn't ASCII, with a text and what preprocessing made of it in the locale C."""
    home = tmp_path_factory.mktemp("Größe — 大", numbered=False)
    line = json.dumps({"text": "naïve café — 三\n" * 200}, ensure_ascii=False) + "\n"
    (home / "größe.jsonl").write_text(line, encoding="utf-8")
    options = ("--tokenizer", "byte", "--output-prefix", "dätä")
    made = command(home, ASCII, "-m", "megamor", "preprocess", "--input", "größe.jsonl", *options)
    assert made.returncode == 0, made.stderr
    assert "dätä: 1 document" in made.stdout
    return home


def test_preprocess_in_another_locale(home: Path) -> None:
    assert [source["name"] for source in read_meta(home / "dätä").sources] == ["größe.jsonl"]
    assert (home / "dätä.tokenizer.json").is_file()


def test_train_and_use_a_model_in_another_locale(home: Path) -> None:
    config = tiny_run(home, max_steps=2)
    (home / "run.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    data = ("data.train=[{prefix: dätä}]", "data.tokenizer=dätä.tokenizer.json", "data.seq_len=16")
    own = ("data.validation={}", "run.name=läuf", "run.dir=Läufe", "model.vocab_size=256")
    trained = command(home, ASCII, ROOT / "pretrain.py", "--config", "run.yaml", *data, *own)
    assert trained.returncode == 0, trained.stderr[-2000:]
    checkpoint = home / "Läufe" / "läuf" / "checkpoints" / "latest"
    assert "prefix: dätä" in (checkpoint / "config.yaml").read_text(encoding="utf-8")
    prompt = ("--prompt", "café — 三", "--max-tokens", 2)
    written = command(home, ASCII, "-m", "megamor", "generate", "--checkpoint", "Läufe/läuf", *prompt)
    assert written.returncode == 0, written.stderr
    assert "café — 三" in written.stdout
    options = ("--checkpoint", checkpoint, "--data", "dätä", "--json", "maß.json")
    evaluated = command(home, ASCII, "-m", "megamor.evaluate", *options)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads((home / "maß.json").read_text(encoding="utf-8"))


def test_an_output_that_can_not_show_a_character(home: Path) -> None:
    """The user has chosen its encoding, so it stays; characters that it lacks are spelled out."""
    for locale in ({"PYTHONIOENCODING": "ascii"}, ASCII | {"PYTHONIOENCODING": "latin-1"}):
        missing = command(home, locale, "-m", "megamor", "inspect-data", "三")
        assert missing.returncode == 2
        assert "DataError: " in missing.stderr
        assert "\\u4e09" in missing.stderr
