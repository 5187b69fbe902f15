"""What a body may say: every field that would change the answer is taken or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_gateway.errors import ClientError, ContextLengthError
from layercast_gateway.intake import choice_seed
from layercast_gateway.openai import NEUTRAL, GenerationRequest, parse_chat, parse_completion
from layercast_gateway.sampling import SamplingFields

USER = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> GenerationRequest:
    return parse_chat(json.dumps({"model": "m", "messages": USER, **fields}).encode())


def completion(**fields: Any) -> GenerationRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hi", **fields}).encode())


def test_defaults_are_openais() -> None:
    request = chat()
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, request.choices) == (1.0, 1.0, 0, 1)
    assert (request.max_tokens, sampling.seed, request.stream, request.logprobs) == (None, None, False, False)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.guide) == (0.0, 1.0, None)
    assert completion().max_tokens == 16


def test_fields_are_taken() -> None:
    request = chat(
        n=2, stop="x", seed=5, temperature=0.5, top_p=0.1, top_k=-1, max_tokens=3, max_completion_tokens=4,
        stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=20,
    )  # fmt: skip
    assert (request.choices, request.stops) == (2, ("x",))
    assert (request.sampling.seed, request.sampling.top_k) == (5, 0)
    assert (request.max_tokens, request.include_usage, request.top_logprobs) == (4, True, 20)
    assert completion(logprobs=0).logprobs
    assert chat(stop=None, n=None, user="me", metadata={}, store=False, service_tier="auto").stops == ()


def test_sampling_fields_are_taken() -> None:
    sampling = chat(
        min_p=0.1, repetition_penalty=1.2, presence_penalty=-1, frequency_penalty=0.5, logit_bias={"7": -3, "5": 1},
        min_tokens=2, max_tokens=4, ignore_eos=True, stop_token_ids=[9, 8, 9],
    ).sampling  # fmt: skip
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 0.5)
    assert sampling.logit_bias == ((5, 1), (7, -3))
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.stop_token_ids) == (2, True, (8, 9))


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "json_schema", "{}"),
        ({"guided_json": '{"type": "null"}'}, "json_schema", '{"type": "null"}'),
        ({"guided_json": {"type": "null"}}, "json_schema", '{"type": "null"}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_grammar": "start: x"}, "grammar", "start: x"),
        ({"guided_choice": ["yes", "nö"]}, "choice", '["yes", "nö"]'),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", '["a"]'),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
    ],
)
def test_guides_have_many_names(fields: dict[str, Any], kind: str, text: str) -> None:
    guide = chat(**fields).sampling.guide
    assert guide is not None and (guide.kind, guide.text) == (kind, text)


def test_text_is_no_guide() -> None:
    assert chat(response_format={"type": "text"}, structured_outputs={}).sampling.guide is None


def test_content_is_text_or_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts}, *USER])
    assert request.messages[0] == {"role": "system", "content": "ab"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": "x"}, "messages"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"structured_outputs": {"tag": 1}}, "structured_outputs.tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"temprature": 0.5}, "temprature"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ClientError) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert caught.value.status == 400


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_are_accepted_and_others_are_not(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        chat(**{name: value})
    with pytest.raises(ClientError, match=f"`{name}` is not supported"):
        chat(**{name: "something"})


@pytest.mark.parametrize(
    "prompt", ["", [], [1, "x"], [[]], [[1], 2], [-1], [True], [1.5], ["x"] * 65, {"a": 1}, None]
)
def test_wrong_prompts(prompt: Any) -> None:
    if prompt == "":
        assert completion(prompt=prompt).prompts == ("",)  # whether it has tokens is the tokenizer's word
        return
    with pytest.raises(ClientError) as caught:
        completion(prompt=prompt)
    assert (caught.value.param or "").startswith("prompt")


def test_completion_limits() -> None:
    assert completion(n=2, best_of=2).choices == 2
    for fields in ({"best_of": 3}, {"suffix": "x"}, {"logprobs": 6}, {"echo": True, "logprobs": 1}):
        with pytest.raises(ClientError):
            completion(**fields)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": "m",, }', "byte 14"),
        (b'{"model": ', "byte 10"),
        (b"", "byte 0"),
        (b'{"a": 1} x', "byte 10"),
        (b"\xff", "byte 0"),
        (b"[1]", "Expected `object`"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_json_names_the_position(body: bytes, words: str) -> None:
    with pytest.raises(ClientError, match=words) as caught:
        parse_chat(body)
    assert caught.value.status == 400


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "n",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "top_p",
        "logprobs",
        *SamplingFields.__struct_fields__,
        *NEUTRAL,
    ]
)


@given(st.dictionaries(FIELDS, JSON, max_size=6) | JSON)
def test_no_body_breaks_the_parser(body: Any) -> None:
    for parse in (parse_chat, parse_completion):
        try:
            assert isinstance(parse(json.dumps(body).encode()), GenerationRequest)
        except ClientError as error:
            assert error.status == 400 and error.message


def test_seeds_of_choices() -> None:
    assert choice_seed(7, 0) == 7
    assert choice_seed(-1, 0) == 2**64 - 1
    assert len({choice_seed(7, i) for i in range(8)}) == 8
    assert choice_seed(7, 3) == choice_seed(7, 3) != choice_seed(8, 3)
    assert issubclass(ContextLengthError, ClientError)
