"""OpenAI's dialect through its own client: the final part alone, whole or streamed, and every limit."""

from __future__ import annotations

import json

import openai
import pytest

from so8t_helpers.engines.base import EngineError, Piece
from so8t_helpers.service.draft import Finish, _Stop
from so8t_helpers.thinking.format import ThinkText, build
from so8t_helpers.thinking.redaction import REFUSAL_TEXT
from tests.test_service import GOOD, PUBLIC, QUADRUPLE, SECRET, ScriptedEngine, entries, running

TURN = {"role": "user", "content": "9×8は?"}
TOOL = {"type": "function", "function": {"name": "f"}}
TOKENS = len(GOOD)  # the scripted engine writes a character a token


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
def client(tmp_path, engine):
    with running(tmp_path, engine) as (http, _):
        yield of(http)


def of(http, key="none"):
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=key, max_retries=0, timeout=20)


def chat(client, *messages, **options):
    return client.chat.completions.create(model="test.gguf", messages=list(messages) or [TURN], **options)


def streamed(client, *messages, **options):
    """The text, the last finish reason and the usage, where it was asked for."""
    chunks = list(chat(client, *messages, stream=True, **options))
    assert SECRET not in json.dumps([chunk.model_dump() for chunk in chunks], ensure_ascii=False)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert [choice.delta.role for choice in choices][: len(choices) - 1].count("assistant") == 1
    assert all(choice.finish_reason is None for choice in choices[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, choices[-1].finish_reason, chunks[-1].usage


# --- answers ---------------------------------------------------------------------------------------


def test_the_one_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["test.gguf"]


def test_a_whole_answer_with_real_usage(client, engine):
    found = chat(client)
    assert found.choices[0].message.content == PUBLIC
    assert found.choices[0].finish_reason == "stop"
    assert SECRET not in found.model_dump_json()
    prompt = len(engine.tokenize(engine.prompts[0]))
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        prompt, TOKENS, prompt + TOKENS,
    )  # fmt: skip


def test_what_the_engine_counts_goes_before_our_count(client, engine):
    engine.script = [Piece(GOOD, "", 41, 17), Piece("", "", 42, 17, None, 0.0, True)]
    usage = chat(client).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (17, 42)


def test_a_streamed_answer_equals_the_whole_one(client):
    text, finish, usage = streamed(client, stream_options={"include_usage": True})
    assert (text, finish) == (PUBLIC, "stop")
    assert usage == chat(client).usage
    assert streamed(client)[2] is None


def test_several_turns_are_written_as_the_template_has_them(client, engine):
    before = [{"role": "user", "content": "前の<|end|>問"}, {"role": "assistant", "content": "前の答え"}]
    parts = [{"type": "text", "text": "今の"}, {"type": "text", "text": "問"}]
    chat(client, *before, {"role": "user", "content": parts})
    assert engine.prompts == [
        "<|user|>\n前の< |end|>問<|end|>\n<|assistant|>\n前の答え<|end|>\n"
        "<|user|>\n/think 今の\n問<|end|>\n<|assistant|>\n"
    ]


def test_what_open_webui_asks_for_is_answered(client, engine):
    """Tools with all questions, a thousand tokens for a title, a second question where one got no answer."""
    found = chat(client, TURN, {"role": "user", "content": "今の問"}, tools=[TOOL], max_tokens=1000)
    assert (found.choices[0].message.content, found.choices[0].message.tool_calls) == (PUBLIC, None)
    assert engine.prompts == ["<|user|>\n/think 9×8は?\n\n今の問<|end|>\n<|assistant|>\n"]
    engine.script = "長" * 600
    assert chat(client, max_tokens=1000).usage.completion_tokens == 512


def test_both_dialects_ask_the_engine_the_same(tmp_path, engine):
    with running(tmp_path, engine) as (http, audit):
        chat(of(http), user="taro")
        http.post("/think", json={"user_id": "taro", "query": TURN["content"]})
        assert engine.prompts[0] == engine.prompts[1]
    asked = [entry for entry in entries(tmp_path) if entry["event"] == "asked"]
    answered = [entry for entry in entries(tmp_path) if entry["event"] == "answered"]
    assert [entry["dialect"] for entry in asked] == ["openai", "think"]
    same = ("user", "query_hmac", "model", "engine")
    assert [asked[0][name] for name in same] == [asked[1][name] for name in same]
    assert answered[0]["answer_hmac"] == answered[1]["answer_hmac"] == audit.code(PUBLIC)
    assert answered[0]["thinking_hmac"] == answered[1]["thinking_hmac"]


def test_the_turns_before_have_a_code_of_their_own_in_the_log(tmp_path, engine):
    turns = [TURN, {"role": "assistant", "content": "72"}, {"role": "user", "content": "本当?"}]
    with running(tmp_path, engine, log_queries=True) as (http, audit):
        chat(of(http), *turns)
        chat(of(http), {**TURN, "content": "別"}, *turns[1:])
        assert entries(tmp_path)[1]["query_hmac"] == audit.code("本当?")
    first, second = (entry for entry in entries(tmp_path) if entry["event"] == "asked")
    assert first["query_hmac"] == second["query_hmac"]
    assert first["before_hmac"] != second["before_hmac"]
    assert (first["query"], first["before"]) == ("本当?", turns[:2])


# --- why it ended ----------------------------------------------------------------------------------


def finishes(client, expected: Finish, text, **options):
    whole = chat(client, **options)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, expected)
    assert streamed(client, **options)[:2] == (text, expected)


