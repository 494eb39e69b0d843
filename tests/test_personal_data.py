"""Personal data: our own cases by kind, borders, full width, check digits, and no slow text."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from stdnum import luhn
from stdnum.jp import cn, in_

from so8t_helpers.dataset import personal_data

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "personal_data.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


def outcome(case: dict) -> tuple[set, set]:
    wanted = {(found["kind"], found["text"]) for found in case["found"]}
    places = personal_data.find(case["text"])
    return wanted, {(place.kind, case["text"][place.start : place.end]) for place in places}


@pytest.mark.parametrize("kind", personal_data.MASKS)
def test_precision_and_recall_of_each_kind(kind):
    right: Counter[str] = Counter()
    for case in CASES:
        wanted, got = (set(filter(lambda item: item[0] == kind, side)) for side in outcome(case))
        right.update(both=len(wanted & got), wanted=len(wanted), got=len(got))
    assert right["wanted"] >= 8
    assert right["both"] >= 0.95 * right["wanted"]
    assert right["both"] >= 0.95 * right["got"]


def test_there_are_enough_cases_of_both_sorts():
    empty = sum(not case["found"] for case in CASES)
    assert len(CASES) >= 150
    assert empty >= 60


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["found"]], ids=lambda case: case["text"][:20]
)
def test_a_masked_text_holds_none_of_it(case):
    masked = personal_data.mask(case["text"], personal_data.find(case["text"]))
    assert all(found["text"] not in masked for found in case["found"])
    assert personal_data.find(masked) == []


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
     "eyJ" * 16_000, "〒1" * 25_000],
    ids=lambda text: text[:8],
)  # fmt: skip
def test_no_text_takes_more_than_linear_time(text):
    def seconds(sample: str) -> float:
        started = time.process_time()
        personal_data.find(sample)
        return time.process_time() - started

    half = min(seconds(text[: len(text) // 2]) for _ in range(2))
    # Twice the text may take twice the time; three times leaves room for noise, a square would take four.
    assert seconds(text) < 3 * half + 0.5
