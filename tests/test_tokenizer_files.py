"""Which files make a tokenizer, its kind, and what byte-level BPE is trained and baked with."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import bpe_folders
import phi3_folders
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from so8t_helpers.bake.folder import write_side_files
from so8t_helpers.dataset.fitting import _EXTRA_TOKENS, TokenLengths
from so8t_helpers.gguf.vocabulary import CHECK_TEXT
from so8t_helpers.phi3.tokenizer_files import (
    FILES,
    HUB_PATTERNS,
    copy_tokenizer,
    load_tokenizer,
    read_tokenizer,
    stripping_tokens,
    tokenizer_kind,
)
from so8t_helpers.run.files import StageError

SPACED = "<|user|>  日本語 it's 12345 <|end|>\n<|assistant|>\t𠮷\n"


@pytest.fixture(scope="module")
def phi4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bpe_folders.small_phi4_mini(tmp_path_factory.mktemp("phi4") / "small")


@pytest.fixture(scope="module")
def phi35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi35") / "small"
    phi3_folders.write_side_files(folder)
    return folder


def test_each_kind_is_known_by_tokenizer_json(phi4: Path, phi35: Path) -> None:
    assert (tokenizer_kind(phi4), tokenizer_kind(phi35)) == ("bpe", "sentencepiece")


def test_a_hubs_download_takes_every_file() -> None:
    assert all(any(fnmatch(name, pattern) for pattern in HUB_PATTERNS) for name in FILES)


def edit(change: Callable[[dict], object], folder: Path, target: Path) -> Path:
    """Write a folder's tokenizer.json anew, changed, with its configuration beside it."""
    fast = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(fast)
    (target / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    (target / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    return target


def test_neither_kind_is_named_with_what_was_found(phi4: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"has no tokenizer\.json; save the fast tokenizer"):
        tokenizer_kind(tmp_path)
    edit(lambda fast: fast.update(pre_tokenizer={"type": "Whitespace"}), phi4, tmp_path)
    with pytest.raises(
        StageError, match=r"model is BPE, its pre-tokenizer .*Whitespace.*choose another base"
    ):
        tokenizer_kind(tmp_path)
    edit(lambda fast: fast.update(model={"type": "Unigram", "vocab": []}), phi4, tmp_path)
    with pytest.raises(StageError, match="model is Unigram"):
        tokenizer_kind(tmp_path)


def test_a_missing_file_says_of_which_kind(phi4: Path, phi35: Path, tmp_path: Path) -> None:
    edit(lambda fast: None, phi35, tmp_path)
    with pytest.raises(StageError, match=r"no tokenizer\.model, which .* of kind sentencepiece is made of"):
        tokenizer_kind(tmp_path)
    edit(lambda fast: None, phi4, tmp_path)
    assert tokenizer_kind(tmp_path) == "bpe"
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(StageError, match=r"no tokenizer_config\.json, which .* of kind bpe is made of"):
        tokenizer_kind(tmp_path)


def test_phi4_minis_marks_are_trained_and_baked_without_stripping(phi4: Path, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(phi4)
    trained = load_tokenizer(phi4)
    write_side_files(phi4, tmp_path)
    baked = AutoTokenizer.from_pretrained(tmp_path)
    assert "<|user|>" in stripping_tokens(phi4) and not stripping_tokens(tmp_path)
    assert own.decode(own(SPACED)["input_ids"]) == "<|user|>日本語 it's 12345 <|end|><|assistant|>𠮷\n"
    ids = trained(SPACED)["input_ids"]
    assert trained.decode(ids) == SPACED
    assert ids == baked(SPACED)["input_ids"] == read_tokenizer(phi4 / "tokenizer.json").encode(SPACED).ids
    # Nothing but the flags: the same ids, and the same tokens hidden.
    assert {i: (t.content, t.special, t.normalized) for i, t in own.added_tokens_decoder.items()} == {
        i: (t.content, t.special, t.normalized) for i, t in trained.added_tokens_decoder.items()
    }
    assert trained.decode(ids, skip_special_tokens=True) == "  日本語 it's 12345 \n\t𠮷\n"
    for text in (CHECK_TEXT, *phi3_folders.TEXTS, "<|user|>東京<|end|><|assistant|>はい<|end|>"):
        assert own(text)["input_ids"] == trained(text)["input_ids"] == baked(text)["input_ids"]


def test_all_else_is_copied_byte_for_byte(phi4: Path, phi35: Path, tmp_path: Path) -> None:
    """SentencePiece's marks go on stripping: llama.cpp follows them under a Phi-3 name."""
    for source, changed in ((phi35, set()), (phi4, {"tokenizer.json", "tokenizer_config.json"})):
        target = tmp_path / source.parent.name
        target.mkdir()
        copy_tokenizer(source, target)
        names = {name for name in FILES if (source / name).is_file()}
        assert {path.name for path in target.iterdir()} == names
        assert {n for n in names if (source / n).read_bytes() != (target / n).read_bytes()} == changed


@pytest.fixture(scope="module")
def lengths(phi4: Path) -> tuple[TokenLengths, Tokenizer]:
    return TokenLengths(phi4 / "tokenizer.json"), read_tokenizer(phi4 / "tokenizer.json")


pieces = st.sampled_from(
    [
        "<|user|>",
        "<|end|>",
        "\n\n",
        "   ",
        "東京",
        "です。",
        "が゛",
        "👩‍👩‍👧",
        "𠮷",
        "é",
        "1,400",
        "'LL",
        "\x00",
        "ﾊ",
    ]
)


@hypothesis_settings(max_examples=200, deadline=None)
@given(text=st.lists(st.text(max_size=20) | pieces, max_size=30).map("".join))
@example(text=CHECK_TEXT)
def test_what_byte_level_bpe_surely_keeps_within_a_limit_it_does(
    lengths: tuple[TokenLengths, Tokenizer], text: str
) -> None:
    """The bound is the UTF-8 bytes: never under the count, and no looser than it says."""
    bound, count = lengths[0], len(lengths[1].encode(text, add_special_tokens=False).ids)
    limit = len(text.encode()) + _EXTRA_TOKENS
    assert bound.surely_within(text, limit) and count <= limit
    if text:
        assert not bound.surely_within(text, count - 1)
        assert not bound.surely_within(text, limit - 1)
    assert bound.count(text, 10**6) == count


def test_a_character_that_is_a_token_may_cost_more_beside_another(tmp_path: Path, phi4: Path) -> None:
    """Why the bound counts bytes: a merge across characters can keep one of them from being made."""
    (tmp_path / "merges").mkdir()

    def change(fast: dict) -> None:
        # あ is the bytes ã ģ Ĥ; "x" takes its first byte before the rest could be joined to it.
        merges = [["x", "ã"], ["ã", "ģ"], ["ãģ", "Ĥ"]]
        for pair in merges:
            fast["model"]["vocab"].setdefault("".join(pair), 3000 + len(fast["model"]["vocab"]))
        fast["model"]["merges"] = merges

    tokenizer = read_tokenizer(edit(change, phi4, tmp_path / "merges") / "tokenizer.json")
    alone, beside = (len(tokenizer.encode(text).ids) for text in ("あ", "xあ"))
    assert (alone, beside) == (1, 3)
