"""Downstream tasks: equal to transformers on the export and to the server, whatever the batches and ranks."""

from __future__ import annotations

import importlib.machinery
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.evaluator import evaluate as harness_evaluate

from megamor.cli import evaluate, sweep_depth
from megamor.config import FixedDepthConfig, ParallelConfig
from megamor.config.exits import ExitRule
from megamor.corpus.writer import ShardWriter
from megamor.errors import ConfigError, DataError, TextError
from megamor.evaluate import tasks as tasks_module
from megamor.evaluate.sampling import generate
from megamor.evaluate.scoring import Continuation, Scorer
from megamor.evaluate.tasks import GOLD_BITS, PAPER, SETS, TaskSet, load_tasks, paper_average, run_tasks
from megamor.interop.export import export_huggingface
from megamor.load import load_model
from megamor.model import Transformer
from megamor.parallel import init_world
from tests.combinations import REPRESENTATIVES, ROUTERS
from tests.commands import refusal
from tests.conftest import FIXTURES
from tests.distributed.harness import run_ranks
from tests.tasks import CONTEXT, KINDS, QUESTIONS, task_codec, task_model, task_tokenizer, write_tasks

DATA = FIXTURES.parent / "data" / "eval"
CPU = torch.device("cpu")
Answers = dict[str, list[Any]]


def scorer(model: Transformer, **options: Any) -> Scorer:
    return Scorer(model, CPU, model, dtype=model.embed.weight.dtype, **options)


def answers(tasks: TaskSet) -> Answers:
    """What a model answered to every request, by task."""
    return {name: [i.resps[0] for i in task.instances] for name, task in tasks.loaded["tasks"].items()}


def our_answers(tasks: TaskSet, model: Transformer, **options: Any) -> Answers:
    run_tasks(scorer(model, **options), task_codec(), tasks)
    return answers(tasks)


