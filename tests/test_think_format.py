import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from so8t_helpers.phi3.template import of_tokenizer
from so8t_helpers.thinking.format import (
    LABELS,
    ThinkText,
    build,
    contains_markers,
    decision_of,
    parse,
    rejoin,
    spans,
    with_decision,
)

PHI35 = Path(os.environ.get("SO8T_PHI35") or Path(__file__).resolve().parents[2] / "shared" / "phi35")

SEED = "# 思考ステップ\n9×8 を計算する。\n判定: ALLOW\n\n# 最終回答\n72 です。"
QUADRUPLE = (
    "<think-task>計算。</think-task>\n<think-safety>害はない。</think-safety>\n"
    "<think-policy>規則に反しない。\n判定: ALLOW</think-policy>\n<final>72 です。</final>"
)

ENGLISH = "# Thinking\nCompute 9×8.\nDecision: ALLOW\n\n# Final answer\nIt is 72."

words = st.text(alphabet="あ漢 a1。\n#<>/&思:", min_size=1, max_size=30).filter(
    lambda t: bool(t.strip()) and not contains_markers(t.strip())
)


def seed_texts() -> st.SearchStrategy[ThinkText]:
    return st.builds(lambda t, f: ThinkText("seed", f.strip(), with_decision(t, "DENY")), words, words)


english_words = st.text(alphabet="Tthinkg Fialswer#: a\n。", min_size=1, max_size=30).filter(
    lambda t: bool(t.strip()) and not contains_markers(t.strip(), "english")
)


def english_texts() -> st.SearchStrategy[ThinkText]:
    return st.builds(
        lambda t, f: ThinkText("english", f.strip(), with_decision(t, "DENY", "english")),
        english_words,
        english_words,
    )


def quadruple_texts() -> st.SearchStrategy[ThinkText]:
    return st.builds(
        lambda t, s, p, f: ThinkText("quadruple", f.strip(), "", t.strip(), s.strip(), p.strip()),
        words, words, words, words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    if not PHI35.is_dir():
        pytest.skip(f"no Phi-3.5 tokenizer at {PHI35} (set SO8T_PHI35)")
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(PHI35)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "/think 9×8は?"}],
        [{"role": "system", "content": "規則。"}, {"role": "user", "content": " 空白 \n"}],
        [{"role": "system", "content": ""}, {"role": "user", "content": "問"}],
        [{"role": "user", "content": "問"}, {"role": "assistant", "content": SEED}],
        [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": QUADRUPLE},
            {"role": "user", "content": "次"},
        ],
    ],
)
def test_render_equals_the_real_template(tokenizer, messages, prompt):
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert of_tokenizer(tokenizer).render(messages, add_generation_prompt=prompt) == expected


def test_build_gives_the_documented_texts():
    thinking = with_decision("9×8 を計算する。", "ALLOW")
    assert build(ThinkText("seed", "72 です。", thinking=thinking)) == SEED
    policy = with_decision("規則に反しない。", "ALLOW")
    four = ThinkText("quadruple", "72 です。", task="計算。", safety="害はない。", policy=policy)
    assert build(four) == QUADRUPLE

    thinking = with_decision("Compute 9×8.", "ALLOW", "english")
    assert build(ThinkText("english", "It is 72.", thinking=thinking)) == ENGLISH


@pytest.mark.parametrize("text", [SEED, QUADRUPLE, ENGLISH])
def test_parse_of_a_good_text(text):
    parsed = parse(text)
    assert parsed.well_formed
    assert parsed.final == ("It is 72." if text == ENGLISH else "72 です。")
    assert parsed.decision == "ALLOW"
    assert "72" not in parsed.thinking


@given(st.one_of(seed_texts(), quadruple_texts(), english_texts()))
def test_build_parse_build_is_the_identity(parts):
    text = build(parts)
    parsed = parse(text)
    assert parsed.well_formed
    assert parsed.final == parts.final
    thinking = "" if parts.style == "quadruple" else parsed.thinking
    again = ThinkText(parsed.style, parsed.final, thinking, parsed.task, parsed.safety, parsed.policy)
    assert again == parts
    assert build(again) == text


@pytest.mark.parametrize(
    "text",
    [
        "72 です。",
        SEED + "\n# 最終回答\nもう一度",
        SEED.replace("# 最終回答", "# 最終解答"),
        SEED.replace("# 思考ステップ\n", ""),
        SEED.replace("判定: ALLOW\n", ""),
        "はじめに\n" + SEED,
        QUADRUPLE + "おまけ",
        QUADRUPLE.replace("</final>", ""),
        QUADRUPLE.replace("think-safety", "think-policy"),
        QUADRUPLE.replace("<think-task>計算。</think-task>\n", ""),
        QUADRUPLE.replace("<final>", "<FINAL>"),
        "# 思考ステップ\n\n\n# 最終回答\n答え",
        ENGLISH + "\n# Thinking\nmore",
        ENGLISH.replace("# Thinking", "## Thinking"),
        ENGLISH.replace("# Final answer", "# Final Answer"),
        "First\n" + ENGLISH,
    ],
)
def test_anything_else_is_not_well_formed(text):
    assert not parse(text).well_formed


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (ThinkText("seed", "答え", thinking="# 最終回答\n偽"), "thinking.*mark"),
        (ThinkText("seed", "<think-task>", thinking="考え"), "final.*mark"),
        (ThinkText("seed", " ", thinking="考え"), "final.*empty"),
        (ThinkText("english", "72", thinking="so\n# Final answer\n71"), "thinking.*mark"),
        (ThinkText("english", "## Thinking:\nno", thinking="so"), "final.*mark"),
        (ThinkText("english", "72", thinking="so", policy="x"), "policy.*other format"),
        (ThinkText("seed", "答え", thinking="考え", task="x"), "task.*other format"),
        (ThinkText("quadruple", "答え", task="a", safety="b"), "policy.*empty"),
        (ThinkText("seed", "答え", thinking="考え"), "seed.*must end with its decision"),
        (ThinkText("seed", "答え", thinking="判定: ALLOW\n考え"), "must end with its decision"),
        (ThinkText("seed", "答え", thinking="考え\n**判定**: ALLOW"), "must end with its decision"),
        (ThinkText("english", "72", thinking="so\n判定: ALLOW"), "must end with .*Decision: LABEL"),
        (ThinkText("seed", "答え\n判定: ALLOW", thinking="判定: ALLOW"), "final.*mark"),
        (ThinkText("triple", "答え"), "triple.*seed, quadruple"),
    ],
)
def test_build_refuses(part, match):
    with pytest.raises(ValueError, match=match):
        build(part)


