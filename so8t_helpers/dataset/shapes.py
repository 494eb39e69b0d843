"""The shapes of records: fields of many names, chats, dialogues with a history, preferences, reading tasks.

Alpaca, Dolly and question/answer are fields alone. ShareGPT, OpenAI and TRL write lists of messages,
LLaMA-Factory a `history` of pairs, DPO sets the preferred answer under `chosen` (as hh-rlhf does, in one
text), SQuAD its `answers` as an object. All become one `Said`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from so8t_helpers.dataset.fields import Picked, as_text, pick, text_of
from so8t_helpers.dataset.quarantine import RejectedError

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "agent", "model", "ai"), "assistant"),
}
_WHO, _SAID = ("role", "from", "name", "speaker"), ("content", "value", "text", "utterance")
_HH = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")  # Bai et al. 2022, hh-rlhf
_Messages = list[dict[str, Any]]


@dataclass(slots=True)
class Said:
    """What a record says; `history`: turns before the question, the user's and the assistant's in turn."""

    question: str
    answer: str
    history: tuple[str, ...] = ()
    system: str = ""
    reasoning: str = ""
    topic: str = ""  # that several records share: an article, a paragraph
    context: str = ""  # the end of `question`, where it was given apart


def read_shape(picked: Picked) -> Said:
    """Return what a record of any known shape says.

    Raises:
        RejectedError: unknown shape, wrong type.
    """
    messages = _messages(picked)
    if messages is not None:
        return _from_messages(messages)
    said = _from_fields(picked)
    if "history" in picked:
        said.history = _pairs(picked["history"][1])
    return said


def _messages(picked: Picked) -> _Messages | None:
    """Return a record's messages where it has any, those of prompt and answer put together."""
    asked, answer = (picked[field][1] if field in picked else None for field in ("question", "answer"))
    if "messages" in picked:
        listed = picked["messages"][1]
        if type(listed) is str and listed.lstrip().startswith("["):  # a table's cell
            listed = _parsed(listed)
        if type(listed) is not list or not all(type(message) is dict for message in listed):
            raise RejectedError("wrong_type", "`messages` must be a list of objects")
        chosen = picked["answer"][0] == "chosen" if answer else False
        return [*listed, *(_as_messages(answer, "assistant") if chosen else [])]
    if type(answer) is str and picked["answer"][0] == "chosen" and "\n\nHuman:" in f"\n\n{answer.lstrip()}":
        parts = _HH.split(answer.strip())[1:]
        who = {"Human": "user", "Assistant": "assistant"}
        turns = zip(parts[::2], parts[1::2], strict=True)
        return [{"role": who[role], "content": text} for role, text in turns]
    if not (_are_messages(asked) or _are_messages(answer)):
        return None
    listed = _as_messages(answer, "assistant")
    begins = listed and _role(listed[0]) != "assistant"  # the whole chat, not its answer alone
    system = text_of(picked, "system")
    return [
        *([{"role": "system", "content": system}] if system else []),
        *([] if begins else _as_messages(asked, "user")),
        *listed,
    ]


def _are_messages(value: Any) -> bool:
    listed = [value] if type(value) is dict else value
    return (
        type(listed) is list
        and bool(listed)
        and all(type(m) is dict and _role(m) is not None for m in listed)
    )


def _as_messages(value: Any, role: str) -> _Messages:
    if _are_messages(value):
        return [value] if type(value) is dict else list(value)
    return [{"role": role, "content": value}] if value else []


def _role(message: dict[str, Any]) -> str | None:
    """Return who says a message: one of ours, its own word for another, None where it names nobody."""
    who = next((message[key] for key in _WHO if message.get(key)), None)
    return _ROLES.get(who.lower(), who) if type(who) is str else None


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def _from_messages(messages: _Messages) -> Said:
    turns: list[tuple[str, str]] = []
    reasoning = ""
    for message in messages:
        role = _role(message)
        if role not in {"system", "user", "assistant"}:
            raise RejectedError("unknown_shape", "a turn that is neither system's, user's nor assistant's")
        said = next((message[key] for key in _SAID if message.get(key)), "")
        text = as_text("content", said)
        if role == "assistant":
            reasoning = text_of(pick(message), "reasoning")
        if turns and turns[-1][0] == role:  # one who says two things in a row
            turns[-1] = (role, f"{turns[-1][1]}\n{text}".strip())
        else:
            turns.append((role, text))
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    if turns and turns[-1][0] == "user":  # nobody answered
        turns.pop()
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [role for role, _ in turns] != expected:
        detail = f"`messages` must be [system,] user, assistant, ...; this one has {len(messages)} turns"
        raise RejectedError("unknown_shape", detail)
    return _said([text for _, text in turns], system, reasoning)


def _pairs(history: Any) -> tuple[str, ...]:
    """Return the turns of LLaMA-Factory's `history`, a list of [question, answer]."""
    if type(history) is str and history.startswith("["):
        history = _parsed(history)
    if type(history) is not list or not all(type(pair) is list and len(pair) == 2 for pair in history):
        raise RejectedError("wrong_type", "`history` must be a list of [question, answer]")
    return _spoken([as_text("history", text) for pair in history for text in pair])


def _said(texts: list[str], system: str, reasoning: str) -> Said:
    return Said(texts[-2], texts[-1], _spoken(texts[:-2]), system, reasoning)


def _spoken(texts: list[str]) -> tuple[str, ...]:
    """Return the turns before the last question, without the thinking of their answers."""
    spoken = tuple(split_thought(text)[1] if i % 2 else text for i, text in enumerate(texts))
    if not all(spoken):
        raise RejectedError("unknown_shape", "a turn before the last question that says nothing")
    return spoken


def split_thought(answer: str) -> tuple[str, str]:
    """Return the thinking and the rest of an answer like `<think>…</think>…`; "" where it has none.

    The opening mark may be missing: some templates write it for the model.
    """
    if "</think>" not in answer:
        return "", answer
    thought, _, rest = answer.partition("</think>")
    return thought.strip().removeprefix("<think>").strip(), rest.strip()


def _from_fields(picked: Picked) -> Said:
    question, given = text_of(picked, "question"), text_of(picked, "given")
    answer = _answer(picked)
    if "instruction" in picked and (told := text_of(picked, "instruction")) != question:
        question = f"{told}\n{question}".strip()
    if question or given:
        key, value = picked.get("answer", ("", ""))
        reads = given and (key == "answers" or type(value) in {dict, list})
        topic = (text_of(picked, "topic") or given) if reads else ""
        asked = "\n".join(filter(None, (question, given)))
        return Said(asked, answer, topic=topic, context=given if question else "")
    if "text" in picked:
        about = text_of(picked, "topic")
        if not about:
            raise RejectedError("unknown_shape", "`text` needs `title` or `keyword` to make a question")
        return Said(f"「{about}」について説明してください。", answer or text_of(picked, "text"))
    if answer:
        return Said("", answer)
    expected = "`instruction` with `output`, `messages`, or `text` with `title` or `keyword`"
    raise RejectedError("unknown_shape", f"expected {expected}")


def _answer(picked: Picked) -> str:
    """Return the answer; of several that mean the same, as SQuAD has them, the first."""
    key, value = picked.get("answer", ("", ""))
    if type(value) is dict:  # {"text": [...], "answer_start": [...]}
        value = value.get("text", value)
    if type(value) is list:
        first = value[0] if value else ""
        if type(first) is not dict:
            value = first
        elif "type" not in first:  # of a text in parts each says which kind it is
            value = first.get("text", first)
    return as_text(key, value)
