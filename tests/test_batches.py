"""Packing: nothing lost, nothing doubled, no leak over a border; the loss mask on the real tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8t_helpers.phi3.chat import EVERY_ANSWER
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.settings import SettingsError
from so8t_helpers.train import batches
from tests.dialects import PHI35
from tests.phi3_folders import REAL


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.randoms())
def test_best_fit_places_every_sample_once_and_never_overfills(lengths: list[int], random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    bins = batches.best_fit(lengths, 64, order)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in chosen) <= 64 for chosen in bins)
    assert len(bins) == len(batches.best_fit(lengths, 64, range(len(lengths))))
    # Two bins that are both at most half full would have been one.
    assert sum(sum(lengths[i] for i in chosen) <= 32 for chosen in bins) <= 1


def sample(length: int, first: int) -> batches.Document:
    tokens = np.arange(first, first + length)
    targets = np.full(length, batches.IGNORE)
    targets[length // 2 : -1] = tokens[length // 2 + 1 :]
    return batches.Document(tokens, targets)


def test_a_sequence_marks_documents_positions_and_padding():
    packed = batches.build_sequence([sample(5, 10), sample(3, 20)], 12, pad_token=7, most_documents=4)
    assert packed.tokens.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 7, 7, 7, 7]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 0, 0]
    assert packed.documents.tolist() == [0] * 5 + [1] * 3 + [-1] * 4
    assert packed.bounds.tolist() == [0, 5, 8, 12, 12, 12]
    assert packed.targets.tolist() == [-100, -100, 13, 14, -100, -100, 22, -100, -100, -100, -100, -100]
    assert packed.counts() == (8, 3, 4)  # PET sees three places of the first document, one of the second


@pytest.mark.skipif(not REAL.is_dir(), reason="the published tokenizer is not here")
@pytest.mark.parametrize("every", [False, True])
def test_of_a_dialogue_the_last_answer_is_trained_or_every_one(every: bool):
    tokenizer = load_tokenizer(REAL)
    said = [("system", "短く"), ("user", "首都は"), ("assistant", "東京です。")]
    said += [("user", "人口は"), ("assistant", "約1400万人です。")]
    messages = [{"role": role, "content": content} for role, content in said]
    row = {"id": "a", "messages": messages} | ({"trained": EVERY_ANSWER} if every else {})
    (found,) = batches.tokenize([row], tokenizer, 200)
    parts = np.split(found.targets, np.flatnonzero(np.diff(found.targets == batches.IGNORE)) + 1)
    trained = [tokenizer.decode(part) for part in parts if part[0] != batches.IGNORE]
    # What is trained is each answer with its end, and nothing of a question.
    wanted = [f"{content}<|end|>" for role, content in said if role == "assistant"]
    assert [text.strip() for text in trained] == wanted[0 if every else 1 :]


def test_joined_sequences_keep_their_documents_apart():
    parts = [
        batches.build_sequence([sample(4, 10)], 6, 0, 2),
        batches.build_sequence([sample(6, 30)], 6, 0, 2),
    ]
    joined = batches.join(parts)
    assert joined.documents.tolist() == [0, 0, 0, 0, -1, -1] + [4] * 6
    assert joined.bounds.tolist() == [0, 4, 6, 6, 6, 12, 12, 12]
    assert joined.counts() == tuple(a + b for a, b in zip(*(p.counts() for p in parts), strict=True))


@pytest.mark.skipif(not REAL.is_dir(), reason="the published tokenizer is not here")
def test_the_loss_covers_the_assistants_tokens_alone():
    tokenizer = load_tokenizer(REAL)
    answer = "# 思考ステップ\n順に考えます。\n\n# 最終回答\n答えは42です。"
    messages = [{"role": "user", "content": "/think 質問です。"}, {"role": "assistant", "content": answer}]
    (found,) = batches.tokenize([{"id": "a", "messages": messages}], tokenizer, 200)
    learnt = found.targets[found.targets != batches.IGNORE]
    assert tokenizer.decode(learnt) == answer + "<|end|>"
    whole = tokenizer(PHI35.render(messages), add_special_tokens=False)["input_ids"]
    assert found.tokens.tolist() == whole[: len(found.tokens)]
    where = np.flatnonzero(found.targets != batches.IGNORE)
    assert (found.targets[where[:-1]] == found.tokens[where[:-1] + 1]).all()


@pytest.mark.skipif(not REAL.is_dir(), reason="the published tokenizer is not here")
def test_a_sample_that_is_too_long_is_named():
    tokenizer = load_tokenizer(REAL)
    messages = [{"role": "user", "content": "長い"}, {"role": "assistant", "content": "長い文" * 50}]
    with pytest.raises(SettingsError, match=r"sample b7: \d+ tokens, training.sequence_length is 32"):
        batches.tokenize([{"id": "b7", "messages": messages}], tokenizer, 32)
