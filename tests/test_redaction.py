import difflib
import importlib.util
import random
import re
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from so8t_helpers.thinking.folding import fold
from so8t_helpers.thinking.format import ThinkText, build, contains_markers, parse
from so8t_helpers.thinking.markers import WINDOW
from so8t_helpers.thinking.redaction import (
    REFUSAL_TEXT,
    StreamingFinal,
    final_of_separated,
    final_only,
    longest_shared,
)
from so8t_helpers.thinking.scanner import Scanner

SPEC = importlib.util.spec_from_file_location(
    "redaction_outputs", Path(__file__).parents[1] / "benchmarks" / "redaction_outputs.py"
)
outputs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(outputs)

FRAGMENTS = [
    *("<", ">", "</", "/", "＜", "＞", "／", "&lt;", "[", "]", "◁", "▷", "<|", "|>", "end", "《", "》"),
    *(
        "think",
        "-task",
        "-safety",
        "-policy",
        "final",
        "FINAL",
        "ｆｉｎａｌ",
        "ﬁnal",
        "reasoning",
        "\u200b",
        " ",
    ),
    *("<think-task>", "</think-task>", "<think-policy>", "</think-policy>", "<final>", "</final>", "<fnal>"),
    *(
        "≪",
        "≫",
        "≮",
        "\\u003c",
        "%3C",
        "&",
        "amp;",
        "lt",
        "&#0060",
        "т",
        "1",
        "!",
        "\x00",
        "\u3164",
        "\ufffd",
        "ns:",
    ),
    *(
        "#",
        "# ",
        "＃",
        "■",
        "1. ",
        "＜思考＞",
        "<思考",
        "思考すてっぷ",
        "思考ステップ",
        "思考ｽﾃｯﾌﾟ",
        "思",
        "最終回答",
        "最終解答",
        "\n",
        "\r\n",
        ":",
        "**",
    ),
    *("# 思考ステップ\n", "# 最終回答\n", "秘密", "公開", "a < b", "x" * (WINDOW - 3), " " * (WINDOW + 2)),
]
ENGLISH_FRAGMENTS = [
    *(
        "# Thinking\n",
        "# Final answer\n",
        "# Thinking",
        "# Final answer",
        "#",
        "# ",
        "## ",
        "Thinking",
        "Final",
    ),
    *(
        " answer",
        "thought",
        "process",
        "steps",
        "about",
        ":",
        " - ",
        ".",
        "1",
        "T",
        "inking",
        "\n",
        " ",
        "**",
    ),
]
# A thinking that is over: a final part may begin after it.
POLICY = "<think-policy>秘密</think-policy>\n"
THOUGHT, THOUGHT_IN_ENGLISH = "# 思考ステップ\n秘密\n判定: ALLOW\n", "# Thinking\n秘密\nDecision: ALLOW\n"
FRAGMENTS += [
    POLICY,
    THOUGHT,
    "判定: ALLOW\n",
    "判定",
    "定: DENY",
    "<s>",
    "</s>",
    "[INST]",
    "\ufff4",
    "%253c",
]
FRAGMENTS += [
    "\r",
    "\u2028",
    "Price",
    "thing",
    ",",
    "&#38;",
    "<analysis>",
    "思考過程",
    "<h2>",
    "__",
    "𝈶",
    "Ꭲhink",
]
ENGLISH_FRAGMENTS += ["Decision: ALLOW\n", "Decision", ": DENY"]


def whole(text):
    """Put the thinking before a text that begins with a final mark."""
    return {"<final>": POLICY, "# 最終回答\n": THOUGHT}.get(text[:7], "") + text


soups = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=25).map("".join)


def english_soups() -> st.SearchStrategy[str]:
    pieces = st.sampled_from([*ENGLISH_FRAGMENTS, *ENGLISH_FRAGMENTS, *FRAGMENTS])
    return st.lists(pieces, max_size=25).map("".join).map("# Thinking\n".__add__)


def streamed(chunks):
    stream = StreamingFinal()
    return "".join(map(stream.feed, chunks)) + stream.close()


def cut(data, text):
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


# --- the properties -------------------------------------------------------------------------------------


@given(soups, st.data())
@settings(max_examples=150)
def test_every_chunking_gives_the_one_shot_result(text, data):
    whole = final_only(text)
    assert streamed(cut(data, text)) == whole
    assert streamed(text) == whole  # one character at a time


@given(english_soups(), st.data())
@settings(max_examples=300)
def test_every_chunking_of_an_english_text_gives_the_one_shot_result(text, data):
    whole = final_only(text)
    assert streamed(cut(data, text)) == whole
    assert streamed(text) == whole
    assert whole == (parse(text).final or REFUSAL_TEXT)
    assert whole == REFUSAL_TEXT or (whole in text and not contains_markers(whole, "english"))


