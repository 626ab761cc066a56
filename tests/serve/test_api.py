"""What clients of other servers rely on: fields, defaults, errors, log-probabilities, counts, chat."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from megamor.codec import EndOfText, TextCodec
from megamor.errors import ConfigError
from megamor.serve.engine.engine import ServingEngine
from megamor.serve.engine.request import RequestOutput, TokenLogprob
from megamor.serve.http.chat import ChatTemplate
from megamor.serve.http.completions import CompletionRun
from megamor.serve.http.text import TextStream
from megamor.serve.http.wire import Choice, CompletionRequest
from megamor.serve.options import EngineOptions
from tests.combinations import ROUTERS, lively_model, tiny_config
from tests.serve.fake import CONTEXT, MODEL, FakeEngine, Running, byte_tokenizer, serving
from tests.serve.reference import forward, log_softmax
from tests.serve.test_server import error_of, events, post

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chat_codec() -> TextCodec:
    """Bytes and three special tokens, one of which begins every text."""
    tokenizer = byte_tokenizer()
    names = ["<|im_start|>", "<|im_end|>", "<|begin|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    return TextCodec(tokenizer, end_of_text=EndOfText("<|im_end|>", tokenizer.token_to_id("<|im_end|>")))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    codec = chat_codec()
    engine = FakeEngine(lambda prompt, index: f"né{index}", codec=codec)
    with serving(engine, chat=ChatTemplate(TEMPLATE, codec)) as running:
        yield running


def first(server: Running, **body: Any) -> dict[str, Any]:
    """The first choice of an answer."""
    response = post(server, **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]  # type: ignore[no-any-return]


def test_null_is_the_default(server: Running) -> None:
    nulls = dict.fromkeys(set(CompletionRequest.model_fields) - {"prompt"})
    assert first(server, prompt="a", **nulls) == first(server, prompt="a")
    assert server.engine.params[-1].model_dump() == server.engine.params[-2].model_dump()
    assert post(server, prompt="a", stream=True, stream_options={"include_usage": None}).status_code == 200
    assert error_of(post(server, prompt=None), 400)["param"] == "prompt"
    assert post(server, "/tokenize", prompt="a", model=None, add_special_tokens=None).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"temperature": "hot"}, "temperature", "temperature = 'hot': must be a number"),
        ({"n": 1.5}, "n", "n = 1.5: must be a whole number"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens = -1: must be at least 0"),
        ({"top_p": 0}, "top_p", "top_p = 0: must be more than 0"),
        ({"echo": "maybe"}, "echo", "echo = 'maybe': must be true or false"),
        ({"prompt": 5}, "prompt", "prompt must be a string, a list of strings, a list of token ids, or a list of such"),
        ({"prompt": [True]}, "prompt", "prompt must be a string"),
        ({"prompt": [[1], "a"]}, "prompt", "prompt must be a string"),
        ({"prompt": ["a"] * 300}, "prompt", "prompt has 300 prompts; give 1 to 256"),
        ({"stop": [1]}, "stop", "stop must be a string or a list of strings"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids[1]", "must be a whole number"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "must be a whole number"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "must be at most 100"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty", "repetition_penalty = 1e-40: must be at least 0.01"),
        ({"temperature": 1e30}, "temperature", "must be at most 100"),
        ({"presence_penalty": 3}, "presence_penalty", "must be at most 2"),
        ({"best_of": 2}, "best_of", "best_of = 2"),
        ({"best_of": 1, "n": 2}, "best_of", "best_of = 1 must be left out or equal n = 2"),
        ({"suffix": "b"}, "suffix", "suffix is not served"),
        ({"tools": [{}]}, "tools", "tools: unknown field"),
        ({"model": "other"}, "model", "not served here"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"stream": True, "stream_options": {"nonsense": 1}}, "stream_options.nonsense", "unknown field"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "= 0 must be -1, or 1 to the context of 512"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "= -2: must be at least -1"),
        ({"truncate_prompt_tokens": 513}, "truncate_prompt_tokens", "= 513 must be -1, or 1 to the context"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "must not be empty"),
        ({"allowed_token_ids": [1, -5]}, "allowed_token_ids[1]", "must be at least 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "must be at least 0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "must be at most 20"),
        ({"min_tokens": 20}, "min_tokens", "min_tokens = 20 must be at most max_tokens = 16"),
        ({"n": 128, "prompt": ["a"] * 9}, "n", "1152 sequences; this server takes up to 1024"),
    ],
    ids=str,
)
def test_errors_name_the_field_in_plain_words(server: Running, body: dict[str, Any], param: str, message: str) -> None:
    for stream in (False, True):
        if "stream_options" in body and stream != body.get("stream", False):
            continue
        error = error_of(post(server, **{"prompt": "a", "stream": stream} | body), 404 if "model" in body else 400)
        assert error["param"] == param
        assert message in error["message"]
        assert "Input" not in error["message"], "the words of pydantic"


def test_errors_of_texts_name_the_field(server: Running) -> None:
    content = b'{"prompt": ["a", "\\ud800"]}'
    error = error_of(httpx.post(server.url + "/v1/completions", content=content, timeout=20), 400)
    assert (error["param"], error["message"][:30]) == ("prompt", "prompt 1: character 0 is half ")
    for prompts, number in ((["a", "b", ""], 2), ([[5], [5] * (CONTEXT + 1)], 1)):
        error = error_of(post(server, prompt=prompts), 400)
        assert error["message"].startswith(f"prompt {number}: ")


def test_bodies_that_are_no_object(server: Running) -> None:
    for content, message in (
        ("[1]", "the body: must be an object"),
        ('{"a" 1}', "the body: not valid JSON"),
        ("", "is needed"),
    ):
        error = error_of(httpx.post(server.url + "/v1/completions", content=content), 400)
        assert (error["param"], message in error["message"]) == (None, True), error


def test_fields_that_ask_for_nothing_are_accepted(server: Running) -> None:
    neutral = {
        "suffix": "",
        "best_of": 1,
        "user": "me",
        "logit_bias": {},
        "tools": [],
        "response_format": {"type": "text"},
    }
    neutral |= {"use_beam_search": False, "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    neutral |= {"priority": 0, "bad_words": [], "return_token_ids": True, "add_special_tokens": False}
    assert first(server, prompt="a", **neutral)["text"] == "né0"
    assert first(server, prompt="a", n=2, best_of=2)["text"] == "né0"


@pytest.mark.parametrize(("given", "count"), [(None, None), (False, None), (True, 1), (0, 0), (1, 1), (5, 5)], ids=str)
def test_logprobs_may_be_a_bool(server: Running, given: Any, count: int | None) -> None:
    assert (first(server, prompt="a", logprobs=given)["logprobs"] is None) == (count is None)
    assert server.engine.params[-1].logprobs == count
    assert server.engine.params[-1].prompt_logprobs is None, "only with echo"


def test_sampling_at_the_edges_reaches_the_engine(server: Running) -> None:
    first(server, prompt="a", temperature=1e-38, logit_bias={"50": -100, "7": 2.5})
    got = server.engine.params[-1]
    assert (got.temperature, got.logit_bias) == (0.0, {50: -100.0, 7: 2.5})


def test_the_default_length_is_what_fits(server: Running) -> None:
    for length, tokens in ((CONTEXT - 20, 16), (CONTEXT - 16, 16), (CONTEXT - 5, 5), (CONTEXT - 1, 1)):
        assert post(server, prompt=[97] * length).status_code == 200
        assert server.engine.params[-1].max_tokens == tokens
    # As in vLLM, a prompt that fills the context leaves no room for a token; with echo it can be scored.
    assert error_of(post(server, prompt=[97] * CONTEXT), 400)["param"] == "prompt"
    error_of(post(server, prompt=[97] * (CONTEXT - 5), max_tokens=6), 400)
    assert post(server, prompt=[97] * CONTEXT, max_tokens=0, echo=True, logprobs=0).status_code == 200


def test_usage_in_every_event(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = [json.loads(event)["usage"] for event in events(server, prompt="ab", stream_options=options)[:-1]]
    assert [usage["completion_tokens"] for usage in found] == [1, 2, 3, 4, 4]
    assert {usage["prompt_tokens"] for usage in found} == {2}
    found = [
        json.loads(event)["usage"] for event in events(server, prompt="ab", stream_options={"include_usage": True})[:-1]
    ]
    assert [usage is None for usage in found] == [True] * (len(found) - 1) + [False]
    found = events(server, prompt="ab", stream_options={"continuous_usage_stats": True})
    assert {json.loads(event)["usage"] for event in found[:-1]} == {None}, "it says how often, not whether"


def test_tokenizer_info_and_unknown_ids(server: Running) -> None:
    info = httpx.get(server.url + "/tokenizer_info").json()
    names = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE}
    assert names.items() <= info.items()
    assert info["model_max_length"] == CONTEXT
    assert post(server, "/tokenize", prompt="a<|im_end|>").json()["count"] == 11
    assert info["vocab_size"] == 259
    # The name of a token that begins or ends texts, alone, is that token: lm-eval's remote tokenizer asks for its id.
    for name, number in {"<|im_end|>": 257, "<|begin|>": 258}.items():
        assert post(server, "/tokenize", prompt=name, add_special_tokens=False).json()["tokens"] == [number]
        assert post(server, prompt=name).json()["usage"]["prompt_tokens"] == len(name), "in a prompt it is text"
    assert post(server, "/tokenize", prompt="<|im_start|>").json()["count"] == 12
    assert post(server, "/tokenize", prompt="a", add_special_tokens=True).json()["tokens"] == [258, 64]
    error = error_of(post(server, "/detokenize", tokens=[97, 259]), 400)
    assert (error["param"], "259" in error["message"]) == ("tokens", True)


def test_head(server: Running) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/dashboard"):
        response = httpx.head(server.url + path)
        assert (response.status_code, response.content) == (200, b"")
    assert httpx.head(server.url + "/v1/completions").status_code == 405


def test_cross_origin_requests_by_option() -> None:
    preflight = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization, content-type"
    for allowed, wanted in (
        ("", None),
        ("http://other.example", None),
        ("http://page.example,http://b", preflight["Origin"]),
        ("*", "*"),
    ):
        engine = FakeEngine(lambda *_: "x")
        with serving(engine, cors_origins=allowed, api_keys=("key",)) as server:
            answer = httpx.options(server.url + "/v1/completions", headers=preflight)
            assert answer.headers.get("access-control-allow-origin") == wanted
            assert (answer.status_code == 200) == (wanted is not None)
            refused = httpx.post(server.url + "/v1/completions", headers={"Origin": preflight["Origin"]}, json={})
            assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (401, wanted)


# Log-probabilities


def check_offsets(text: str, logprobs: dict[str, Any]) -> None:
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token.startswith("token_id:"):
            assert offset < len(text)
        else:
            assert text[offset : offset + len(token)] == token, (text, logprobs)


@pytest.mark.parametrize("prompt", ["xyz", "é漢👩‍🚀x", [195, 97, 98], [195, 195, 169 % 256, 98]], ids=str)
def test_offsets_count_characters(server: Running, prompt: Any) -> None:
    choice = first(server, prompt=prompt, logprobs=1, echo=True)
    check_offsets(choice["text"], choice["logprobs"])
    assert choice["logprobs"]["text_offset"] == sorted(choice["logprobs"]["text_offset"])


def test_offsets_of_broken_characters() -> None:
    """Bytes that form no character are one character of the text each, also for the tokens after them."""
    codec = TextCodec(byte_tokenizer())
    letters = {bytes([number]): codec.tokenizer.token_to_id(letter) for letter, number in byte_letters().items()}
    text = b"a\xc3b\xc3\xc3\xa9c\xf0\x9f\x91d \xe6\xbc\xa2e\xffz"
    prompt = [letters[bytes([byte])] for byte in text]
    with serving(FakeEngine(lambda *_: "x")) as server:
        choice = first(server, prompt=prompt, logprobs=0, echo=True, max_tokens=1)
        assert choice["text"] == text.decode(errors="replace") + "x"
        check_offsets(choice["text"], choice["logprobs"])
        starts = [len(text[:end].decode(errors="ignore")) for end in range(len(text))]
        assert choice["logprobs"]["text_offset"][:2] == starts[:2]


def byte_letters() -> dict[str, int]:
    """The byte that each letter of the byte-level alphabet stands for."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in kept}
    return letters | {chr(256 + number): byte for number, byte in enumerate(b for b in range(256) if b not in kept)}


