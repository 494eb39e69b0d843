"""Reads a base's chat dialect from its own files.

A base says how chats are written by a Jinja template among its tokenizer files. It is rendered here on a few
chats, and what it puts between the turns is kept: from then on a chat is put together without Jinja. Phi-3,
Phi-3.5, Phi-4 and Phi-4-mini differ in these texts alone; so do the templates of most other models.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from so8t_helpers.phi3.chat import ASK, BEGIN, END, Dialect
from so8t_helpers.run.files import read_json
from so8t_helpers.settings import SettingsError

# The chats on which a template is looked at.
_CHAT = [("user", "Q7x"), ("assistant", "A7x"), ("user", "Q8x"), ("assistant", "A8x")]
_SYSTEM = ("system", "S7x")
_MARK = re.compile(r"<\|[^|<>\s]+\|>|<[^<>|\s]+>")  # what looks like a control token


def read_dialect(model: Path) -> Dialect:
    """Read the dialect of a model: a folder's tokenizer files, or the metadata of a GGUF file.

    Raises:
        SettingsError: no chat template, or one that is not understood; the message names the mark.
    """
    if not model.is_file():
        return _read_folder(model)
    state = model.stat()
    return _read_gguf(model, state.st_size, state.st_mtime_ns)


def of_tokenizer(tokenizer: Any) -> Dialect:
    """Return the dialect of a tokenizer that transformers loaded; errors as `read_dialect`."""
    controls = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return dialect(tokenizer.chat_template, tokenizer.special_tokens_map, controls, tokenizer.name_or_path)


def _read_folder(folder: Path) -> Dialect:
    config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    template, own = config.get("chat_template"), folder / "chat_template.jinja"
    if own.is_file():
        template = own.read_text(encoding="utf-8")
    if isinstance(template, list):  # several, by name
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    special = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    tokens = {name: one["content"] if isinstance(one, dict) else one for name, one in special.items() if one}
    controls = [entry["content"] for entry in read_json(folder / "tokenizer.json").get("added_tokens", [])]
    controls += [entry["content"] for entry in config.get("added_tokens_decoder", {}).values()]
    return dialect(template, tokens, controls, str(folder))


@lru_cache(maxsize=16)  # the engine, the Modelfile and the evaluation ask; 49,152 tokens take 2 s to read
def _read_gguf(path: Path, size: int, changed: int) -> Dialect:
    """Read the metadata of a file in one state of it."""
    from gguf import GGUFReader, TokenType  # noqa: PLC0415  (a folder needs none of it)

    fields = GGUFReader(path).fields
    keys = ("chat_template", "bos_token_id", "eos_token_id", "token_type")
    template, begin, end, types = (
        field.contents()
        if (field := fields.get(f"tokenizer.ggml.{key}", fields.get(f"tokenizer.{key}")))
        else None
        for key in keys
    )
    field = fields.get("tokenizer.ggml.tokens")

    def text(index: int) -> str:
        return bytes(field.parts[field.data[index]]).decode("utf-8", "replace") if field else ""

    tokens = {name: text(i) for name, i in (("bos_token", begin), ("eos_token", end)) if i is not None}
    special = {TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN}
    controls = [text(i) for i, kind in enumerate(types or []) if kind in special]
    return dialect(template, tokens, controls, str(path))


def dialect(template: str | None, tokens: Mapping[str, str], controls: Iterable[str], source: str) -> Dialect:
    """Look at what a template writes, and return the dialect.

    Args:
        tokens: what the template calls `bos_token`, `eos_token` and the like.
        controls: all tokens of the vocabulary that are no ordinary text.
        source: whose template it is, for errors.

    Raises:
        SettingsError: no template; one that does more than write turns; marks that are no tokens.
    """
    if not template:
        raise SettingsError(
            f"{source}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); a "
            "base must be an instruct model, whose own way of writing chats the training goes on with"
        )
    known = tuple(dict.fromkeys(filter(None, controls)))
    joints, strips = _joints(template, tokens, source)
    for mark in dict.fromkeys(_MARK.findall("".join(joints.values()))):
        if mark not in known:
            raise SettingsError(
                f"{source}: the chat template writes {mark}, which is no token of its own in the tokenizer "
                "(added_tokens in tokenizer.json); the model could not tell it from a user's text"
            )
    found = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))) or r"(?!)")
    end = found.match(joints["assistant", END].lstrip())
    if end is None:
        raise SettingsError(
            f"{source}: after an answer the chat template writes {joints['assistant', END]!r}, which begins "
            "with no control token; without one a model cannot say that it is done"
        )
    begins = [text for pair, text in joints.items() if pair[0] == BEGIN or pair[1] == "assistant"]
    written = [mark for text in begins for mark in found.findall(text)]
    # A model that goes on with one of SentencePiece's own is lost.
    lost = [mark for mark in ("<s>", "</s>", "<unk>") if mark in known]
    stops = dict.fromkeys(filter(None, [end[0], *written, tokens.get("eos_token"), *lost]))
    return Dialect(joints, end[0], tuple(stops), known, strips)


def _joints(template: str, tokens: Mapping[str, str], source: str) -> tuple[dict[tuple[str, str], str], bool]:
    """Render a few chats; return what is written between their turns, and whether contents are stripped."""
    compiled = _compile(template, source)
    joints: dict[tuple[str, str], str] = {}

    def look(turns: list[tuple[str, str]], ask: bool) -> None:
        text = _write(compiled, turns, tokens, ask, source)
        before = BEGIN
        for role, content in turns:
            joint, found, text = text.partition(content)
            if not found:
                raise SettingsError(f"{source}: the chat template leaves a turn of {role} out")
            _keep(joints, (before, role), joint, source)
            before = role
        _keep(joints, (before, ASK if ask else END), text, source)

    if _takes_system(compiled, tokens):
        look([_SYSTEM, _CHAT[0]], ask=True)
    for count, ask in itertools.product(range(1, len(_CHAT) + 1), (True, False)):
        look(_CHAT[:count], ask)
    if joints["user", ASK] != joints["user", "assistant"]:
        raise SettingsError(
            f"{source}: the chat template asks for an answer with {joints['user', ASK]!r} but writes one "
            f"after {joints['user', 'assistant']!r}; a model trained on the one would not know the other"
        )
    spaced = [("user", f" {_CHAT[0][1]} ")]
    return joints, spaced[0][1] not in _write(compiled, spaced, tokens, True, source)


def _takes_system(template: Any, tokens: Mapping[str, str]) -> bool:
    """Whether a system turn is written: some templates leave it out, some refuse it."""
    try:
        return _SYSTEM[1] in _write(template, [_SYSTEM, _CHAT[0]], tokens, True, "")
    except SettingsError:
        return False


def _keep(joints: dict[tuple[str, str], str], pair: tuple[str, str], text: str, source: str) -> None:
    if joints.setdefault(pair, text) != text:
        raise SettingsError(
            f"{source}: between {pair[0] or 'the beginning'} and {pair[1]} the chat template writes {text!r} "
            f"in one chat and {joints[pair]!r} in another; it must join turns always alike"
        )


def _compile(template: str, source: str) -> Any:
    """Compile in a sandbox, as transformers' `_compile_jinja_template`: the template comes with a model."""
    from jinja2 import TemplateError  # noqa: PLC0415  (only where a dialect is read)
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise SettingsError(f"{source}: the chat template is no valid Jinja: {error}") from error


def _write(
    template: Any, turns: list[tuple[str, str]], tokens: Mapping[str, str], ask: bool, source: str
) -> str:
    from jinja2 import TemplateError  # noqa: PLC0415

    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(template.render(messages=messages, add_generation_prompt=ask, **tokens))
    except (TemplateError, TypeError) as error:
        roles = ", ".join(role for role, _ in turns)
        raise SettingsError(f"{source}: the chat template fails on turns of {roles}: {error}") from error