@pytest.mark.parametrize(
    ("thinking", "label"),
    [
        *((f"考え\n判定: {label}", label) for label in LABELS),
        ("判定：allow", "ALLOW"),
        ("判定：ＤＥＮＹ。", "DENY"),
        ("- **判定**: REFUSE", "REFUSE"),
        ("判定: ALLOW\n見直す。\n判定: DENY", "DENY"),
        ("判定: ALLOW か DENY", None),
        ("判定: MAYBE", None),
        ("判定: ALLOW\n判定: MAYBE", None),
        ("ALLOW", None),
        ("", None),
    ],
)
def test_decision(thinking, label):
    assert decision_of(thinking) == label


@pytest.mark.parametrize(
    ("thinking", "style", "label"),
    [
        ("So.\nDecision: ALLOW", "english", "ALLOW"),
        ("- **decision**: deny.", "english", "DENY"),
        ("Decision: ALLOW", "seed", None),
        ("判定: ALLOW", "english", None),
        ("判定: ALLOW\nDecision: DENY", "seed", "ALLOW"),
        ("判定: ALLOW\nDecision: DENY", None, "DENY"),
        ("The decision: ALLOW it", "english", None),
    ],
)
def test_each_format_has_its_own_line_of_the_decision(thinking, style, label):
    assert decision_of(thinking, style) == label


NESTED = "<think-task>判定: ALLOW\n</think-task>"


@pytest.mark.parametrize(
    "text",
    [
        f"# 思考ステップ\n考え\n{NESTED}\n判定: DENY\n\n# 最終回答\n答え",
        "# Thinking\nso\ndECISIon: DENY\n\n# Final answer\nno",
        f"<think-policy>判定: DENY</think-policy>{NESTED}<think-policy>良し</think-policy><final>答え",
        f"<think-policy>判定: ALLOW</think-policy>{NESTED}<think-policy>判定: DENY</think-policy><final>答え",
        f"<think-policy>判定: DENY{NESTED}</think-policy><final>答え",
        "<think-policy>判定: ALLOW</think-policy># 思考ステップ\n判定: DENY\n\n# 最終回答\n答え",
    ],
)
def test_the_decision_is_the_one_that_the_answer_was_opened_with(text):
    parsed = parse(text)
    assert parsed.final
    assert parsed.decision == "DENY"


_AROUND = st.text(" \t\r\n_*:。、-/[](x", max_size=3)


@given(st.lists(_AROUND, min_size=6, max_size=6), st.sampled_from(LABELS), st.booleans())
@example(["", "_", "", "", "", ""], "DENY", False)
@example(["", "", "\n", "", "", ""], "DENY", False)
@example(["", "", "_", "", "", ""], "DENY", False)
def test_no_answer_under_a_heading_is_without_the_label_that_opened_it(around, label, english):
    a, b, c, d, e, f = around
    opening, word, final = ("# Thinking", "Decision", "# Final answer") if english else (
        "# 思考ステップ", "判定", "# 最終回答",
    )  # fmt: skip
    parsed = parse(f"{opening}\n{a}\n{f}{word}{b}:{c}{label}{d}\n{e}{final}\n答え")
    assert parsed.final is None or parsed.decision == label


@pytest.mark.parametrize(("text", "style"), [(SEED, "seed"), (QUADRUPLE, "quadruple"), (ENGLISH, "english")])
def test_spans_lead_to_the_label_and_the_final_part(text, style):
    found = spans(text)
    assert found.style == style
    assert text[slice(*found.decision)].upper() == "ALLOW"
    assert parse(text[: found.final]).final is None and text[found.final :].count("72") == 1
    assert spans("72 です。").style is None


def test_with_decision_refuses_an_unknown_label():
    with pytest.raises(ValueError, match=r"MAYBE.*ALLOW"):
        with_decision("考え", "MAYBE")


@pytest.mark.parametrize("text", [SEED, QUADRUPLE, ENGLISH])
def test_rejoin_undoes_what_ollama_separates(text):
    style = parse(text).style
    headings = {"seed": ("# 思考ステップ", "# 最終回答"), "english": ("# Thinking", "# Final answer")}
    first, last = headings.get(style, ("<think-task>", "<final>"))
    thinking, _, content = text.partition(first)[2].partition(last)
    content = content.removesuffix("</final>")
    assert rejoin(thinking.strip(), content.strip(), style) == text