def real_engine(**options: Any) -> FakeEngine:
    """A real engine of a small model, in the place of a scripted one."""
    engine: Any = ServingEngine(
        lively_model(tiny_config(ROUTERS["expert_choice"])).eval(), EngineOptions(kv_memory=1 << 22, **options)
    )
    engine.codec, engine.gate = TextCodec(byte_tokenizer()), threading.Event()
    return engine  # type: ignore[no-any-return]


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_prompt_logprobs_of_several_continuations(prefix_caching: bool) -> None:
    """All prompts and all continuations have them, and the chosen token is always among the alternatives."""
    engine = real_engine(prefix_caching=prefix_caching, max_resident=3, chunk_size=4, page_size=4)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8], [60, 2, 3]]
    with serving(engine) as server:
        body = {"prompt": prompts, "n": 5, "echo": True, "logprobs": 2, "max_tokens": 3, "seed": 3}
        answers = [post(server, **body).json() for _ in range(2)]
    model = engine.model  # type: ignore[attr-defined]
    for answer in answers:
        for number, choice in enumerate(answer["choices"]):
            prompt, logprobs = prompts[number // 5], choice["logprobs"]
            tokens = choice["token_ids"]
            assert tokens[: len(prompt)] == prompt
            table = [log_softmax(row) for row in forward(model, tokens, None)[0]]
            assert logprobs["token_logprobs"][0] is None
            wanted = [row[token] for row, token in zip(table, tokens[1:], strict=False)]
            assert logprobs["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-9)
            for row, name, top in zip(table, logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=False):
                assert name in top
                assert 2 <= len(top) <= 3
                assert sorted(top.values(), reverse=True)[:2] == pytest.approx(sorted(row, reverse=True)[:2], abs=1e-9)
        usage = answer["usage"]
        assert usage["prompt_tokens"] == 16
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0, (
            "every prompt token was read for its log-probability"
        )


@pytest.mark.parametrize("echo", [False, True])
def test_prompt_logprobs_as_in_vllm(echo: bool) -> None:
    engine = real_engine(max_resident=3, chunk_size=4, page_size=4)
    prompts = [[5, 6, 7, 8, 9, 10], [60]]
    body = {"prompt": prompts, "n": 2, "prompt_logprobs": 2, "max_tokens": 2, "seed": 3, "echo": echo}
    with serving(engine) as server:
        choices = post(server, **body).json()["choices"]
        fewer = post(server, **body | {"prompt_logprobs": 0, "logprobs": 3}).json()["choices"]
        error = error_of(post(server, **body, stream=True), 400)
        assert (error["param"], "stream" in error["message"]) == ("prompt_logprobs", True)
        assert "prompt_logprobs" not in post(server, prompt=[5]).json()["choices"][0]
    table = [log_softmax(row) for row in forward(engine.model, prompts[0], None)[0]]  # type: ignore[attr-defined]
    for place, choice in enumerate(choices):
        assert (choice["logprobs"], choice["text"] != "") == (None, True)
        none, *entries = choice["prompt_logprobs"]
        assert none is None
        assert len(entries) == len(prompts[place // 2]) - 1
        for row, token, entry in zip(table, prompts[0][1:], entries, strict=False):
            ranked = sorted(range(len(row)), key=lambda other: -row[other])
            assert [*entry] == [*dict.fromkeys(map(str, [token, *ranked[:2]]))]
            for name, found in entry.items():
                assert found["logprob"] == pytest.approx(row[int(name)], abs=1e-9)
                assert found["rank"] == ranked.index(int(name)) + 1
                assert found["decoded_token"] == engine.codec.decode([int(name)])
    assert [len(entry) for entry in fewer[0]["prompt_logprobs"][1:]] == [1] * 5
    assert {len(top) for top in fewer[0]["logprobs"]["top_logprobs"] if top} <= {3, 4}
    assert len(fewer[0]["logprobs"]["tokens"]) == (8 if echo else 2)


def test_prompts_are_shortened_from_the_left(server: Running) -> None:
    for kept, text in ((2, "yz"), (3, "xyz"), (50, "xyz"), (-1, "xyz")):
        answer = post(server, prompt=["xyz", "z"], truncate_prompt_tokens=kept, echo=True).json()
        assert [choice["text"] for choice in answer["choices"]] == [text + "né0", "zné0"]
        assert answer["usage"]["prompt_tokens"] == len(text) + 1
    long = [97] * (CONTEXT + 100)
    for body, left in (({}, CONTEXT - 1), ({"max_tokens": 12}, CONTEXT - 12), ({"max_tokens": CONTEXT}, 1)):
        response = post(server, prompt=long, truncate_prompt_tokens=-1, **body)
        if left == 1:  # as without it: the answer alone takes the context
            error_of(response, 400)
            continue
        assert response.json()["usage"]["prompt_tokens"] == left
    messages = [{"role": "user", "content": "hi"}]
    answer = post(server, "/v1/chat/completions", messages=messages, truncate_prompt_tokens=4, max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] == 4


def test_allowed_tokens_alone_are_chosen() -> None:
    with serving(real_engine(end_token=11)) as server:
        answer = post(server, prompt=[5, 6], allowed_token_ids=[3, 70], max_tokens=12, seed=1).json()
        assert {*answer["choices"][0]["token_ids"]} <= {3, 70}
        assert len(answer["choices"][0]["token_ids"]) == 12
        error = error_of(post(server, prompt=[5], allowed_token_ids=[3, 97]), 400)
        assert (error["param"], "97" in error["message"]) == ("allowed_token_ids", True)
        error = error_of(post(server, prompt=[5], allowed_token_ids=[11], min_tokens=1), 400)
        assert (error["param"], "min_tokens" in error["message"]) == ("allowed_token_ids", True)


def test_cached_tokens_count_prompt_tokens_once() -> None:
    with serving(real_engine(page_size=4)) as server:
        body = {"prompt": [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8, 9]], "n": 2, "max_tokens": 6}
        first_time, again = (post(server, **body).json()["usage"] for _ in range(2))
    assert first_time["prompt_tokens"] == again["prompt_tokens"] == 14
    # Of the second prompt the last token must be read, and so must the block that it is in.
    assert first_time["prompt_tokens_details"]["cached_tokens"] in (0, 4)
    assert again["prompt_tokens_details"]["cached_tokens"] == 8 + 4


def test_min_tokens_hold_back_stop_strings(server: Running) -> None:
    """A stop string that is complete within the first tokens is text; one that is complete later ends the text."""
    engine = FakeEngine(lambda *_: "abcabcabc")
    with serving(engine) as running:
        for least, text in ((0, "a"), (2, "a"), (3, "abca"), (4, "abca"), (6, "abcabca"), (9, "abcabcabc")):
            body = {"prompt": "x", "stop": "bc", "min_tokens": least, "max_tokens": 20}
            assert first(running, **body)["text"] == text, least
            assert "".join(json.loads(e)["choices"][0]["text"] for e in events(running, **body)[:-1]) == text


def test_the_earliest_stop_string_of_a_token_counts() -> None:
    whole: Any = SimpleNamespace(push=lambda _: "a b c", finish=lambda: "")
    for stops, text in ((("c", "b"), "a "), (("b c", "b"), "a "), (("c", "x"), "a b ")):
        assert TextStream(whole, stops).push([1]) == text


def test_a_text_begins_as_its_prompt_ends() -> None:
    """Decoders drop the leading space of a text; a continuation keeps its own."""
    words = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    with serving(FakeEngine(lambda *_: "b a", codec=TextCodec(words))) as server:
        assert first(server, prompt="a")["text"] == " b a"
        assert first(server, prompt="a", echo=True)["text"] == "a b a"


def test_a_continuation_that_stops_before_the_echo() -> None:
    """The log-probabilities of the prompt come with continuation 0. What others have meanwhile waits for them."""
    codec = TextCodec(byte_tokenizer())
    letters = codec.encode("axyz")
    one = tuple(TokenLogprob(token, -0.5, 1) for token in letters)
    coming = [
        *(RequestOutput(0, 1, (letters[n],), (1,), one[n : n + 1]) for n in (1, 2, 3)),
        RequestOutput(0, 0, (letters[3],), (1,), one[3:], (None,), finish_reason="length"),
    ]
    dropped: list[int] = []

    async def following() -> tuple[int, RequestOutput]:
        return 0, coming.pop(0)

    async def main() -> list[Choice]:
        body = CompletionRequest(prompt="a", n=2, echo=True, logprobs=1, stop="y")
        runner: Any = SimpleNamespace(drop=lambda _, prompt, index: dropped.append(index))
        run, generation = CompletionRun(body, codec, runner, MODEL, [letters[:1]]), SimpleNamespace(next=following)
        return [choice for _ in range(4) for choice in await run.next_choices(generation)]  # type: ignore[arg-type]

    found = asyncio.run(main())
    texts = ["".join(choice.text for choice in found if choice.index == index) for index in (0, 1)]
    assert texts == ["az", "ax"]
    assert dropped == [1]


# Chat


def test_chat(server: Running) -> None:
    messages = [
        {"role": "system", "content": " be brief "},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    answer = post(server, "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=1, n=2).json()
    assert answer["object"] == "chat.completion"
    assert "delta" not in answer["choices"][0]
    assert [choice["message"] for choice in answer["choices"]] == [
        {"role": "assistant", "content": f"né{index}"} for index in range(2)
    ]
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[110], None, None, [48]]
    assert content[0]["top_logprobs"] == [{"token": "n", "logprob": -0.5, "bytes": [110]}]
    assert server.engine.params[-1].max_tokens == CONTEXT - answer["usage"]["prompt_tokens"], "all that fits"
    text = "<|begin|><|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # The special tokens are single tokens, not their spelling.
    assert (
        answer["usage"]["prompt_tokens"]
        == len(text) - len("<|begin|>") - 3 * len("<|im_start|>") - 2 * len("<|im_end|>") + 6
    )
    found = [json.loads(event) for event in chat_events(server, messages=messages, max_completion_tokens=2)[:-1]]
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert found[-1]["choices"][0]["finish_reason"] == "length"


def test_chats_report_as_many_alternatives_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In completions the chosen token is always among them, one more than asked for if it is unlikely."""
    codec = chat_codec()
    engine = FakeEngine(lambda *_: "x", codec=codec)
    (likely,) = codec.encode("y")
    monkeypatch.setattr(engine, "_logprob", lambda token: TokenLogprob(token, -2.0, 5, ((likely, -0.1),)))
    with serving(engine, chat=ChatTemplate(TEMPLATE, codec)) as running:
        assert first(running, prompt="a", logprobs=1)["logprobs"]["top_logprobs"] == [{"y": -0.1, "x": -2.0}]
        body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1}
        (entry,) = post(running, "/v1/chat/completions", **body).json()["choices"][0]["logprobs"]["content"]
        assert (entry["token"], [top["token"] for top in entry["top_logprobs"]]) == ("x", ["y"])


def chat_events(server: Running, **body: Any) -> list[str]:
    with httpx.stream("POST", server.url + "/v1/chat/completions", json={"stream": True, **body}) as response:
        assert response.status_code == 200
        return [line.removeprefix("data: ") for line in response.iter_lines() if line]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is needed"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "parts of type text",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs", "logprobs = true"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools", "unknown field"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "prompt", "context"),
    ],
    ids=str,
)
def test_bad_chats(server: Running, body: dict[str, Any], param: str, message: str) -> None:
    error = error_of(post(server, "/v1/chat/completions", **body), 400)
    assert message in error["message"]
    assert error["param"] == param


def test_the_template_renders_as_in_transformers(server: Running, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    codec, tricky = chat_codec(), TEMPLATE + "{% for x in [1, 2] %}{% break %}{% endfor %}{{ {'k': '<é>'} | tojson }}"
    tricky += "{% generation %}\n  x\n{%- endgeneration %}\n\n"
    theirs = PreTrainedTokenizerFast(tokenizer_object=codec._recognizing, bos_token="<|begin|>", eos_token="<|im_end|>")
    messages = [{"role": "user", "content": "a <|im_end|> b\n"}, {"role": "assistant", "content": "ok"}]
    wanted = theirs.apply_chat_template(messages, chat_template=tricky, add_generation_prompt=True, return_dict=False)
    engine = FakeEngine(lambda *_: "x", codec=codec)
    with serving(engine, chat=ChatTemplate(tricky, codec)) as running:
        engine.gate.clear()
        thread = threading.Thread(target=post, args=(running, "/v1/chat/completions"), kwargs={"messages": messages})
        thread.start()
        running.wait_until(lambda: bool(engine.running))
        assert engine.running[0].prompt == wanted
        engine.gate.set()
        thread.join()
    with pytest.raises(ConfigError, match="chat template"):
        ChatTemplate("{% if %}", codec)
    assert ChatTemplate.read(tmp_path / "none.jinja", codec) is None
    escape = ChatTemplate("{{ messages.__class__.__mro__ }}", codec)
    with serving(FakeEngine(lambda *_: "x", codec=codec), chat=escape) as running:
        error_of(post(running, "/v1/chat/completions", messages=messages), 400)


def test_chat_with_the_openai_client(server: Running) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=None, logprobs=True)
        assert answer.choices[0].message.content == "né0"
        assert answer.choices[0].logprobs is not None
        chunks = client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "né0"


def test_events_are_single_lines_for_every_client() -> None:
    """httpx, among others, ends lines at U+2028 and U+0085 too."""
    text = "a\u2028b\x85c\x0bd\u2029é\r\n"
    with serving(FakeEngine(lambda *_: text)) as server:
        found = [json.loads(event)["choices"][0]["text"] for event in events(server, prompt="x", max_tokens=99)[:-1]]
        assert "".join(found) == text
        with httpx.stream("POST", server.url + "/v1/completions", json={"prompt": "x", "stream": True}) as response:
            assert response.headers["x-accel-buffering"] == "no"
            assert response.headers["cache-control"] == "no-cache"


def test_an_error_of_the_server_has_openais_form(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine.codec, "encode", lambda *_, **__: 1 / 0)
    error = error_of(post(server, prompt="a"), 500)
    assert (error["type"], "ZeroDivisionError" in error["message"]) == ("server_error", True)


@pytest.mark.parametrize(
    "content",
    [
        '\ufeff{"prompt": "a"}'.encode(),
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "a", "temperature": "0.5", "stream": "false", "max_tokens": 3.0}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": ["a"], "stop": [], "model": ""}',
        b'{"prompt": "a", "top_k": 99999999999999999999, "max_depth": 99}',
        b'{"prompt": "a", "max_tokens": 0}',
    ],
)
def test_unusual_bodies_that_are_right(server: Running, content: bytes) -> None:
    response = httpx.post(server.url + "/v1/completions", content=content, timeout=20)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": 1e999}',
        b'{"prompt": "a", "max_tokens": 99999999999999999999}',
        b'{"prompt": "a", "seed": 9223372036854775808}',
        b'{"prompt": [[]]}',
        b'{"prompt": [["a"]]}',
        b'{"prompt": [null]}',
        b'{"prompt": [1, 99999999999]}',
        b'{"prompt": {"text": "a"}}',
        b'{"prompt": "a", "logit_bias": [1]}',
        b'{"prompt": "a", "logprobs": 21}',
        b'{"prompt": "a", "stop": {"a": 1}}',
        b'{"prompt": "a", "response_format": {"type": "json_object"}}',
        b"\x1f\x8b\x08",
        b'{"prompt": "a"} {"prompt": "b"}',
    ],
)
def test_wrong_bodies_get_a_readable_error(server: Running, content: bytes) -> None:
    error = error_of(httpx.post(server.url + "/v1/completions", content=content, timeout=20), 400)
    for word in ("Input", "pydantic", "Traceback", "constrained"):
        assert word not in error["message"]
