"""Personal data: our own cases by kind, borders, full width, check digits, and no slow text."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from stdnum import luhn
from stdnum.jp import cn, in_

from benchmarks.personal_data import KINDS, NAMES, cases, held_back, quality
from so8t_helpers.dataset import personal_data
from so8t_helpers.dataset.masking import mask_record
from so8t_helpers.dataset.personal_data.cued import licence_valid
from so8t_helpers.dataset.personal_data.limits import not_covered
from so8t_helpers.dataset.personal_data.names import by_cues, finder
from so8t_helpers.dataset.records import normalise
from so8t_helpers.settings import PROJECT_ROOT, SettingsError

FIRST, *LATER = KINDS
EVERY = quality(cases(*KINDS), personal_data.find)


@pytest.mark.parametrize("kind", quality(cases(FIRST), personal_data.find))
def test_the_first_kinds_are_found_as_ever(kind):
    found = quality(cases(FIRST), personal_data.find)[kind]
    assert found["values"] >= (1 if kind == "bank_account" else 8)
    assert min(found["precision"], found["recall"]) >= 0.95


@pytest.mark.parametrize("kind", sorted(set(personal_data.MASKS) - {"name"}))
def test_precision_and_recall_of_each_kind(kind):
    assert EVERY[kind]["values"] >= 8
    assert EVERY[kind]["precision"] >= 0.9
    assert EVERY[kind]["recall"] >= 0.85


def test_what_was_held_back_is_found_too():
    found = quality(list(filter(held_back, cases(*LATER))), personal_data.find)["all"]
    assert found["precision"] >= 0.9
    assert found["recall"] >= 0.85


def test_there_are_enough_cases_of_both_sorts():
    for names, values, without in ((KINDS[:1], 80, 60), (KINDS[1:2], 200, 150), (KINDS[2:], 100, 90)):
        texts = cases(*names)
        assert sum(len(case["found"]) for case in texts) >= values
        assert sum(not case["found"] for case in texts) >= without


@pytest.mark.parametrize("name", KINDS)
def test_a_masked_text_holds_none_of_it(name):
    for case in cases(name):
        text, places = case["text"], personal_data.find(case["text"])
        masked = personal_data.mask(text, places)
        assert all(
            text[place.start : place.end] not in masked or place.end - place.start < 4 for place in places
        )
        assert personal_data.find(masked) == [], masked


def test_names_by_cues_are_found_and_masked():
    def find(text):
        return [place for place in personal_data.find(text, by_cues) if place.kind == "name"]

    found = quality(list(filter(held_back, cases(*NAMES))), find)["all"]
    assert found["precision"] >= 0.9
    assert found["recall"] >= 0.7
    text = "担当の佐藤花子さん（090-1234-5678）へ"
    assert personal_data.mask(text, personal_data.find(text, by_cues)) == "担当の[氏名]さん（[電話番号]）へ"


@pytest.mark.slow
def test_names_by_ginza_are_found_in_long_and_broken_text():
    pytest.importorskip("ja_ginza", reason="the optional extra names is not installed")
    entities = finder("ner")
    found = quality(list(filter(held_back, cases(*NAMES))), lambda text: personal_data.find(text, entities))
    assert found["name"]["precision"] >= 0.85
    assert found["name"]["recall"] >= 0.85
    long = "\ud800" + "猫が鳴く。" * 4000 + "有村さんが来た。"  # SudachiPy takes neither at once
    assert [long[start:end] for start, end in entities(long)] == ["有村", "有村"]


def test_ginza_missing_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"--constraint constraints\.txt ja-ginza"):
        finder("ner")


def test_the_card_quotes_what_the_benchmark_measured():
    results = json.loads((PROJECT_ROOT / "benchmarks/results/personal_data.json").read_text(encoding="utf-8"))
    figures = results["figures"]
    for how, part in (("off", figures["kinds"]["held back"]["all"]), ("ner", figures["ner"]["held back"])):
        said = f"precision {part['precision']:.2f} and recall {part['recall']:.2f} on {part['values']} values"
        assert said in not_covered(how)
    assert f"{figures['cues']['lines_per_s']:,} lines/s" in not_covered("cues")
    assert "names of people (dataset.personal_names)" in not_covered("off")


def test_fold_keeps_every_place():
    text = "電話０３－１２３４－５６７８、𝟘𝟙①㎏ﾊﾞ"
    assert len(personal_data.halfwidth(text)) == len(text)
    assert personal_data.halfwidth(text).startswith("電話03-1234-5678、01")


def luhn_valid(digits: str) -> bool:
    """Luhn's check of a card number (ISO/IEC 7812-1)."""
    doubled = (int(d) * 2 for d in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0


def my_number_valid(digits: str) -> bool:
    """Check digit of a 12-digit My Number (Ordinance 85 of 2014, Internal Affairs Ministry, article 5)."""
    weights = (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    rest = sum(int(d) * w for d, w in zip(digits, weights, strict=False)) % 11
    return int(digits[11]) == (0 if rest <= 1 else 11 - rest)


def corporate_number_valid(digits: str) -> bool:
    """Check digit of a 13-digit corporate number (Ordinance 70 of 2014, Ministry of Finance)."""
    body = sum(int(d) * (1 if i % 2 == 0 else 2) for i, d in enumerate(reversed(digits[1:])))
    return int(digits[0]) == 9 - body % 9


@pytest.mark.parametrize("digits", ["309012345620", "459803358720", "309212345610"])
def test_a_driving_licence_closes_with_its_check_digit(digits):
    """Worked examples that others published, but the last, which one of them made up without one."""
    assert licence_valid(digits) is (digits != "309212345610")
    assert not any(
        licence_valid(f"{digits[:10]}{n}{digits[11]}") for n in range(10) if n != int(digits[10])
    ) or (digits == "309212345610")


@hypothesis_settings(max_examples=300)
@given(st.from_regex(r"\A[0-9]{8,18}\Z", fullmatch=True).filter(str.isascii))
def test_check_digits_agree_with_python_stdnum(digits):
    assert luhn_valid(digits) == luhn.is_valid(digits)
    if len(digits) >= 13:
        assert corporate_number_valid(digits[:13]) == cn.is_valid(digits[:13])
    if len(digits) >= 12:
        assert my_number_valid(digits[:12]) == in_.is_valid(digits[:12])


@pytest.mark.parametrize(
    "text",
    ["0" * 50_000, "0-" * 25_000, "a@" * 25_000, "a." * 25_000, ":" * 50_000,
     "東京都" * 17_000, "key=" * 12_000,
     "A b " * 12_000, "1 A" * 16_000, "-----BEGIN PRIVATE KEY-----" * 2_000,
     "eyJ" * 16_000, "〒1" * 25_000, "保険番号1" * 10_000, "Twitter @" * 5_000, "山田さん" * 12_000,
     "北区王子1-2" * 7_000, "a dot at " * 5_000, "口座番号は" * 10_000],
    ids=lambda text: text[:8],
)  # fmt: skip
def test_no_text_takes_more_than_linear_time(text):
    def seconds(sample: str) -> float:
        started = time.process_time()
        personal_data.mask(sample, personal_data.find(sample, by_cues))
        return time.process_time() - started

    half = min(seconds(text[: len(text) // 2]) for _ in range(2))
    # Twice the text may take twice the time; three times leaves room for noise, a square would take four.
    assert seconds(text) < 3 * half + 0.5


def test_a_megabyte_made_to_be_slow_takes_seconds():
    parts = [
        "0-",
        "a@",
        "東京都",
        "1985年1月",
        "口座番号は1",
        "ユーザーID",
        "区王子1-",
        "品川 300 ",
        "田中 ",
        "1 Aa ",
    ]
    text = "".join(part * 22_000 for part in parts)
    assert len(text) > 1_000_000
    started = time.process_time()
    personal_data.find(text, by_cues)
    assert time.process_time() - started < 20  # 1 or 2 where nothing else runs; a square would take an hour


def test_what_was_found_beside_its_cue_is_masked_where_it_stands_alone():
    number = "123456789018"
    data = {"instruction": "番号は?", "output": f"マイナンバーは{number}です。", "label": "ALLOW"}
    record = normalise(data | {"check": {"kind": "contains", "value": number}})
    assert mask_record(record, "mask", None) == ["my_number"]
    assert record.check is not None
    assert record.check["value"] in record.answer
    assert number not in f"{record.answer}{record.check['value']}"
