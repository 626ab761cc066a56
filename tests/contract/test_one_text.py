"""R22: a text has the same ids wherever it is encoded, and its tokens the same text wherever they are decoded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megamor.checkpoint.layout import END_OF_TEXT_FILE
from megamor.cli import evaluate, export_hf, generate, preprocess, pretrain
from megamor.cli.serve import build_engine, parse_arguments
from megamor.codec import Detokenizer, EndOfText, TextCodec, find_end_of_text, texts_of_tokens
from megamor.config import config_to_yaml
from megamor.corpus.tokenizer import TextEncoder, byte_tokenizer, char_tokenizer
from megamor.data.meta import end_of_text, meta_path
from megamor.data.shard import TokenShard
from megamor.errors import DataError, TextError
from megamor.interop.weights import Imported, save_imported
from megamor.load import LoadedModel, load_model
from megamor.serve.engine.request import RequestOutput, SamplingParams, TokenLogprob
from tests.combinations import ROUTERS, lively_model, tiny_config
from tests.commands import refusal, status
from tests.resume.runs import directory_of, tiny_run
from tests.serve.fake import FakeEngine, serving

pytestmark = pytest.mark.promise("R22")

NASTY = (
    "<|endoftext|>",
    "a<|endoftext|>b</s>c<END>",
    "<s>begin",
    "  spaces  before and after  ",
    "one\n\ntwo\r\nthree\ttabs\n",
    "e\u0301 and é, ﬁ, Ω",
    "👩\u200d🚀 漢字",
    "nul\x00bel\x07",
    "\ufeffmark\u2028line",
    "\ufffd replaced",
    ":smile: [bold]x[/bold] [/]",
    "x" * 200,
)


def byte_level() -> Tokenizer:
    """Bytes with a few merges, an end of text, and a token that is recognised in texts on purpose."""
    tokenizer = byte_tokenizer(["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken("    ", special=False, normalized=False)])
    return tokenizer


def with_template() -> Tokenizer:
    """A tokenizer that its authors use with a beginning and an end of text, truncation and padding."""
    tokenizer = byte_tokenizer(["<s>", "</s>"])
    special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=300)
    return tokenizer


def metaspace() -> Tokenizer:
    """As SentencePiece makes them: spaces are part of the words, unknown characters are bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ("▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "an", "nd", "▁and", "</s>", "<s>"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "a"), ("a", "n"), ("n", "d"), ("▁a", "nd")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[no-untyped-call]
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer.post_processor = template
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def loose() -> Tokenizer:
    """Its end of text is an added token that isn't marked as special."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=False, normalized=False)])
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level, "with_template": with_template, "metaspace": metaspace, "loose": loose,
}  # fmt: skip
ENDS = {"byte_level": "<|endoftext|>", "with_template": "</s>", "metaspace": "</s>", "loose": "<|endoftext|>"}


def imported(tokenizer: Tokenizer, directory: Path) -> Path:
    """A checkpoint of an untrained model with `tokenizer`."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = tiny_config(ROUTERS["expert_choice"])
    config = replace(config, model=replace(config.model, vocab_size=400, max_seq_len=512))
    weights = dict(lively_model(config).state_dict())
    save_imported(Imported(config, weights), directory / "model", directory / "tokenizer.json")
    return directory / "model"


@pytest.fixture(params=MAKERS)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    return load_model(imported(MAKERS[request.param](), tmp_path), "cpu")


class Listening(FakeEngine):
    """Answers nothing and remembers the prompts."""

    def __init__(self, codec: TextCodec) -> None:
        super().__init__(lambda *_: "", codec=codec)
        self.prompts: list[list[int]] = []

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        self.prompts.append(list(prompt))
        return super().add_request(prompt, params)


def test_every_path_encodes_alike(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = str(loaded.tokenizer_path)
    expected = [TextEncoder.load(tokenizer).encode([text])[0].tolist() for text in NASTY]
    end = loaded.codec().end_of_text
    assert end is not None
    assert not any(end.id in ids for ids in expected), "an end of text that is spelled out is text"

    lines = tmp_path / "nasty.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in NASTY))
    for accelerator in ("none", "auto"):
        options = ["--input", lines, "--tokenizer", tokenizer, "--append-eod", "--accelerator", accelerator]
        assert status(preprocess.main, *options, "--output-prefix", tmp_path / accelerator) == 0
        shard = TokenShard.open(str(tmp_path / accelerator))
        assert [shard.document(number).tolist() for number in range(len(NASTY))] == [[*ids, end.id] for ids in expected]

    assert [loaded.codec().encode(text) for text in NASTY] == expected
    assert [loaded.tokenizer().encode(text).ids for text in NASTY] == expected

    seen: list[list[int]] = []

    def record(model: object, prompt: list[int], *_: object, **__: object) -> None:
        seen.append(prompt)
        raise SystemExit(0)

    monkeypatch.setattr("megamor.evaluate.sampling.generate", record)
    for text in NASTY:
        assert status(generate.main, "--checkpoint", loaded.directory, "--prompt", text, "--device", "cpu") == 0
    assert seen == expected

    with serving(Listening(loaded.codec())) as server:
        for prompts in (list(NASTY), *NASTY):
            assert httpx.post(f"{server.url}/v1/completions", json={"prompt": prompts}, timeout=20).is_success
        found = [httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"] for text in NASTY]
        assert found == expected
        assert server.engine.prompts == [*expected, *expected]  # type: ignore[attr-defined]

    assert status(export_hf.main, "--checkpoint", loaded.directory, "--output", tmp_path / "hf") == 0
    assert load_model(tmp_path / "hf", "cpu").codec().end_of_text == end
    assert [load_model(tmp_path / "hf", "cpu").codec().encode(text) for text in NASTY] == expected
    assert load_model(tmp_path / "hf", "cpu").tokenizer_path.read_bytes() == Path(tokenizer).read_bytes()
    exported = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert [exported(text).input_ids for text in NASTY] == expected
    assert exported(list(NASTY)).input_ids == expected
    assert (exported.eos_token, exported.eos_token_id) == end
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == end.id


def test_the_empty_text_has_no_tokens(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert loaded.codec().encode("") == []
    assert "--prompt is empty" in refusal(capsys, generate.main, "--checkpoint", loaded.directory, "--prompt", "")


def test_a_template_is_applied_on_request_only() -> None:
    codec = TextCodec(with_template(), "it")
    assert codec.encode("ab") == [97, 98]
    assert codec.encode("ab", add_special_tokens=True) == [256, 97, 98, 257]


# Characters that a tokenizer lacks


def incomplete_bytes(normal: bool) -> Tokenizer:
    """Byte-level, from ASCII text alone: the bytes of é are unknown, and nothing says so."""
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    if normal:
        tokenizer.normalizer = normalizers.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def letters_with(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def added() -> Tokenizer:
    """A token for "é!" that is recognised before the model sees it."""
    tokenizer = letters_with(models.BPE(dict(LETTERS), []))
    tokenizer.add_tokens(["é!"])
    return tokenizer


LETTERS = [(letter, number) for number, letter in enumerate("▁abc ")]
ENDED = [(f"{letter}{end}", 2 * n + bool(end)) for letter, n in LETTERS for end in ("", "</w>")]
LACKING: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: char_tokenizer(["abc ! "]),
    "bpe": lambda: letters_with(models.BPE(dict(LETTERS), [])),
    "bpe_partial_fallback": lambda: letters_with(models.BPE({**dict(LETTERS), "<0xC3>": 5}, [], byte_fallback=True)),
    "bpe_suffix": lambda: letters_with(models.BPE(dict(ENDED), [], end_of_word_suffix="</w>")),
    "bpe_lost_unknown": lambda: letters_with(models.BPE(dict(LETTERS), [], unk_token="<unk>")),
    "bytes": lambda: incomplete_bytes(normal=False),
    "normalized_bytes": lambda: incomplete_bytes(normal=True),
    "unigram": lambda: letters_with(models.Unigram([(letter, -1.0) for letter, _ in LETTERS], None)),
    "added": added,
}


@pytest.mark.parametrize("name", LACKING)
def test_a_character_without_a_token_is_named_with_its_position(name: str) -> None:
    codec = TextCodec(LACKING[name](), "tok.json")
    assert codec.encode("ab cab")
    with pytest.raises(TextError, match=r"^here: character 'é' \(U\+00E9\) at position 4 has no token in tok\.json"):
        codec.encode("ab cé ab", "here")
    encoder = TextEncoder.of(LACKING[name](), "tok.json")
    with pytest.raises(TextError, match="at position 10001 has no token"):
        encoder.encode(["ab", "a" + " ab" * 3333 + " é"])


def test_words_that_are_unknown_are_named_whole() -> None:
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    codec = TextCodec(tokenizer, "words.json")
    assert codec.encode("hello   world") == [0, 1], "spaces that the tokenizer drops by design are not lost text"
    with pytest.raises(TextError, match=r"text: 'there' at position 6 has no token in words\.json"):
        codec.encode("hello there")


def test_an_unknown_token_and_complete_bytes_lose_nothing() -> None:
    unknown = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    assert TextCodec(unknown).encode("aéa") == [0, 1, 0]
    for tokenizer in (byte_tokenizer(), metaspace(), unknown):
        assert not TextCodec(tokenizer).can_lose_text, "these need no check of every text"
    # Vocabularies made from text lack the bytes that never occur in UTF-8.
    utf8 = {letter for byte in range(0xC0) if (letter := byte_tokenizer().id_to_token(byte))}
    utf8 |= {letter for byte in range(0xC2, 0xF5) if (letter := byte_tokenizer().id_to_token(byte))}
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(utf8)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert not TextCodec(tokenizer).can_lose_text
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(utf8)[1:])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert TextCodec(tokenizer).can_lose_text


@pytest.mark.parametrize("name", ["char", "bpe"])
def test_each_tool_refuses_a_character_without_a_token(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = imported(LACKING[name](), tmp_path)
    message = refusal(capsys, generate.main, "--checkpoint", model, "--prompt", "ab é")
    assert "--prompt: character 'é' (U+00E9) at position 3 has no token" in message
    assert "half a surrogate" in refusal(capsys, generate.main, "--checkpoint", model, "--prompt", "a\udce9")
    (tmp_path / "x.jsonl").write_text('{"text": "ab"}\n\n{"text": "b é"}\n')
    options = ["--tokenizer", tmp_path / "tokenizer.json", "--output-prefix", tmp_path / "x"]
    message = refusal(capsys, preprocess.main, "--input", tmp_path / "x.jsonl", *options)
    assert "x.jsonl, line 3: text: character 'é' (U+00E9) at position 2 has no token" in message
    assert not [*tmp_path.glob("x.*bin"), *tmp_path.glob("x.*idx")]
    (tmp_path / "x.txt").write_text("ab\x1ecab\x1ec é")
    message = refusal(capsys, preprocess.main, "--input", tmp_path / "x.txt", *options, "--document-separator", "\x1e")
    assert "x.txt, document 3: text: character 'é'" in message
    codec = load_model(model, "cpu").codec()
    with serving(Listening(codec)) as server:
        for path, body, what in (
            ("/v1/completions", {"prompt": "b é"}, "prompt"),
            ("/v1/completions", {"prompt": ["b", "b é"], "stream": True}, "prompt 1"),
            ("/tokenize", {"prompt": "b é"}, "prompt"),
        ):
            answer = httpx.post(server.url + path, json=body, timeout=20)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"].startswith(f"{what}: character 'é' (U+00E9) at position 2 has no token in ")
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "ab"}).is_success


# The end of text


def test_one_function_decides_the_end_of_text() -> None:
    both = byte_tokenizer(["</s>", "<|endoftext|>", "<END>"])
    assert find_end_of_text(both, "it") == ("<|endoftext|>", 257)
    assert find_end_of_text(both, "it", "<END>") == ("<END>", 258)
    assert find_end_of_text(both, "it", record=EndOfText("<END>", 258)) == ("<END>", 258)
    assert find_end_of_text(byte_tokenizer(), "it") is None
    for record in (EndOfText("<END>", 7), EndOfText("<OTHER>", 258)):
        with pytest.raises(DataError, match=r"texts end with <.*> \(id \d+\) according to the record of the data"):
            find_end_of_text(both, "it", record=record)


def preprocessed(directory: Path, name: str, *options: str) -> str:
    """A data set of some text, with a tokenizer that has three possible ends of text."""
    byte_tokenizer(["<|endoftext|>", "</s>", "<END>"]).save(str(directory / "tokenizer.json"))
    (directory / "text.jsonl").write_text('{"text": "%s"}\n' % ("again and " * 200))
    prefix = str(directory / name)
    files = ["--input", directory / "text.jsonl", "--tokenizer", directory / "tokenizer.json"]
    assert status(preprocess.main, *files, "--output-prefix", prefix, *options) == 0
    return prefix


def test_the_end_of_text_of_the_data_reaches_every_tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = preprocessed(tmp_path, "train", "--append-eod", "--eod-token", "<END>")
    other = preprocessed(tmp_path, "other", "--append-eod")
    silent = preprocessed(tmp_path, "silent")
    base = tiny_run(tmp_path, max_steps=2)
    source = replace(base.data.train[0], prefix=prefix)
    config = replace(
        base,
        model=replace(base.model, vocab_size=259),
        data=replace(base.data, train=(source,), validation={}, tokenizer=str(tmp_path / "tokenizer.json")),
    )
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    assert status(pretrain.main, "--config", tmp_path / "run.yaml") == 0
    checkpoint = directory_of(config) / "checkpoints" / "latest"
    assert json.loads((checkpoint / END_OF_TEXT_FILE).read_text()) == {"token": "<END>", "id": 258}
    assert status(export_hf.main, "--checkpoint", checkpoint, "--output", tmp_path / "hf") == 0

    for model in (checkpoint, tmp_path / "hf"):
        loaded = load_model(model, "cpu")
        assert loaded.codec().end_of_text == ("<END>", 258)
        assert len(loaded.codec().encode("<END>")) == 5
        assert build_engine(parse_arguments(["--checkpoint", str(model)]), loaded).options.end_token == 258
        stops: list[Any] = []

        def record(*_: object, stop_id: int, stops: list[Any] = stops, **__: object) -> None:
            stops.append(stop_id)
            raise SystemExit(0)

        with monkeypatch.context() as patched:
            patched.setattr("megamor.evaluate.sampling.generate", record)
            assert status(generate.main, "--checkpoint", model, "--prompt", "a", "--device", "cpu") == 0
        assert stops == [258]
        assert status(evaluate.main, "--checkpoint", model, "--data", prefix, silent, "--device", "cpu") == 0
        message = refusal(capsys, evaluate.main, "--checkpoint", model, "--data", other, "--device", "cpu")
        assert "end with <|endoftext|> (id 256)" in message
        assert "--eod-token '<END>'" in message

    # The run's data must keep its end of text.
    (tmp_path / "run.yaml").write_text(
        config_to_yaml(replace(config, data=replace(config.data, validation={"other": other})))
    )
    assert "preprocess one of them again" in refusal(capsys, pretrain.main, "--config", tmp_path / "run.yaml")
    two = replace(config, train=replace(config.train, max_steps=3))
    for file in (meta_path(prefix),):
        file.write_text(file.read_text().replace('"<END>"', '"</s>"').replace('"eod_id": 258', '"eod_id": 257'))
    (tmp_path / "run.yaml").write_text(config_to_yaml(two))
    assert "says that texts end with" in refusal(capsys, pretrain.main, "--config", tmp_path / "run.yaml")


def test_data_that_contains_the_token_decides(tmp_path: Path) -> None:
    named = preprocessed(tmp_path, "named")
    ended = preprocessed(tmp_path, "ended", "--append-eod", "--eod-token", "<END>")
    assert end_of_text([named, ended]) == ("<END>", 258)
    assert end_of_text([named]) == ("<|endoftext|>", 256)
    assert end_of_text([named], contained=True) is None
    meta_path(ended).unlink()
    assert end_of_text([ended]) is None, "a foreign pair says nothing"


# Tokens to text


def pieces_of(codec: TextCodec, ids: Sequence[int], given: int, generator: random.Random) -> Iterator[str]:
    """Texts of `ids` after the first `given`, which arrive one to three at a time."""
    detokenizer, position = Detokenizer(codec, ids[:given]), given
    while position < len(ids):
        count = generator.randint(1, 3)
        yield detokenizer.push(ids[position : position + count])
        position += count
    yield detokenizer.finish()


@pytest.mark.parametrize("name", MAKERS)
def test_what_arrives_in_pieces_is_the_text_of_the_whole(name: str) -> None:
    codec, generator = TextCodec(MAKERS[name]()), random.Random(1)
    for text in (*NASTY, "and a and", " and  and", "漢字漢字漢字漢字"):
        ids = codec.encode(text)
        whole = codec.decode(ids)
        assert "".join(texts_of_tokens(codec, ids)) == codec.decode(ids, skip_special_tokens=False)
        for given in range(len(ids) + 1):
            before = codec.decode(ids[:given])
            pieces = [*pieces_of(codec, ids, given, generator)]
            if "\ufffd" not in before or name != "metaspace":
                assert before.rstrip("\ufffd" if "\ufffd" not in text else "") + "".join(pieces) == whole
            assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_token_has_the_name_of_its_text_with_the_space() -> None:
    codec = TextCodec(metaspace())
    assert [codec.name(token) for token in codec.encode("and and é")] == [
        " and", " and", " ", "token_id:195", "token_id:169",
    ]  # fmt: skip
    codec = TextCodec(byte_level())
    assert [codec.name(token) for token in codec.encode("a b")] == ["a", " ", "b"]


def test_skipped_special_tokens_keep_the_space_after_them() -> None:
    codec = TextCodec(metaspace())
    (end,) = (codec.tokenizer.token_to_id(name) for name in ("</s>",))
    ids = [*codec.encode("and"), *[end] * 100, *codec.encode("and")]
    assert "".join(pieces_of(codec, ids, 0, random.Random(0))) == codec.decode(ids) == "and and"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_the_server_keeps_spaces_characters_and_offsets(echo: bool, stream: bool) -> None:
    codec = TextCodec(metaspace())
    engine = FakeEngine(lambda *_: "and é漢 end", codec=codec)
    body = {"prompt": "b and", "max_tokens": 100, "logprobs": 1, "echo": echo, "stream": stream}
    with serving(engine) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in (lines if stream else [answer.text])]
        text = "".join(choice["text"] for choice in choices)
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
        tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        assert all("\ufffd" not in choice["text"] for choice in choices)
        stopped = httpx.post(f"{server.url}/v1/completions", json={**body, "stop": " end", "stream": False}, timeout=20)
    whole = ("b and" if echo else "") + " and é漢 end"
    assert text == whole
    assert stopped.json()["choices"][0]["text"] == whole.removesuffix(" end")
    for offset, token in [*zip(offsets, tokens, strict=True)][echo:]:  # a text's first space isn't shown
        assert whole[offset:].startswith(token) or token.startswith("token_id")
    assert [whole[offset] for offset, token in zip(offsets, tokens, strict=True) if token.startswith("token_id")] == [
        *"éé漢漢漢"
    ]


class Siblings(FakeEngine):
    """Answers continuation 1 completely before continuation 0 begins, as an engine without a prefix cache may."""

    def step(self) -> list[RequestOutput]:
        outputs = []
        for number, request in list(self.running.items()):
            index = 1 if request.left[1] else 0
            first = len(request.left[0]) == 3
            (token, *request.left[index]) = request.left[index]
            entry = TokenLogprob(token, -0.5, 1, ((token, -0.5),))
            prompt = (None, *[entry] * (len(request.prompt) - 1)) if index == 0 and first else None
            reason: Any = None if request.left[index] else "length"
            outputs.append(
                RequestOutput(number, index, (token,), (1,), (entry,), prompt_logprobs=prompt, finish_reason=reason)
            )
            if not any(request.left):
                del self.running[number]
        return outputs


@pytest.mark.parametrize("stop", [None, "f"])
def test_an_echo_has_log_probabilities_whichever_continuation_is_first(stop: str | None) -> None:
    codec = TextCodec(byte_level())
    body = {"prompt": "ab", "max_tokens": 3, "logprobs": 1, "echo": True, "n": 2, "stop": stop}
    with serving(Siblings(lambda _, index: ("cde", "efg")[index], codec=codec)) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20).json()
    texts = ["abcde", "abefg" if stop is None else "abe"]
    assert [choice["text"] for choice in answer["choices"]] == texts
    for choice in answer["choices"]:
        assert choice["logprobs"]["token_logprobs"][:3] == [None, -0.5, -0.5]
        assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length" if stop is None else "stop"]