def test_max_tokens_end_an_answer_by_length(client):
    finishes(client, "length", PUBLIC[:-2], max_tokens=TOKENS - 2)
    finishes(client, "length", PUBLIC[:-2], max_completion_tokens=TOKENS - 2)
    finishes(client, "length", REFUSAL_TEXT, max_tokens=3)  # the thinking took them all


def test_what_is_withheld_or_cut_is_told_as_a_filter_s(tmp_path, engine):
    with running(tmp_path, engine) as (http, _):
        engine.script = SECRET
        finishes(of(http), "content_filter", REFUSAL_TEXT)
        engine.script = f"{GOOD}\n# 思考ステップ\n{SECRET}"
        finishes(of(http), "content_filter", PUBLIC)
        engine.script = GOOD
        finishes(of(http), "stop", PUBLIC)
    answered = [entry for entry in entries(tmp_path) if entry["event"] == "answered"]
    assert [entry["cut"] for entry in answered] == [False, False, True, True, False, False]
    assert [entry["fixed_refusal"] for entry in answered] == [True, True, False, False, False, False]


def test_an_answer_that_ends_by_its_own_mark_was_not_cut(tmp_path, engine):
    engine.script = f"{QUADRUPLE}x"
    with running(tmp_path, engine) as (http, _):
        finishes(of(http), "stop", PUBLIC)
    assert entries(tmp_path)[-1]["cut"] is False


def test_what_repeats_the_thinking_is_counted_in_the_log_and_ends_at_the_limit(tmp_path, engine):
    copied = "この考えはそのまま書き写されています"
    thinking = f"{copied}。\n判定: ALLOW"
    engine.script = build(ThinkText("seed", f"答えです。{copied}。", thinking=thinking))
    with running(tmp_path, engine) as (http, _):
        finishes(of(http), "stop", f"答えです。{copied}。")
    with running(tmp_path, engine, most_shared=8) as (http, _):
        finishes(of(http), "content_filter", "答えです。")
    answered = [entry for entry in entries(tmp_path) if entry["event"] == "answered"]
    found = [entry["shared"] for entry in answered]
    assert found == [len(copied) + 1] * 2 + [2] * 2  # 「す。」 is in both
    assert [entry["cut"] for entry in answered] == [False, False, True, True]


@pytest.mark.parametrize("stop", ["の答", ["え", "の"], ["公開の答え。", "の答え"]])
def test_a_stop_ends_the_final_part_and_frees_the_engine(client, engine, stop):
    engine.script = f"{GOOD}{'。' * 400}"
    finishes(client, "stop", "公開", stop=stop)
    assert engine.closed_early == 2


def test_a_stop_in_the_thinking_is_nobody_s_business(client):
    finishes(client, "stop", PUBLIC, stop=[SECRET, "思考", "判定"])


def test_a_stop_does_not_pass_the_fixed_refusal_off_as_an_answer(tmp_path, engine):
    engine.script = SECRET
    with running(tmp_path, engine) as (http, _):
        for stop in (REFUSAL_TEXT[0], REFUSAL_TEXT[3:5]):
            finishes(of(http), "content_filter", REFUSAL_TEXT, stop=stop)
    answered = [entry for entry in entries(tmp_path) if entry["event"] == "answered"]
    assert {(entry["fixed_refusal"], entry["decision"]) for entry in answered} == {(True, "REFUSE")}


def test_what_a_stop_held_back_leaves_before_the_model_s_own_words_of_refusal(client, engine):
    head, _, tail = GOOD.partition(PUBLIC)
    engine.script = [head, REFUSAL_TEXT[0], REFUSAL_TEXT, tail]
    finishes(client, "stop", REFUSAL_TEXT[0] + REFUSAL_TEXT, stop=f"{REFUSAL_TEXT[0]}x")


@pytest.mark.parametrize("stops", [(), ("abc",), ("aab", "ba"), ("aaab",), ("b",), ("aacab", "c")])
def test_every_chunking_stops_alike(stops):
    text = "aaabaacabcab"
    places = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    expected = text[: min(places)[1]] if places else text
    for cuts in range(1 << (len(text) - 1)):
        stream, found, begin = _Stop(stops), "", 0
        for end in range(1, len(text) + 1):
            if end == len(text) or cuts >> (end - 1) & 1:
                found += stream.feed(text[begin:end])
                begin = end
        assert found + stream.close() == expected


# --- what the decision means -----------------------------------------------------------------------

DENY_TEXT = "担当者にご連絡ください。"