def assert_equal(ours: Answers, theirs: Answers, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        for mine, other in zip(found, theirs[name], strict=True):
            mine, other = (value if isinstance(value, tuple) else (value,) for value in (mine, other))
            assert mine[1:] == other[1:], name
            assert mine[0] == (other[0] if isinstance(other[0], str) else pytest.approx(other[0], abs=tolerance)), name


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tasks(directory: Path) -> TaskSet:
    return load_tasks([*KINDS], directory=directory, num_fewshot=1)


@pytest.fixture(scope="module")
def hugging_face() -> type:
    """The harness's model for transformers; what it needs accelerate for are several GPUs."""
    from transformers.models.auto import modeling_auto  # noqa: F401  (imported before there is a false accelerate)

    false, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
    false.__spec__ = importlib.machinery.ModuleSpec("accelerate", None)
    for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
        setattr(false, name, None)
    utils.get_max_memory = None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", false)
        patch.setitem(sys.modules, "accelerate.utils", utils)
        from lm_eval.models.huggingface import HFLM
    return HFLM


@pytest.mark.parametrize(
    "router",
    [
        pytest.param(name, marks=() if name in ("expert_choice", "act_hard") else pytest.mark.slow)
        for name in ROUTERS
        if name != "custom"
    ],
)
def test_equal_to_transformers_on_the_export(router: str, tasks: TaskSet, hugging_face: type, tmp_path: Path) -> None:
    """`--model hf` splits, truncates and continues the same tokens: log-likelihoods of whole texts are equal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, export = tmp_path / "tokenizer.json", tmp_path / "export"
    task_tokenizer().save(str(tokenizer))
    export_huggingface(task_model(ROUTERS[router]), export, tokenizer=tokenizer, dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float64)
    theirs = hugging_face(
        model, tokenizer=AutoTokenizer.from_pretrained(export), batch_size=1, device="cpu", softmax_dtype="float64"
    )
    for task in tasks.loaded["tasks"].values():
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
    expected = harness_evaluate(theirs, tasks.loaded, bootstrap_iters=0, log_samples=False)
    reference = answers(tasks)
    loaded = load_model(export, "cpu", torch.float64)
    found = run_tasks(scorer(loaded.model, batch_size=4), loaded.codec(), tasks)
    assert_equal(answers(tasks), reference, 2e-5)
    for results in found["results"].values():
        results.pop(GOLD_BITS, None)
    assert found["results"].keys() == expected["results"].keys()
    for name, metrics in expected["results"].items():
        assert found["results"][name] == {
            key: value if isinstance(value, str) else pytest.approx(value, rel=1e-6) for key, value in metrics.items()
        }


def pairs() -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations of different lengths, one of them longer than the model's context together."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(5, 2), (1, 1), (30, 7), (17, 17), (60, 3), (CONTEXT, 1), (2, CONTEXT)]
    draw = [torch.randint(0, 256, (a + b,), generator=generator).tolist() for a, b in sizes]
    return [(row[:a], row[a:]) for row, (a, _) in zip(draw, sizes, strict=True)]


@torch.no_grad()
def by_hand(model: Transformer, context: list[int], continuation: list[int], **options: Any) -> tuple[float, bool]:
    """From the logits of the sequence alone."""
    row = (context + continuation)[-CONTEXT - 1 :]
    logits = model(torch.tensor([row[:-1]]), **{"mode": "causal", **options}).logits[0, -len(continuation) :]
    log_p = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
    return float(log_p), logits.argmax(-1).tolist() == continuation


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("router", [name for name in REPRESENTATIVES if name != "custom"])
def test_likelihoods(router: str, batch_size: int) -> None:
    model = task_model(ROUTERS[router])
    likely = [[65]]
    for _ in range(3):
        likely[0].append(int(model(torch.tensor(likely), mode="causal").logits[0, -1].argmax()))
    asked = [*pairs(), (likely[0][:1], likely[0][1:]), (likely[0][:1], [*likely[0][1:3], likely[0][3] ^ 1])]
    found = scorer(model, batch_size=batch_size).likelihoods(asked)
    expected = [by_hand(model, *pair) for pair in asked]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-9)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found][-2:] == [True, False]


@torch.no_grad()
def test_likelihoods_by_the_routing_of_training() -> None:
    model = task_model(ROUTERS["expert_choice"])
    found = scorer(model, mode="topk", batch_size=4).likelihoods(pairs())
    expected = [by_hand(model, *pair, mode="topk")[0] for pair in pairs()]
    assert [score for score, _ in found] == pytest.approx(expected, abs=1e-9)
    assert expected != pytest.approx([by_hand(model, *pair)[0] for pair in pairs()], abs=1e-3)
    with pytest.raises(ConfigError, match="top-k routing sees later tokens and can't generate"):
        scorer(model, mode="topk").continuations([Continuation([1], 3)], task_codec())


@torch.no_grad()
@pytest.mark.parametrize("rule", [ExitRule("entropy", 5.0), ExitRule("kl", 0.3)], ids=str)
def test_likelihoods_under_an_exit_rule(rule: ExitRule) -> None:
    model = task_model(ROUTERS["token_choice"], sharing="stages")
    free = scorer(model, batch_size=3).likelihoods(pairs())
    assert [score for score, _ in free] == pytest.approx([by_hand(model, *pair)[0] for pair in pairs()], abs=1e-9)
    model.set_exit(rule)
    found = scorer(model, batch_size=3).likelihoods(pairs())
    assert [score for score, _ in found] == pytest.approx([by_hand(model, *pair)[0] for pair in pairs()], abs=1e-9)
    assert found != free


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_fixed_depth(depth: int) -> None:
    """A recursive model at a fixed depth is the model of that depth; a routed one takes it for every token."""
    whole, shallow = task_model(FixedDepthConfig()), task_model(FixedDepthConfig(depth=depth))
    whole.load_state_dict(shallow.state_dict())
    whole.depth_bounds = (depth, depth)
    fixed = scorer(whole, batch_size=3)
    assert [score for score, _ in fixed.likelihoods(pairs())] == pytest.approx(
        [by_hand(shallow, *pair)[0] for pair in pairs()], abs=1e-9
    )
    asked = [Continuation([7, 9, 30], 6), Continuation([8, 1, 2], 4)]
    codec = task_codec()
    assert fixed.continuations(asked, codec) == scorer(shallow).continuations(asked, codec)
    for name in ("expert_choice", "act_hard", "monotone"):
        model = task_model(ROUTERS[name])
        depths: list[Any] = []
        model.register_forward_hook(lambda _, inputs, out, depths=depths: depths.append(out.depth))
        model.depth_bounds = (depth, depth)
        scorer(model, batch_size=3).likelihoods(pairs())
        assert {int(value) for found in depths for value in found.flatten()} - {-1} == {depth}


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 16])
@pytest.mark.parametrize("router", ["expert_choice", "act_hard", "skip_forward_recurse"])
def test_continuations(router: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `generate`, up to the first stop text; long prompts, which are read in chunks, lose their beginning."""
    monkeypatch.setattr("megamor.evaluate.scoring.CHUNK_ELEMENTS", 257 * 7)
    model, codec = task_model(ROUTERS[router]), task_codec()
    prompts = [codec.encode(text) for text in ("abc", "xyz", "a longer prompt", "q", "w" * 60)]
    asked = [Continuation(prompt, 4 + 3 * number) for number, prompt in enumerate(prompts)]
    free = []
    for prompt, most, *_ in asked:
        kept = prompt[most - CONTEXT :]
        free.append(codec.decode(generate(model, kept, most, temperature=0, stop_id=256).ids[len(kept) :]))
    found = scorer(model, batch_size=batch_size)
    assert found.continuations(asked, codec) == free
    stops = [text[len(text) // 2 :][:2] for text in free]
    stopped = [r._replace(until=("never", stop)) for r, stop in zip(asked, stops, strict=True)]
    assert found.continuations(stopped, codec) == [
        text.partition(stop)[0] for text, stop in zip(free, stops, strict=True)
    ]
    warm = [r._replace(temperature=2.0, top_p=0.9) for r in asked]
    assert found.continuations(warm, codec) == found.continuations(warm, codec) != free


def on_two_ranks(directory: Path) -> tuple[Answers, int]:
    world = init_world(ParallelConfig())
    passes = []
    model = task_model(ROUTERS["expert_choice"])
    model.register_forward_hook(lambda *_: passes.append(1))
    tasks = load_tasks([*KINDS], directory=directory, num_fewshot=1, quiet=True)
    assert world.size == 2
    return our_answers(tasks, model, batch_size=2), len(passes)


def test_ranks_share_the_requests(directory: Path, tasks: TaskSet) -> None:
    passes = []
    model = task_model(ROUTERS["expert_choice"])
    model.register_forward_hook(lambda *_: passes.append(1))
    alone = our_answers(tasks, model, batch_size=2)
    (first, made), (second, also_made) = run_ranks(on_two_ranks, directory)
    assert first == second == alone
    # A sharded model needs this, and each does about half.
    assert made == also_made
    assert made < 0.65 * len(passes)


def test_bits_per_byte_of_the_right_answer(tasks: TaskSet) -> None:
    model, codec = task_model(ROUTERS["expert_choice"]), task_codec()
    found = run_tasks(scorer(model), codec, tasks)["results"]
    nats = size = 0.0
    for instance in tasks.loaded["tasks"]["choose"].instances:
        answer = instance.doc["choices"][instance.doc["gold"]]
        if instance.args[1] == " " + answer:
            nats -= by_hand(model, codec.encode(instance.args[0]), codec.encode(" " + answer))[0]
            size += len(" " + answer)
    assert size == sum(1 + len(str(row["choices"][row["gold"]])) for row in QUESTIONS)  # type: ignore[index]
    assert found["choose"][GOLD_BITS] == pytest.approx(nats / math.log(2) / size, rel=1e-9)
    assert all(GOLD_BITS not in found[name] for name in KINDS if name != "choose")


def test_paper_average() -> None:
    names = [name for names, _ in PAPER.values() for name in names]
    results = {name: {"acc,none": 0.1 * i, "acc_norm,none": 0.1 * i + 0.01} for i, name in enumerate(names)}
    columns = paper_average(results)
    assert columns is not None
    # lambada acc, hellaswag and piqa acc_norm, winogrande acc, mean of both ARC acc_norm, mmlu acc.
    assert columns["ARC"] == pytest.approx((0.41 + 0.51) / 2)
    assert columns["average"] == pytest.approx((0.0 + 0.11 + 0.21 + 0.3 + 0.46 + 0.6) / 6)
    assert paper_average({name: results[name] for name in names[1:]}) is None


def test_penn_treebank_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.table({"sentence": [" one two ", "three <unk> N"]}), file)
    monkeypatch.setitem(tasks_module.PTB, "dataset_kwargs", {"data_files": {"test": str(file)}})
    tasks = load_tasks(["ptb"], quiet=True)
    (instance,) = tasks.loaded["tasks"]["ptb"].instances
    assert instance.args == ("one two\nthree <unk> N",)
    model, codec = task_model(ROUTERS["expert_choice"]), task_codec()
    found = run_tasks(scorer(model), codec, tasks)["results"]["ptb"]
    score, _ = by_hand(model, [256], codec.encode("one two\nthree <unk> N"))
    assert found["word_perplexity,none"] == pytest.approx(math.exp(-score / 5))
    assert found["bits_per_byte,none"] == pytest.approx(-score / math.log(2) / 21)


@pytest.mark.slow
def test_named_sets_exist() -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager().task_index
    named = {name for names in SETS.values() for name in names}
    assert {*named, "glue", "mmlu", "wikitext", "lambada_openai"} <= known.keys()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, and beside it one without a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    task_tokenizer().save(str(root / "tokenizer.json"))
    model = task_model(ROUTERS["expert_choice"], torch.float32)
    export_huggingface(model, root / "export", tokenizer=root / "tokenizer.json")
    export_huggingface(model, root / "mute")
    return root / "export"


def test_command(export: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(export), "--device", "cpu", "--task-path", str(directory), "--limit", "2"]
    file = tmp_path / "figures.json"
    evaluate.main([*arguments, "--tasks", "choose,rolling", "--num-fewshot", "1", "--json", str(file)])
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())["tasks"]
    loaded = load_model(export, "cpu")
    tasks = load_tasks(["choose", "rolling"], directory=directory, num_fewshot=1, limit=2)
    expected = run_tasks(scorer(loaded.model), loaded.codec(), tasks)
    assert found["results"]["choose"][GOLD_BITS] == pytest.approx(expected["results"]["choose"][GOLD_BITS])
    assert found["n-samples"]["choose"] == {"original": 3, "effective": 2}
    assert found["n-shot"]["choose"] == 1
    assert found.keys() > {"lm_eval", "megamor", "versions"}
    value = f"{expected['results']['choose'][GOLD_BITS]:.4f}"
    assert "|Tasks" in printed.replace(" ", "")
    assert value in printed
    evaluate.main([*arguments, "--tasks", str(directory / "last_word.yaml"), "--routing", "topk", "--json", str(file)])
    assert json.loads(file.read_text())["tasks"]["routing"] == "topk"
    evaluate.main([*arguments, "--tasks", "last_word", "--fixed-depth", "2", "--json", str(file)])
    report = json.loads(file.read_text())
    found = report["tasks"]
    assert report["fixed_depth"] == 2
    # The same model in a sweep, which needs data beside the tasks.
    with ShardWriter(tmp_path / "set", np.dtype("<u2")) as writer:
        writer.add([*range(20)])
        writer.commit()
    files = ["--json", str(file), "--plot", str(tmp_path / "sweep.svg")]
    options = ["--fixed-depths", "2", "--max-depths", "none", "--thresholds", "none", "--exits", "none"]
    sweep_depth.main([*arguments, "--data", str(tmp_path / "set"), "--tasks", "last_word", *options, *files])
    own, second = json.loads(file.read_text())["entries"]
    name = next(iter(second["tasks"]))
    assert second["tasks"][name] == found["results"]["last_word"][name.split()[1] + ",none"]
    assert own["tasks"].keys() == second["tasks"].keys()
    assert name in (tmp_path / "sweep_last_word.svg").read_text()


def test_what_is_refused(
    export: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--device", "cpu", "--task-path", directory]

    def refused(*arguments: object, model: Path = export) -> str:
        return refusal(capsys, evaluate.main, "--checkpoint", model, *arguments)

    assert "give --data or --tasks" in refused()
    # Before any work: these don't even look for the model.
    file = tmp_path / "file"
    file.touch()
    assert "can't be written" in refused("--tasks", "choose", "--json", file / "x", model=Path("none"))
    assert f"{tmp_path} is a directory" in refused("--tasks", "choose", "--json", tmp_path, model=Path("none"))
    assert "--num-fewshot -1 is negative" in refused(*options, "--tasks", "choose", "--num-fewshot", "-1")
    assert "the model has 3 recursions" in refused(*options, "--tasks", "choose", "--fixed-depth", "4")
    assert "tokenizer" in refused(*options, "--tasks", "choose", model=export.parent / "mute")
    assert "is not a directory" in refused("--tasks", "choose", "--task-path", tmp_path / "none", "--device", "cpu")
    assert "can't generate" in refused(*options, "--tasks", "write", "--routing", "topk")
    lost = tmp_path / "lost.yaml"
    lost.write_text((directory / "choose.yaml").read_text().replace("questions.jsonl", "none.jsonl"))
    message = refused("--device", "cpu", "--tasks", lost)
    assert f"the data of task {lost} can't be read (FileNotFoundError" in message
    assert "without a network" in message
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'megamor[eval]'" in refused(*options, "--tasks", "choose")


def test_unknown_tasks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    # Without the harness's own tasks, which take 20 seconds to list.
    own = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager,
        "__init__",
        lambda self, include_path, **_: own(self, include_path=include_path, include_defaults=False),
    )
    with pytest.raises(ConfigError, match="task chose is unknown: did you mean choose"):
        load_tasks(["chose"], directory=directory)
    with pytest.raises(ConfigError, match="task papr is unknown: did you mean paper"):
        load_tasks(["papr"], directory=directory)


def test_requests_that_do_not_fit(directory: Path, tmp_path: Path) -> None:
    model, codec = task_model(ROUTERS["expert_choice"]), task_codec()
    with pytest.raises(TextError, match=f"a continuation of {CONTEXT + 1} tokens doesn't fit"):
        scorer(model).likelihoods([([1], [2] * (CONTEXT + 1))])
    task = yaml.safe_load((directory / "write.yaml").read_text())
    for change, message in (
        ({"max_gen_toks": CONTEXT}, f"up to {CONTEXT} tokens, but the model's context is {CONTEXT}"),
        ({"num_beams": 4}, "num_beams: not offered"),
    ):
        task["generation_kwargs"] = {"until": [], **change}
        (tmp_path / "write.yaml").write_text(yaml.safe_dump(task))
        with pytest.raises(ConfigError, match=message):
            run_tasks(scorer(model), codec, load_tasks([str(tmp_path / "write.yaml")], quiet=True))
    codec.end_of_text = None
    with pytest.raises(DataError, match="no token that ends a text"):
        run_tasks(scorer(model), codec, load_tasks(["rolling"], directory=directory, quiet=True))


def test_real_documents(tmp_path: Path) -> None:
    """Two-way choices by context, as in WinoGrande, and the longest file of the shared data."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} isn't there: set MEGAMOR_FIXTURES or put the shared data beside the project")
    by_context = {
        "doc_to_text": "{{gold}}",
        "doc_to_choice": "{{context_options}}",
        "doc_to_target": "{{continuation}}",
    }
    for name, kind in (("winogrande", by_context), ("boolq", {"doc_to_text": "{{query}}"})):
        data = {"data_files": {"test": str(DATA / f"{name}.jsonl")}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **KINDS["choose"]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**task, **kind}))
    tasks = load_tasks(["winogrande", "boolq"], directory=tmp_path, limit=3, quiet=True)
    model, codec = task_model(ROUTERS["expert_choice"]), task_codec()
    found = run_tasks(scorer(model, batch_size=4), codec, tasks)["results"]
    for name, task in tasks.loaded["tasks"].items():
        likely, nats, size = [], 0.0, 0
        for number in range(3):
            own = [i for i in task.instances if i.doc_id == number]
            scores = [by_hand(model, *(codec.encode(text) for text in i.args))[0] for i in own]
            gold = own[0].doc["gold"]
            likely.append(max(range(len(own)), key=scores.__getitem__) == gold)
            nats, size = nats - scores[gold], size + len(own[gold].args[1].encode())
        assert found[name]["acc,none"] == pytest.approx(sum(likely) / 3)
        assert found[name][GOLD_BITS] == pytest.approx(nats / math.log(2) / size)
