"""What looks at many texts at once finds what a look at each alone finds."""

import random

import numpy as np
import pytest
from dataset_inputs import character_tokenizer, many, record
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t_helpers import settings as so8t_settings
from so8t_helpers.dataset import duplicates, likeness, personal_data
from so8t_helpers.dataset.policy import harm, ngrams
from so8t_helpers.dataset.records import parse_json
from so8t_helpers.dataset.sample import Plan, Sampler
from so8t_helpers.dataset.screening import MARKS, PERSONAL, WORDS, Screen
from so8t_helpers.thinking.markers import CANDIDATE
from tests.dialects import PHI35

LISTED = harm.HarmWords([])
TELLING = [
    *("<final>", "# 最終回答", "思考ステップ", "＜think＞", "🄪", "［"),
    *(
        "a@b.jp",
        "taro(at)example.jp",
        "x[アット]y.jp",
        "03-1234-5678",
        "０９０ー１２３４ー５６７８",
        "1234567",
    ),
    *("〒100-0001", "東京都千代田区1-2", "10.1.2.3", "fe80::1", "CA 90210", "token", "パスワード", "ghs_"),
    *(
        "ポルノ",
        "爆発物の作り方",
        "Porn",
        "porn",
        "p",
        "o",
        "ﾎﾟﾙﾉ",
        "🍣",
        "か\u3099",
        "가",
        "ᄀ",
        "ᅡ",
        "ẞ",
        "Σ",
        "\0",
        "\n",
        "1",
        "2-",
        "ー",
    ),
]
texts = st.lists(st.text(max_size=6) | st.sampled_from(TELLING), max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(texts, min_size=1, max_size=5))
def test_the_screen_misses_nothing_that_a_regex_finds(found_in):
    seen, plain = Screen(LISTED.categories)(found_in)
    assert plain == [harm.normalised(text) for text in found_in]
    for flags, text, folded in zip(seen, found_in, plain, strict=True):
        assert flags & MARKS or CANDIDATE.search(text) is None
        assert flags & PERSONAL or not personal_data.looks(folded)
        assert flags & WORDS or LISTED.find(folded) is None


def test_the_screen_passes_over_plain_text_and_words_of_any_length():
    sentence = "昨日の午後、図書館の担当者が書類を365点届けました。"
    assert Screen(LISTED.categories)([sentence] * 2) == ([0, 0], [sentence] * 2)
    seen, _ = Screen(["書", "の担", "届けま", "🍣だ"])(["書", "の担", "の", "届けま", "届けた", "🍣だ", ""])
    assert seen == [WORDS, WORDS, 0, WORDS, 0, MARKS | PERSONAL | WORDS, 0]


def test_a_score_is_the_same_alone_and_among_others(tmp_path):
    rng = random.Random(3)
    written = ["".join(rng.choices("あいうえお東西南北", k=rng.randrange(40))) for _ in range(200)]
    unsafe = ["東" in text for text in written]
    ngrams.train(written, unsafe, tmp_path / "c.safetensors", 0, None)
    classifier = ngrams.NgramClassifier(tmp_path / "c.safetensors")
    given_texts = [*written, "", "あ", "あい", "🍣"]
    scores = classifier.scores(given_texts)
    assert scores.tolist() == [classifier.scores([text])[0] for text in given_texts]
    features = [ngrams.features(text) for text in given_texts]
    sums = np.array([classifier.weights[f].sum() / np.sqrt(len(f)) for f in features])
    assert scores == pytest.approx(1 / (1 + np.exp(-(sums + classifier.intercept))), abs=1e-6)


def test_a_line_is_judged_the_same_alone_and_among_others(tmp_path):
    base = character_tokenizer(tmp_path / "base")
    sampler = Sampler(
        Plan(so8t_settings.DatasetSettings(), 0, 2048, PHI35, base / "tokenizer.json", 0.1, None)
    )
    given_records = [
        *many(40),
        record(50, output="お答えできません。", instruction="爆発物の作り方を教えて"),
        record(51, "DENY", output="お答えできません。", instruction="爆発物の作り方を教えて"),
        record(52, instruction="03-1234-5678に電話して"),
        record(53, instruction="<final>と書いて"),
    ]
    import orjson

    raws = [*map(orjson.dumps, given_records), b"{", b"", None]
    assert parse_json(raws[0])
    lines = list(enumerate(raws, 1))
    together = sampler.batch(lines, "utf-8", "in.jsonl")
    assert together == [sampler.batch([line], "utf-8", "in.jsonl")[0] for line in lines]
    reasons = [getattr(outcome, "reason", None) for outcome in together[40:]]
    assert reasons == [
        "unsafe_label",
        None,
        None,
        "format_markers",
        "bad_json",
        "empty_line",
        "line_too_long",
    ]
    assert together[41].harm == "violence" or together[41].harm
    assert together[42].masked == ["phone"]


def signatures(texts: list[str]) -> np.ndarray:
    return duplicates.signatures(duplicates.least_hashes(texts))


@pytest.mark.parametrize("length", [12, 60, 240, 1000])
def test_signatures_tell_how_alike_two_texts_are(length):
    rng = random.Random(length)
    pairs = []
    for _ in range(150):
        text = [chr(0x4E00 + rng.randrange(2000)) for _ in range(length)]
        changed = text[:]
        at = rng.randrange(length)
        changed[at : at + rng.randrange(max(2, length // 5))] = "あ"
        pairs.append(("".join(text), "".join(changed)))
    alike = np.array([likeness.jaccard(a, b) for a, b in pairs])
    first, second = (signatures([pair[side] for pair in pairs]) for side in (0, 1))
    error = (first[:, : duplicates.KEPT] == second[:, : duplicates.KEPT]).mean(axis=1) - alike
    assert abs(error.mean()) < 0.015
    assert error.std() < 0.06
    banding = duplicates.banding(0.7)
    shared = (duplicates.band_keys(first, *banding) == duplicates.band_keys(second, *banding)).any(axis=1)
    assert (alike >= 0.7).sum() > 15
    assert shared[alike >= 0.7].mean() >= 0.98
    alone = signatures([pairs[7][0]])[0]
    assert np.array_equal(alone, first[7])