@pytest.mark.parametrize(
    ("on_deny", "text", "decision"),
    [("answer", PUBLIC, "DENY"), ("refuse", DENY_TEXT, "REFUSE"), ("escalate", DENY_TEXT, "ESCALATION")],
)
def test_what_leaves_where_the_model_states_deny(tmp_path, engine, on_deny, text, decision):
    with running(tmp_path, engine, on_deny=on_deny, deny_text=DENY_TEXT) as (http, audit):
        finishes(of(http), "stop" if on_deny == "answer" else "content_filter", text)
        body = http.post("/think", json={"user_id": "taro", "query": "問"}).json()
        assert (body["answer"], body["decision"]) == (text, decision)
        body = {"user_id": "taro", "query": "問", "options": {"stream": True}}
        raw = http.post("/think", json=body).text
        assert (PUBLIC[:2] in raw) == (on_deny == "answer")
        engine.script = build(ThinkText("seed", PUBLIC, thinking=f"{SECRET}\n判定: ALLOW"))
        assert chat(of(http)).choices[0].message.content == PUBLIC
        engine.script = (
            f"# 思考ステップ\n{SECRET}\n判定: DENY\n"  # no final part: the fixed refusal would leave
        )
        expected = REFUSAL_TEXT if on_deny == "answer" else DENY_TEXT
        assert chat(of(http)).choices[0].message.content == expected
    entry = next(entry for entry in entries(tmp_path) if entry["event"] == "answered")
    assert (entry["stated"], entry["decision"]) == ("DENY", decision)
    assert entry["on_deny"] == (None if on_deny == "answer" else on_deny)
    assert entry["answer_hmac"] == audit.code(text)


@pytest.mark.parametrize(
    ("style", "thinking"),
    [
        ("quadruple", f"<think-task>{SECRET}</think-task>\n<think-policy>判定: DENY</think-policy>"),
        ("english", f"{SECRET}\ndECISIon: DENY"),
    ],
)
def test_a_denial_holds_where_the_engine_parts_the_thinking(tmp_path, engine, style, thinking):
    engine.script = [Piece("", thinking), Piece(PUBLIC)]
    given = {"on_deny": "refuse", "deny_text": DENY_TEXT}
    with running(tmp_path, engine, {"think_format": style}, **given) as (http, _):
        assert chat(of(http)).choices[0].message.content == DENY_TEXT
    assert entries(tmp_path)[-1]["stated"] == "DENY"


# --- errors ----------------------------------------------------------------------------------------


def test_system_turns_are_taken_by_setting_alone(tmp_path, engine):
    system = {"role": "system", "content": "短く<|end|>"}
    with running(tmp_path, engine) as (http, _), pytest.raises(openai.UnprocessableEntityError):
        chat(of(http), system, TURN)
    with running(tmp_path, engine, client_system_turns=True) as (http, _):
        for role in ("system", "developer"):
            chat(of(http), {**system, "role": role}, TURN)
        with pytest.raises(openai.UnprocessableEntityError, match="'system' after 'user'"):
            chat(of(http), TURN, system, TURN)
    prompt = "<|system|>\n短く< |end|><|end|>\n<|user|>\n/think 9×8は?<|end|>\n<|assistant|>\n"
    assert engine.prompts == [prompt, prompt]


@pytest.mark.parametrize(
    "options",
    [
        {"messages": []},
        {"messages": [TURN, {"role": "assistant", "content": "72"}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": " "}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"model": "gpt-9"},
        {"max_tokens": 0},
        {"n": 2},
        {"logprobs": True},
        {"temperature": 2.5},
        {"stop": [""]},
        {"response_format": {"type": "json_object"}},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ],
    ids=str,
)
def test_what_is_not_given_is_an_error_that_says_so(client, engine, options):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(**{"model": "test.gguf", "messages": [TURN], **options})
    assert caught.value.code in {"invalid", "turns"}
    assert caught.value.request_id
    assert not engine.prompts


def test_a_token_and_a_rate(tmp_path, engine, monkeypatch):
    monkeypatch.setenv("SO8T_TOKEN", "t0ken")
    with running(tmp_path, engine, requests_per_minute=2) as (http, _):
        with pytest.raises(openai.AuthenticationError):
            chat(of(http, "wrong"))
        with pytest.raises(openai.AuthenticationError):
            of(http, "wrong").models.list()
        assert [chat(of(http, "t0ken"), user=user).choices[0].finish_reason for user in "ab"] == ["stop"] * 2
        with pytest.raises(openai.RateLimitError) as caught:
            chat(of(http, "t0ken"), user="c")
        assert int(caught.value.response.headers["retry-after"]) >= 1


def test_an_engine_s_failure_is_an_error_without_content_in_both_forms(client, engine):
    engine.script = EngineError(f"model said {SECRET}")
    with pytest.raises(openai.InternalServerError) as whole:
        chat(client)
    with pytest.raises(openai.APIError) as part:
        list(chat(client, stream=True))
    for caught in (whole, part):
        assert SECRET not in str(caught.value) + str(caught.value.body)
        assert caught.value.code == "engine"