@pytest.mark.parametrize("end", ["# Thinking# Thinking\n", "# Thinking <final>", "# Thinking [think]"])
def test_no_english_heading_is_left_where_a_mark_behind_it_ends_the_answer(end):
    text = f"{THOUGHT_IN_ENGLISH}\n# Final answer\nyes\n{end}"
    assert final_only(text) == streamed(text) == "yes"


@given(english_soups(), soups)
@settings(max_examples=100)
def test_english_headings_are_none_in_a_japanese_text(english, after):
    """A text whose first mark is Japanese is read as if nobody had thought of English ones."""
    headings = [("open", "english"), ("final", "english")]
    for opening in ("# 思考ステップ\n", "<think-task>"):
        plain = english.replace("#", "◆")  # no heading at all
        apart = "\n。\n"  # no mark comes about where two texts meet
        assert [m for m in marks_of(opening + english + apart + after) if m in headings] == []
        if not contains_markers(english):
            marks = [marks_of(opening + text + apart + after) for text in (english, plain)]
            assert marks[0] == marks[1]


def marks_of(text):
    """The marks that the scanner takes, in order: kind and name."""
    scanner, found = Scanner(), []
    apply = scanner._apply
    scanner._apply = lambda mark, start: (found.append(mark[:2]), apply(mark, start))[1]
    scanner.feed(text)
    scanner.close()
    return found


@given(soups)
@settings(max_examples=150)
@example(POLICY + "<final>公開<think-task>秘密")
def test_output_is_unmarked_text_of_the_input_or_the_refusal(text):
    released = final_only(text)
    assert released == REFUSAL_TEXT or (released in text and released == released.strip() != "")
    assert released == (parse(text).final or REFUSAL_TEXT)
    assert not contains_markers(released)


def test_every_sign_that_is_folded_into_the_first_of_a_mark_is_looked_at():
    follow = {"<": "think-task>", "«": "think-task»", "[": "think]", "#": " 思考ステップ\n", "&": "lt;think>"}
    follow |= {"思": "考ステップ\n", "%": "3cthink>", "判": "定: DENY"}
    unseen = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) not in {"Cn", "Co", "Cs"}:
            rest = follow.get(fold(chr(code)))
            if rest and final_only(f"{POLICY}<final>公開\n{chr(code)}{rest}秘密") != "公開":
                unseen.append(chr(code))
    assert unseen == []


@given(soups, soups)
@settings(max_examples=100)
def test_nothing_after_a_final_part_counts(private, after):
    text = f"{POLICY}<final>公開</final>{private}"
    assert final_only(text) == final_only(text + after) == "公開"


@given(st.integers(1, 2**40))
@settings(max_examples=150)
def test_grammar_of_broken_outputs_leaks_nothing(seed):
    family, text = outputs.write_output(random.Random(seed))
    released = final_only(text)
    assert streamed(outputs.cut(random.Random(-seed), text)) == released
    assert released == REFUSAL_TEXT or (released in text and outputs.SECRET not in released), family


@given(soups, soups, st.sampled_from(["seed", "quadruple", "english"]), st.data())
@settings(max_examples=100)
@example("判定: ALLOW\n# 最終回答\n", "", "seed", None)
@example("判定: ALLOW\n# 最終回答\n", "公開", "seed", None)
@example(POLICY + "<final>", "公開", "quadruple", None)
@example("Decision: ALLOW\n# Final answer\n", "公開", "english", None)
def test_engines_own_thinking_field_never_leaves(thinking, content, style, data):
    secret = thinking.replace("公開", "秘密") + "秘密"
    released = final_of_separated(secret, content, style)
    assert released == REFUSAL_TEXT or (released in content and not contains_markers(released, style))
    stream = StreamingFinal(style)
    pieces = [stream.feed("", part) for part in (cut(data, secret) if data else secret)]
    pieces += [stream.feed(part) for part in (cut(data, content) if data else content)]
    assert "".join(pieces) == ""
    assert stream.close() == released


def test_thinking_that_comes_late_stops_the_release():
    stream = StreamingFinal()
    released = stream.feed(POLICY + "<final>公開。")
    assert released == "公開。"
    assert stream.feed("もっと", thinking="秘密") == ""
    assert stream.feed("秘密") + stream.close() == ""
    mixed = StreamingFinal()
    assert mixed.feed("秘密") + mixed.feed("秘密", "秘密") + mixed.feed("公開") == ""
    assert mixed.close() == REFUSAL_TEXT


