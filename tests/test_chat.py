"""The chat dialect: read from a base's own template, equal to what transformers renders."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from so8t_helpers.phi3.chat import user_turn
from so8t_helpers.phi3.template import dialect, of_tokenizer, read_dialect
from so8t_helpers.settings import SettingsError
from tests.dialects import PHI35, PUBLISHED, Published

S, U, A = (
    {"role": role, "content": text}
    for role, text in zip(("system", "user", "assistant"), "あいう", strict=True)
)
SPACED = {"role": "user", "content": "  前後に空白 \n"}
CHATS = [
    ([U], True),
    ([U], False),
    ([U, A], False),
    ([U, A, U], True),
    ([U, A, SPACED, A], False),
    ([SPACED], True),
]
WITH_SYSTEM = [([S, U], True), ([S, U, A], False), ([S, U, A, U], True), ([S, SPACED, A, U, A], False)]


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> Published:
    return PUBLISHED[request.param]


@pytest.fixture(scope="module")
def folder(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 256 letters and the dialect's tokens, saved as transformers does."""
    letters = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in published.controls])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=published.bos, eos_token=published.eos, pad_token=published.eos
    )
    tokenizer.chat_template = published.template
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def test_it_renders_what_transformers_renders(published: Published, folder: Path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    read = read_dialect(folder)
    assert read.takes_system == published.system
    for messages, ask in CHATS + WITH_SYSTEM * published.system:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        assert read.render(messages, ask) == expected


def test_folder_and_tokenizer_give_the_same(published: Published, folder: Path):
    one, two = read_dialect(folder), of_tokenizer(PreTrainedTokenizerFast.from_pretrained(folder))
    assert (one.joints, one.end, one.stops) == (two.joints, two.end, two.stops)
    assert set(one.controls) == set(two.controls) == set(published.controls)


def test_a_gguf_file_says_it_too_and_another_in_its_place_is_read_anew(tmp_path: Path):
    for one in PUBLISHED.values():
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "phi3")
        writer.add_chat_template(one.template)
        writer.add_token_list(one.controls)
        writer.add_token_types([gguf.TokenType.CONTROL] * len(one.controls))
        writer.add_bos_token_id(one.controls.index(one.bos))
        writer.add_eos_token_id(one.controls.index(one.eos))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        assert read_dialect(tmp_path / "model.gguf") == one.dialect


def test_a_template_may_stand_in_the_configuration_too(published: Published, folder: Path, tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": published.template}]
    for template in (published.template, named):
        text = json.dumps(config | {"chat_template": template}, ensure_ascii=False)
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        assert read_dialect(tmp_path) == read_dialect(folder)


def test_writing_stops_at_the_end_of_the_turn_and_where_another_begins(published: Published):
    read = published.dialect
    assert read.end == read.stops[0] == published.end
    assert published.eos in read.stops
    assert all(stop in published.controls for stop in read.stops)
    assert any(stop in read.joints["", "user"] for stop in read.stops)


def test_phi35_stops():
    turns = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")
    assert PHI35.stops == (*turns, "<s>", "</s>", "<unk>")


def test_a_control_token_in_a_text_becomes_ordinary_text(published: Published, folder: Path):
    read, tokenizer = published.dialect, PreTrainedTokenizerFast.from_pretrained(folder)
    text = "".join(f"前{mark}後{mark}{mark}" for mark in published.controls)
    special = set(tokenizer.convert_tokens_to_ids(list(published.controls)))
    assert special.isdisjoint(tokenizer(read.neutral(text))["input_ids"])
    assert not special.isdisjoint(tokenizer(text)["input_ids"])
    assert read.neutral("普通の文 < a > b") == "普通の文 < a > b"
    turn = [{"role": "user", "content": text}]
    asked = tokenizer(read.prompt(turn), add_special_tokens=False)["input_ids"]
    plain = tokenizer(read.prompt([{"role": "user", "content": "問"}]), add_special_tokens=False)["input_ids"]
    assert [i for i in asked if i in special] == [i for i in plain if i in special]


def test_white_space_that_is_a_token_stays_as_it_is():
    spaced = dataclasses.replace(PHI35, controls=(*PHI35.controls, "  ", "\n\n", "。"))
    assert spaced.neutral("a  b\n\n。<s>") == "a  b\n\n。< s>"
    assert dataclasses.replace(PHI35, controls=()).neutral("<s>") == "<s>"


def test_a_prompt_has_the_think_command_before_the_last_question():
    assert PHI35.prompt([U, A, U], "/think") == (
        "<|user|>\nい<|end|>\n<|assistant|>\nう<|end|>\n<|user|>\n/think い<|end|>\n<|assistant|>\n"
    )
    assert PHI35.prompt([S, U]) == "<|system|>\nあ<|end|>\n<|user|>\nい<|end|>\n<|assistant|>\n"
    assert (user_turn("問い", "/think"), user_turn("問い", "")) == ("/think 問い", "問い")


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([A], "'assistant'"),
        ([U, U], "'user'"),
        ([U, S], "'system'"),
    ],
)
def test_an_order_that_the_template_does_not_know_is_an_error(messages: list[dict[str, str]], named: str):
    with pytest.raises(ValueError, match=named):
        PHI35.render(messages)


def test_system_words_without_a_place_are_an_error():
    no_place = PUBLISHED["Phi-3-mini of April 2024 and Phi-3-medium"].dialect
    with pytest.raises(ValueError, match="not for this base"):
        no_place.render([S, U])


TURNS = "{% for m in messages %}<|m|>{{ m['role'] }}{{ m['content'] }}<|e|>{% endfor %}"
PLAIN = TURNS + "{% if add_generation_prompt %}<|m|>assistant{% endif %}"


@pytest.mark.parametrize(
    ("template", "controls", "named"),
    [
        (None, (), "no chat template"),
        ("", (), "no chat template"),
        ("{% for m in messages %}", (), "no valid Jinja"),
        (PLAIN, ("<|m|>",), "<|e|>, which is no token"),
        (PLAIN.replace("<|e|>", " done."), ("<|m|>",), "' done.'"),
        ("{{ messages[0]['content'] }}<|e|>", ("<|e|>",), "leaves a turn of user out"),
        (TURNS + "{% if add_generation_prompt %}<|m|>ask{% endif %}", ("<|m|>", "<|e|>"), "'<|e|><|m|>ask'"),
        ("{{ raise_exception('no chats') }}", ("<|e|>",), "no chats"),
        (PLAIN.replace("<|e|>", "<|e|>{{ loop.index }}"), ("<|m|>", "<|e|>"), "in one chat and"),
    ],
)
def test_a_template_that_is_not_understood_says_why(
    template: str | None, controls: tuple[str, ...], named: str
):
    with pytest.raises(SettingsError, match=f"^some/folder: .*{re.escape(named)}"):
        dialect(template, {"eos_token": "<|e|>"}, controls, "some/folder")


def test_the_real_phi35_files():
    folder = Path(__file__).resolve().parents[2] / "shared" / "phi35"
    if not folder.is_dir():
        pytest.skip("the real Phi-3.5 files are not here")
    read = read_dialect(folder)
    assert (read.joints, read.stops) == (PHI35.joints, PHI35.stops)