# What is printed


def test_generate_prints_the_text_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = imported(metaspace(), tmp_path)
    codec = load_model(model, "cpu").codec()
    prompt, text = "a :key: [bold]x[/bold] [/nothing]", " and 漢 :smile: [red]" + " and" * 60
    answer = codec.encode(prompt) + codec.encode(text.removeprefix(" "))

    def fake(*_: object, **__: object) -> Any:
        from megamor.evaluate.sampling import GeneratedText

        return GeneratedText(answer, [1] * (len(answer) - 1), len(codec.encode(prompt)))

    monkeypatch.setattr("megamor.evaluate.sampling.generate", fake)
    arguments = ["--checkpoint", model, "--prompt", prompt, "--device", "cpu"]
    assert status(generate.main, *arguments) == 0
    assert capsys.readouterr().out == f"{prompt}{text}\n"
    assert status(generate.main, *arguments, "--show-depth") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = next(line for line in lines if ":smile:" in line)
    assert shown.strip() == text.replace("漢", "……漢").removesuffix(" and").strip(), "the last token has no depth"
    assert ":key: [bold]x[/bold] [/nothing]" in "\n".join(lines)


def test_reports_print_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "data/[bold]:key:[/nothing]" + "x" * 100
    figures = {
        "loss_causal": 1.0,
        "perplexity_causal": 2.7,
        "mean_depth_causal": 1.5,
        "flops_per_token_causal": 1e6,
        "tokens": 10.0,
    }
    evaluate.show({name: figures}, "runs/[a]")
    out = capsys.readouterr().out
    assert Path(name).name in out
    assert "runs/[a]" in out