def test_no_more_than_the_window_is_held_back():
    stream = StreamingFinal()
    stream.feed(POLICY + "<final>")
    text = "短い文 <" + " " * 20 + "thi" + "答え" * 100
    released = "".join(stream.feed(c) for c in text)
    assert len(text) - len(released) < WINDOW
    assert released + stream.close() == text


@pytest.mark.parametrize(
    "unit", ["<", "< ", "# ", "<think-tas", "<final>&", "思考ステップ", "</think-task>", "# 最終回答\n", " "]
)
def test_time_grows_with_the_length_alone(unit):
    def seconds(length):
        text = POLICY + "<final>" + unit * (length // len(unit))
        begun = time.process_time()
        final_only(text)
        streamed([text[i : i + 7] for i in range(0, len(text), 7)])
        return time.process_time() - begun

    seconds(1000)
    # Quadratic work would take 64 times as long; linear takes 8, the rest is for a noisy machine.
    assert seconds(48_000) < 30 * max(seconds(6_000), 0.002)


# --- both formats as they should be ----------------------------------------------------------------------

SEED = build(ThinkText("seed", "答えは 72 です。", thinking="秘密\n判定: ALLOW"))
QUADRUPLE = build(
    ThinkText("quadruple", "答えは 72 です。", task="秘密", safety="秘密", policy="判定: ALLOW")
)


ENGLISH = build(ThinkText("english", "答えは 72 です。", thinking="秘密\nDecision: ALLOW"))


@pytest.mark.parametrize("text", [SEED, QUADRUPLE, ENGLISH])
def test_good_outputs_give_their_answer(text):
    assert final_only(text) == "答えは 72 です。"


@pytest.mark.parametrize(
    "answer",
    [
        "a < b かつ c > d、x<y, <b>太字</b>, <div class='t'>",
        "## 見出し\n- 項目\n# 最終更新日は昨日",
        "考えるステップは 3 つ。思考ステップという言葉は文中なら残る。",
        "[link](x) & [1] <thead><tr><td>表</td></tr></thead> <title>題</title>",
        "if (i < final_value) return;",
        "$\\xi \\le \\underline{x}$、R&amp;D、100% 3割、/usr/bin、«引用»、1≤2、<3",
        "思考実験とは。\n# 思考力を鍛える\n- 思考の流れ\n「思考ステップ」を書く。\n**思考**: 考えること",
        "Vec<Thing>、<thin>、List<Finale>、<strong>太字</strong>、decide、判断",
        "次を見ます。\n判定: 合格\n思考過程を書く。",
        "C:\\users\\taro、\\u0041、50%、a<5、x <y、[note]、{final}、(think)",
        "Array<Thunk<T>>、cast<Thing*>(p)、Consumer<Thing, U>、<finalName>、List<FinalState>",
        "< final\n---\n> new",
        "改行\n\n\n終わり",
    ],
)
def test_ordinary_answers_pass_unchanged(answer):
    assert final_only(f"{POLICY}<final>{answer}</final>") == answer
    assert final_only(f"{THOUGHT}\n# 最終回答\n{answer}") == answer


@pytest.mark.parametrize(
    "answer",
    [
        "# Thinking about trees\nThey grow.",
        "## Thinking, Fast and Slow\nA book.\n## Final thoughts\nRead it.\n# Final answers and scores",
        "The final answer is 72. Thinking: it is a word.\nFinal answer: 72",
        "# Step 1: Thinking\n# Introduction\n## The thinking man\n# Things\n# Finland\n#thinkpad #final",
        "#define T 1\n# Fine\n### Nothing\n#1 issue\nC# and F#",
        "I think # Thinking is a heading, and ## Final answers are many.",
    ],
)
def test_ordinary_english_answers_pass_unchanged(answer):
    assert final_only(f"{THOUGHT_IN_ENGLISH}\n# Final answer\n{answer}") == answer


def test_good_answers_about_code_are_seldom_cut_short():
    """Written by hand, half of them English. What is still cut: `<s>`, `<Think>`, `## 最終回答率`."""
    good = outputs.good_answers()
    cut = [answer for head, answer in good if final_only(head + answer) != answer]
    assert len(good) == 176
    assert len(cut) <= 8
    assert all(re.search(r"<s>|<Think>|## 最終回答率", answer) for answer in cut)


@pytest.mark.parametrize(
    "mark",
    [
        *("<final_answer>", "<FinalAnswer>", "<final-respons>", "<finalThoughts>", "<finalx>"),
        *("<thin?>", "<thin*>", "<thin\ufffd>", "<think,", "< think\n>", "<\nthink>", "<think\n公開>"),
    ],
)
def test_what_is_near_a_mark_or_what_is_said_of_one_still_ends_an_answer(mark):
    assert final_only(f"{POLICY}<final>公開{mark}秘密") == "公開"


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_line_may_end_in_every_way_that_a_page_knows(end):
    for mark in ("思考ステップ", "思考過程:", "判定: ALLOW", "Decision: DENY"):
        text = f"{POLICY}<final>公開{end}{mark}{end}秘密"
        assert final_only(text) == streamed(text) == "公開", mark
    text = f"{THOUGHT_IN_ENGLISH}\n# Final answer\n公開{end}# Thinking{end}秘密"
    assert final_only(text) == streamed(text) == "公開"
    assert final_only(f"# 思考ステップ{end}秘密{end}判定: ALLOW{end}# 最終回答\n公開") == "公開"


# --- what models do wrong ---------------------------------------------------------------------------------

REFUSED = None
TABLE = {
    "no mark at all": ("秘密", REFUSED),
    "empty": ("", REFUSED),
    "empty final part": ("<think-policy>秘密</think-policy><final> \n</final>", REFUSED),
    "unclosed thinking": ("<think-policy>秘密<final>秘密</final>", REFUSED),
    "one of two unclosed": (
        "<think-policy>秘密<think-safety>秘密</think-safety><final>秘密</final>",
        REFUSED,
    ),
    "unclosed final": ("<think-policy>秘密</think-policy><final>公開", "公開"),
    "nested": (
        "<think-policy>秘密<think-policy>秘密</think-policy>秘密</think-policy><final>公開</final>",
        "公開",
    ),
    "nested, tail open": (
        "<think-policy>秘密<think-policy>秘密</think-policy>秘密<final>秘密</final>",
        REFUSED,
    ),
    "reordered": (
        "<think-task>秘密</think-task><think-policy>秘密</think-policy><final>公開</final>",
        "公開",
    ),
    "crossed": ("<think-safety>秘密<think-policy>秘密</think-safety>秘密</think-policy><final>公開", "公開"),
    "doubled final": ("<final>公開</final><final>秘密</final>", "公開"),
    "final inside thinking": (
        "<think-policy>秘密<final>秘密</final>秘密</think-policy><final>公開</final>",
        "公開",
    ),
    "thinking inside final": ("<final>公開<think-policy>秘密</think-policy>秘密</final>", "公開"),
    "orphan close": ("秘密</think-policy><final>秘密</final>", REFUSED),
    "orphan close in final": ("<final>公開</think-task>秘密</final>", "公開"),
    "closed by another name": ("<think-policy>秘密</think-safety><final>秘密</final>", REFUSED),
    "misspelt open": ("<think-policy_>秘密</think-policy><final>公開</final>", "公開"),
    "misspelt close": ("<think-policy>秘密</thnik-task><final>秘密</final>", REFUSED),
    "misspelt final": ("<think-policy>秘密</think-policy><finl>秘密</finl>", REFUSED),
    "misspelt open in final": ("<final>公開<thikn-task>秘密</final>", "公開"),
    "misspelt close of final": ("<final>公開</fnal>秘密", "公開"),
    "no bracket at the end": ("<final>公開<think-policy\n秘密", "公開"),
    "upper case": ("<THINK-POLICY>秘密</THINK-POLICY><FINAL>公開</FINAL>秘密", "公開"),
    "full width": (
        "＜ｔｈｉｎｋ－ｐｏｌｉｃｙ＞秘密＜／ｔｈｉｎｋ－ｐｏｌｉｃｙ＞＜ｆｉｎａｌ＞公開＜／ｆｉｎａｌ＞秘密",
        "公開",
    ),
    "white space inside": ("< think-policy >秘密</ think-policy\n>< final >公開< /final >秘密", "公開"),
    "invisible signs inside": ("<final>公開<thi\u200bnk-\u00adtask>秘密", "公開"),
    "mathematical letters": ("<final>公開<𝐭𝐡𝐢𝐧𝐤-task>秘密", "公開"),
    "ligature": ("<final>公開</ﬁnal>秘密", "公開"),
    "HTML entities": ("<final>公開&lt;think-policy&gt;秘密", "公開"),
    "entities open nothing": ("&lt;final&gt;秘密", REFUSED),
    "book brackets open nothing": ("《final》秘密", REFUSED),
    "book brackets close": ("<final>公開《/final》秘密", "公開"),
    "attributes": ("<think-policy id='1'>秘密</think-policy><final lang='ja'>秘密", REFUSED),
    "underscore": ("<final>公開<think_task>秘密", "公開"),
    "a digit for a letter": ("<final>公開<th1nk-task>秘密", "公開"),
    "a sign for a letter": ("<final>公開<th!nk-task>秘密", "公開"),
    "a sign between letters": ("<final>公開<thi.nk>秘密", "公開"),
    "half a character inside": ("<final>公開<thi\ufffdnk-task>秘密", "公開"),
    "a control character first": ("<final>公開<\x00think-policy>秘密", "公開"),
    "a filler letter inside": ("<final>公開<th\u3164ink-task>秘密", "公開"),
    "letters that look alike": ("<final>公開<тһіnк-tаsк>秘密", "公開"),
    "look-alikes open nothing": ("<think-policy>秘密</think-policy><fіnal>秘密", REFUSED),
    "look-alikes close nothing": ("<think-policy>秘密</thіnk-task><final>秘密", REFUSED),
    "a name space": ("<final>公開<ns:thinking>秘密", "公開"),
    "a comment": ("<final>公開<!-- think-policy -->秘密", "公開"),
    "quotation marks as brackets": ("<final>公開«think-policy»秘密", "公開"),
    "signs of comparison as brackets": ("<final>公開≪think-policy≫秘密", "公開"),
    "an entity without its end": ("<final>公開&ltthink-policy&gt秘密", "公開"),
    "an entity with zeros": ("<final>公開&#0060;think-policy&#62;秘密", "公開"),
    "an entity, escaped again": ("<final>公開&amp;lt;think-policy&amp;gt;秘密", "公開"),
    "an escape of JSON": ("<final>公開\\u003cthink-policy\\u003e秘密", "公開"),
    "an escape of addresses": ("<final>公開%3Cthink-policy%3E秘密", "公開"),
    "another slash": ("<final>公開<⧸final>秘密", "公開"),
    "a control token with spaces": ("<final>公開<| end |>秘密", "公開"),
    "a control token without its end": ("<final>公開<|user\n秘密", "公開"),
    # A thinking that was never opened and speaks of the final tag.
    "final in passing": ("まず<final>に書く事。秘密</think-policy><final>秘密</final>", REFUSED),
    "final in passing, nothing closed": ("秘密。次に<final>を書く。秘密", REFUSED),
    "final in passing, on a line of its own": ("秘密\n<final>秘密</final>", REFUSED),
    "final in passing, between blocks": (
        "<think-policy>秘密</think-policy>次に<final>を書く。秘密<think-safety>秘密</think-safety>\n<final>秘密",
        REFUSED,
    ),
    "close and final in passing": (
        "<think-policy>終わりは</think-policy>で、次に<final>を書く。秘密</think-policy><final>秘密",
        REFUSED,
    ),
    "words before final": ("<think-policy>秘密</think-policy>\nでは答えます。\n<final>秘密", REFUSED),
    "another block closed last": (
        "<think-policy>秘密</think-policy><think-task>秘密</think-task><final>秘密",
        REFUSED,
    ),
    "control token in final": ("<final>公開<|end|>\n<|user|>\n秘密", "公開"),
    "control token before": ("<think-policy>秘密</think-policy><|end|><final>秘密</final>", REFUSED),
    "seed: no final": ("# 思考ステップ\n秘密", REFUSED),
    "no thinking": ("\n<final>秘密", REFUSED),
    "seed: no thinking": ("\n# 最終回答\n秘密", REFUSED),
    "seed: final before thinking": ("# 最終回答\n公開\n\n# 思考ステップ\n秘密", "公開"),
    "seed: two finals": ("# 思考ステップ\n秘密\n判定: ALLOW\n# 最終回答\n公開\n# 最終回答\n秘密", "公開"),
    "seed: heading inside a line": ("# 思考ステップ\n次に # 最終回答\nを書く。秘密", REFUSED),
    "seed: text on the heading's line": ("# 思考ステップ\n秘密\n判定: ALLOW\n# 最終回答は秘密", REFUSED),
    "seed: misspelt final": ("# 思考ステップ\n秘密\n# 最終解答\n秘密", REFUSED),
    "seed: misspelt thinking in final": ("# 最終回答\n公開\n# 思老ステップ\n秘密", "公開"),
    "seed: full width": (
        "＃ 思考ｽﾃｯﾌﾟ\n秘密\n判定：ＤＥＮＹ\n＃　最終回答\n公開\n＃思考ステップ\n秘密",
        "公開",
    ),
    "seed: bold heading in final": ("# 最終回答\n公開\n**思考ステップ**\n秘密", "公開\n**"),
    "seed: thinking never opened": ("秘密\n判定: ALLOW\n# 最終回答\n秘密", REFUSED),
    "seed: half a heading in final": ("# 最終回答\n公開\n# 思考：\n秘密", "公開"),
    "seed: hiragana heading in final": ("# 最終回答\n公開\n# 思考すてっぷ\n秘密", "公開"),
    "seed: Chinese heading in final": ("# 最終回答\n公開\n# 思考步骤\n秘密", "公開"),
    "seed: bullet before heading": ("# 最終回答\n公開\n1. 思考ステップ\n秘密", "公開\n1."),
    "seed: heading with a number": ("# 最終回答\n公開\n思考ステップ１: 秘密", "公開"),
    "seed: heading with a dash": ("# 最終回答\n公開\n思考ステップ - 秘密", "公開"),
    "seed: heading in brackets": ("# 最終回答\n公開\n＜思考＞秘密", "公開\n＜"),
    "seed: tag opened in thinking": (
        "# 思考ステップ\n<think-policy>秘密\n判定: ALLOW\n# 最終回答\n秘密",
        REFUSED,
    ),
    "seed: final tag in thinking": (
        "# 思考ステップ\n<final>秘密</final>\n判定: DENY\n# 最終回答\n公開",
        "公開",
    ),
    "seed: final heading in thinking": (
        "# 思考ステップ\n秘密\n# 最終回答\n秘密\n判定: DENY\n# 最終回答\n公開",
        "公開",
    ),
    "seed: no decision": ("# 思考ステップ\n秘密\n\n# 最終回答\n秘密", REFUSED),
    "seed: words after the decision": ("# 思考ステップ\n判定: DENY\n秘密\n# 最終回答\n秘密", REFUSED),
    "seed: signs around the decision": ("# 思考ステップ\n「判定: DENY」\n# 最終回答\n秘密", REFUSED),
    "seed: another format's decision": ("# 思考ステップ\n秘密\nDecision: DENY\n# 最終回答\n秘密", REFUSED),
    "seed: full-width decision": ("# 思考ステップ\n秘密\n　判定： ＤＥＮＹ。 \n\n# 最終回答\n公開", "公開"),
    **{
        f"{line!r} in final": (f"<final>公開\n{line}秘密", "公開")
        for line in (
            *(
                "判定: ALLOW\n",
                "判定：deny",
                "判\u200b定: REFUSE。",
                "Decision: ALLOW\n",
                "判定: ALLOW（許可）",
            ),
            *(
                "思考過程: ",
                "思考プロセス\n",
                "思\U000e0fff考ステップ\n",
                "𝈶think>",
                "<ᎢhinK>",
                "<th\ue000ink>",
            ),
            *(
                "&amp;amp;lt;think>",
                "&#38;#60;think>",
                "%253Cthink",
                "\\u0026lt;think",
                "%26lt%3Bthink",
                "\\074think",
            ),
            *("<s>", "</s>", "<unk>", "<start_of_turn>", "[INST]", "<analysis>", "</scratchpad>"),
        )
    },
    **{
        f"{lead}{mark} in final": (f"<final>公開\n{lead}{mark}秘密", f"公開\n{lead}")
        for lead, mark in (
            *(("__", "思考ステップ__\n"), ("<h2>", "思考ステップ</h2>"), ("- **", "判定**: DENY\n")),
            *(
                ("<details><summary>", "思考過程</summary>"),
                ("<b>", "判定: ALLOW</b>"),
                ("\\", "\\u003cthink"),
            ),
        )
    },
    "seed heading in a tag": (
        "<think-policy>秘密\n判定: ALLOW\n# 最終回答\n秘密</think-policy><final>公開",
        "公開",
    ),
    "English": ("# Thinking\n秘密\nDecision: ALLOW\n# Final answer\n公開", "公開"),
    "English: Windows line ends": (
        "# Thinking\r\n秘密\r\nDecision: ALLOW\r\n# Final answer\r\n公開\r\n",
        "公開",
    ),
    "English: words before": ("秘密\n # Thinking \n秘密\nDecision: ALLOW\n# Final answer \n公開", "公開"),
    "English: no thinking": ("# Final answer\n秘密", REFUSED),
    "English: no decision": ("# Thinking\n秘密\n# Final answer\n秘密", REFUSED),
    "English: decision in a sentence": ("# Thinking\nThe decision: ALLOW\n# Final answer\n秘密", REFUSED),
    "English: no final": ("# Thinking\n秘密", REFUSED),
    "English: thinking written otherwise": (
        "# thinking\n秘密\nDecision: ALLOW\n# Final answer\n秘密",
        REFUSED,
    ),
    "English: final written otherwise": ("# Thinking\n秘密\n# Final Answer\n秘密", REFUSED),
    "English: smaller final": ("# Thinking\n秘密\n## Final answer\n秘密", REFUSED),
    "English: text on the heading's line": (
        "# Thinking\n秘密\nDecision: ALLOW\n# Final answer: 秘密",
        REFUSED,
    ),
    "English: heading inside a line": ("# Thinking\n秘密 # Final answer\n秘密", REFUSED),
    "English: two finals": (
        "# Thinking\n秘密\nDecision: ALLOW\n# Final answer\n公開\n# Final answer\n秘密",
        "公開",
    ),
    "English: thinking again": (
        "# Thinking\n秘密\n# Thinking\n秘密\nDecision: ALLOW\n# Final answer\n公開",
        "公開",
    ),
    "English: final tag in thinking": (
        "# Thinking\n<final>秘密</final>\nDecision: ALLOW\n# Final answer\n公開",
        "公開",
    ),
    "English: tag opened in thinking": (
        "# Thinking\n<think>秘密\nDecision: ALLOW\n# Final answer\n秘密",
        REFUSED,
    ),
    "English: Japanese inside": (
        "# Thinking\n秘密\n# 思考ステップ\n秘密\nDecision: ALLOW\n# Final answer\n秘密",
        REFUSED,
    ),
    "English: Japanese final": ("# Thinking\n秘密\n判定: ALLOW\n# 最終回答\n秘密", REFUSED),
    "English after tags": ("<think>秘密</think>\n# Final answer\n秘密", REFUSED),
    **{
        f"English: {heading!r} in final": (
            f"# Thinking\n秘密\nDecision: ALLOW\n# Final answer\n公開\n{heading}秘密",
            "公開",
        )
        for heading in (
            *("# Thinking\n", "## thinking\n", "#Final Answer: ", "# Thinking steps\n", "# Thikning\n"),
            *("＃ Thinking\n", "# **Thinking**\n", "# Ｔｈｉｎｋｉｎｇ\n", "# Тhinking\n", "# 1. Thinking\n"),
            *("# Thinking - ", "# Thought process\n", "# Final answers\n", "# 思考ステップ\n", "<think>"),
        )
    },
    "Windows line ends": ("# 思考ステップ\r\n秘密\r\n判定: ALLOW\r\n\r\n# 最終回答\r\n公開\r\n", "公開"),
}


@pytest.mark.parametrize(("text", "expected"), TABLE.values(), ids=TABLE)
def test_broken_outputs(text, expected):
    text, expected = whole(text), expected or REFUSAL_TEXT
    assert final_only(text) == expected
    assert streamed(text) == expected


# --- the cases of the serving stacks' own parser tests, in our words ---------------------------------------
# They know one pair of tags, `<think>` and `</think>`, and send whatever stands outside of it. We send only
# what stands inside a final part: where they answer with content (last column), we differ on purpose and
# refuse, since "outside of thinking" is what a model also writes when it forgets a tag.

STACKS = {
    "vLLM R1: close only": ("R</think>A", REFUSED, "A"),
    "vLLM R1: thinking only": ("R</think>", REFUSED, None),
    "vLLM R1: no tag": ("R", REFUSED, None),
    "vLLM Qwen3: no tag, streamed": ("R", REFUSED, "R"),
    "vLLM R1: lines": ("R\nR</think>A\nA", REFUSED, "A\nA"),
    "vLLM R1: close first": ("</think>A", REFUSED, "A"),
    "vLLM R1: both tags": ("<think>R</think>A", REFUSED, "A"),
    "vLLM R1: open only": ("<think>R", REFUSED, None),
    "vLLM R1: line first": ("\n<think>R</think>\nA", REFUSED, "\nA"),
    "Ollama: text before the tag": ("  R <think>R</think> A", REFUSED, "  R <think>R</think> A"),
    "Ollama: second block": ("<think>R</think><think>R</think>A", REFUSED, "<think>R</think>A"),
    "Ollama: false close": ("<think>R</thing>R</think>A", REFUSED, "A"),
    "SGLang: split tag": ("R <th" + "ink>R</think>A", REFUSED, "R <think>R</think>A"),
    "SGLang: nested": ("<think>R<think>R</think>R</think>A", REFUSED, "R</think>A"),
    "SGLang Kimi": ("◁think▷R◁/think▷A", REFUSED, "A"),
    "Mistral": ("[THINK]R[/THINK]A", REFUSED, "A"),
    "gpt-oss": ("<|channel|>analysis<|message|>R<|end|><|channel|>final<|message|>A", REFUSED, "A"),
    # The same with a final part of ours: the thinking stays in, the answer goes out.
    "both tags, final": (f"<think>R</think>{POLICY}<final>A</final>", "A", None),
    "open only, final": (f"<think>R{POLICY}<final>R</final>", REFUSED, None),
    "false close, final": (f"<think>R</thing>R</think>{POLICY}<final>A</final>", "A", None),
    "nested, final": (f"<think>R<think>R</think>R</think>{POLICY}<final>A</final>", "A", None),
    # Their tags alone hold no decision.
    "both tags, no decision": ("<think>R</think><final>R</final>", REFUSED, None),
    "both tags, heading": ("<think>R</think>\n# 最終回答\nR", REFUSED, None),
    "Kimi in final": ("<final>A◁think▷R", "A", None),
    "Mistral in final": ("<final>A[THINK]R[/THINK]", "A", None),
    "second block after final": ("<final>A</final><think>R</think>R", "A", None),
}


@pytest.mark.parametrize(("text", "ours", "theirs"), STACKS.values(), ids=STACKS)
def test_cases_of_the_known_serving_stacks(text, ours, theirs):
    text = whole(text)
    assert final_only(text) == streamed(text) == (ours or REFUSAL_TEXT)
    assert ours != theirs or ours is REFUSED


# --- engines that part thinking from content, and answers without thinking --------------------------------

INNER = "秘密</think-task>\n<think-safety>秘密</think-safety>\n<think-policy>秘密</think-policy>"


@pytest.mark.parametrize(
    ("thinking", "content", "style", "expected"),
    [
        ("秘密\n判定: ALLOW", "公開", "seed", "公開"),
        ("秘密", "秘密", "seed", REFUSED),
        (INNER, "公開", "quadruple", "公開"),
        (INNER, "公開</final>", "quadruple", "公開"),
        ("秘密", "公開", "quadruple", REFUSED),  # its first block was never closed
        (INNER.removesuffix("</think-policy>"), "秘密", "quadruple", REFUSED),
        (
            "秘密",
            "秘密\n判定: ALLOW\n# 最終回答\n公開",
            "seed",
            REFUSED,
        ),  # parted at a heading inside the thinking
        (INNER, "秘密</think-policy><final>公開", "quadruple", REFUSED),
        ("秘密\n判定: ALLOW", "公開<think-task>秘密", "seed", REFUSED),
        ("秘密\n判定: ALLOW", "", "seed", REFUSED),
        ("秘密\nDecision: ALLOW", "公開", "english", "公開"),
        ("秘密\nDecision: ALLOW", "公開\n# Thinking\n秘密", "english", REFUSED),
        ("秘密\nDecision: ALLOW\n# Final answer\n秘密", "公開", "english", REFUSED),
        ("", ENGLISH, "english", "答えは 72 です。"),
        ("秘密<think-task>", "秘密", "seed", REFUSED),
        ("", "秘密", "seed", REFUSED),  # no thinking: the content is raw text
        ("", SEED, "seed", "答えは 72 です。"),
        (" ", QUADRUPLE, "seed", "答えは 72 です。"),
    ],
)
def test_engine_separated(thinking, content, style, expected):
    assert final_of_separated(thinking, content, style) == (expected or REFUSAL_TEXT)


# --- repetition word for word -----------------------------------------------------------------------------

letters = st.text("ab思", max_size=40)


@given(letters, letters)
def test_the_longest_shared_text_is_difflibs(thinking, final):
    matcher = difflib.SequenceMatcher(None, thinking, final, autojunk=False)
    assert longest_shared(thinking, final) == matcher.find_longest_match().size


@given(letters, letters, st.integers(1, 6), st.data())
def test_no_repetition_over_the_limit_leaves_whatever_the_chunking(thinking, final, most, data):
    thinking, final = f"x{thinking}", f"公{final.strip()}"
    text = f"# 思考ステップ\n{thinking}\n判定: ALLOW\n\n# 最終回答\n{final}"
    stream = StreamingFinal(most_shared=most)
    released = "".join(map(stream.feed, cut(data, text))) + stream.close()
    assert final.startswith(released)
    assert longest_shared(thinking, released) <= most
    if longest_shared(thinking, final) <= most:
        assert released == final and not stream.ended
    else:
        assert stream.ended and len(released) < len(final)
    parted = StreamingFinal(most_shared=most)
    parted.feed("", f"{thinking}\n判定: ALLOW")
    parted.feed(final)
    assert parted.close() == (final if longest_shared(thinking, final) <= most else REFUSAL_TEXT)
