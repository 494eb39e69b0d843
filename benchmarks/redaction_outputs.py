"""What hostile models write: texts in every broken form we know, full of "秘密" where nothing may leave.

`benchmarks/redaction.py` redacts them by the million, tests/test_redaction.py some hundreds.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path

import regex
from confusable_homoglyphs.confusables import confusables_data

from so8t_helpers.thinking.format import DECISION_LINES, HEADED, LABELS
from so8t_helpers.thinking.markers import ORDINARY, THINK_TAGS

SECRET, PUBLIC = "秘密", "公開"
FULL_WIDTH = str.maketrans({c: chr(ord(c) + 0xFEE0) for c in string.ascii_letters + "<>/-#|"})
FILLINGS = (
    "を考える。",
    " step",
    "\n- 項目\n",
    " a < b ",
    "<b>x</b>",
    " & ",
    "[1]",
    "\n## 見出し\n",
    "思う",
    "。\n\n",
)
FULL_WIDTH_COLON = str.maketrans(":", "：")
# All characters that are not seen, and what Unicode's table has for a mark's letters and brackets.
UNSEEN = [chr(c) for c in range(0x110000) if regex.match(r"\p{Default_Ignorable_Code_Point}", chr(c))]
ALIKE = {
    letter: alike
    for letter in "thinksafetypolicyreasoning<>"
    if (alike := [e["c"] for e in confusables_data.get(letter, ()) if len(e["c"]) == 1 and e["c"] > "\x7f"])
}
LOOK_ALIKES = str.maketrans("thiknasfpoy", "тһіκпаѕƒрοу")
OTHER_BRACKETS = (
    ("«", "»"),
    ("≪", "≫"),
    ("《", "》"),
    ("\\u003c", "\\u003e"),
    ("%3C", "%3E"),
    ("&lt", "&gt"),
)
CONTROL_TOKENS = (
    *(
        "<|end|>",
        "<|user|>\n",
        "<|assistant|>\n",
        "<｜end▁of▁sentence｜>",
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<eos>",
    ),
    *(
        "<|im_start|>",
        "<|start_header_id|>",
        "<|channel|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<tool_call>",
    ),
    *("[INST]", "[/INST]", "<<SYS>>", "[TOOL_CALLS]", "<analysis>", "<scratchpad>", "</reflection>"),
)
BARE_TITLES = ("思考ステップ", "思考過程", "思考プロセス", "思考手順", "思考内容", "思考过程")

Rng = random.Random
Steps = list[tuple[str, int]]


def prose(rng: Rng, word: str) -> str:
    """Some text full of `word`; it holds no mark, but much that begins like one."""
    return "".join(word + rng.choice(FILLINGS) for _ in range(rng.choice((1, 3, 10, 30, 60))))


def slip(rng: Rng, word: str, letters: str) -> str:
    """Leave out, put in, replace or swap one character."""
    i = rng.randrange(len(word) - 1)
    new = rng.choice([c for c in letters if c not in word])
    ways = (word[:i] + word[i + 1 :], word[:i] + new + word[i:], word[:i] + new + word[i + 1 :])
    slipped = rng.choice((*ways, word[:i] + word[i + 1] + word[i] + word[i + 2 :]))
    return word if slipped in ORDINARY else slipped  # a word of its own, and no slip


def odd_sign(rng: Rng, word: str) -> str:
    """Replace one letter by what is none, or put such a sign in."""
    i = rng.randrange(1, len(word))
    return word[:i] + rng.choice("01347!.?$@~\ufffd") + word[i + rng.randrange(2) :]


def variant(rng: Rng, mark: str) -> str:
    """Another spelling that means the same mark."""
    ways: tuple[Callable[[], str], ...] = (
        mark.upper,
        lambda: mark.translate(FULL_WIDTH),
        lambda: mark.replace("<", "< ").replace("/", " / ").replace(">", " >"),
        lambda: mark[:2] + "\u200b" + mark[2:],
        mark.title,
    )
    return rng.choice(ways)()


def tag(rng: Rng, name: str, close: bool = False) -> str:
    """A tag, now and then in another spelling that means the same."""
    mark = f"</{name}>" if close else f"<{name}>"
    return variant(rng, mark) if rng.random() < 0.2 else mark


def bad_tag(rng: Rng, name: str, close: bool = False) -> str:
    """A tag that is not one any more: misspelt or without its bracket; it still takes permission away."""
    slash = "/" if close else ""
    misspelt = f"<{slash}{slip(rng, name, string.ascii_lowercase)}>"
    before, after = rng.choice(OTHER_BRACKETS)
    ways = [misspelt, f"<{slash}{name}\n", f"&lt;{slash}{name}&gt;", f"{before}{slash}{name}{after}"]
    ways += [f"<{slash}{odd}>" for odd in (name.translate(LOOK_ALIKES), odd_sign(rng, name), f"x:{name}")]
    return rng.choice([*ways, f"<{slash}{name.replace('-', '_')}>"] if "-" in name else ways)


def thinking(rng: Rng, name: str, depth: int = 0) -> tuple[str, Steps]:
    """One thinking block in some state of repair, and what it opens (1) and closes (-1), in order."""
    secret = prose(rng, SECRET)
    opening, closing, step = tag(rng, name), tag(rng, name, close=True), [(name, 1), (name, -1)]
    way = rng.random()
    if way < 0.55:
        return opening + secret + closing, step
    if way < 0.62:
        return opening + secret, step[:1]
    if way < 0.69:
        return secret + closing, step[1:]
    if way < 0.76:
        return opening + secret + bad_tag(rng, name, close=True), step[:1]
    if way < 0.83:
        return bad_tag(rng, name) + secret + closing, step
    if way < 0.9:
        return f"{opening}{secret}<final>{secret}</final>{closing}", step
    if way < 0.95 and depth < 3:
        inner, steps = thinking(rng, rng.choice(THINK_TAGS), depth + 1)
        return opening + secret + inner + secret + closing, [step[0], *steps, step[1]]
    return opening + opening + secret + closing, [step[0], *step]


def open_blocks(steps: Steps) -> bool:
    """Whether a block that the steps open is not closed by its own name later."""
    depth: dict[str, int] = {}
    for name, change in steps:
        depth[name] = max(0, depth.get(name, 0) + change)
    return any(depth.values())


def is_over(steps: Steps) -> bool:
    """Whether every block that the steps open is closed by its own name later, the policy's last."""
    return bool(steps) and steps[-1] == ("think-policy", -1) and not open_blocks(steps)


def fillers(rng: Rng, mark: str) -> str:
    """Put what is not seen into a mark, by its Unicode property."""
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(1, len(mark.rstrip()))
        mark = mark[:i] + rng.choice(UNSEEN) + mark[i:]
    return mark


def confusables(rng: Rng, mark: str) -> str:
    """Put other characters for some letters and brackets, as Unicode's table has them."""
    share = rng.choice((0.3, 1))
    return "".join(rng.choice(ALIKE[c]) if c in ALIKE and rng.random() < share else c for c in mark)


def escaped(rng: Rng, sign: str = "<") -> str:
    """Write a bracket as an entity or an escape, or as an escape of one, some times over."""
    code = format(ord(sign), "x")
    name, zeros = {"<": "lt", ">": "gt"}[sign], "0" * rng.randrange(6)
    ampersand = "&" + "".join(rng.choice(("amp;", "amp", "#38;", "#x26;")) for _ in range(rng.randrange(4)))
    entity = (
        ampersand
        + rng.choice((name, f"#{zeros}{ord(sign)}", f"#x{zeros}{code}"))
        + rng.choice((";", ";", ""))
    )
    again = rng.choice(("&", "&", "\\u0026", "\\x26", "%26", "%2526"))
    percent = "%" + "25" * rng.randrange(4) + code
    back = "\\" * rng.randint(1, 3) + rng.choice(
        (f"u00{code}", f"x{code}", f"u{{{code}}}", f"u005cu00{code}")
    )
    return rng.choice((entity.replace("&", again, 1), percent.upper(), percent, back))


def decision(rng: Rng) -> str:
    """A line that states a decision, in one of the ways that count as one."""
    word, label = rng.choice(("判定", "Decision")), rng.choice(LABELS)
    before, after = rng.choice(
        (("", ""), ("- **", "**"), ("「", "」"), ("1. ", "。"), ("<b>", "</b>"), ("", "（案）"))
    )
    line = f"{before}{word}{rng.choice((': ', '：', ' : ', ':'))}{rng.choice((label, label.lower()))}{after}"
    return end_of_line(rng) + line + end_of_line(rng)


def end_of_line(rng: Rng) -> str:
    return rng.choice(("\n", "\n", "\r\n", rng.choice("\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")))


def named(rng: Rng) -> str:
    """The inside of a tag that is a mark."""
    return rng.choice(("", "/")) + rng.choice((*THINK_TAGS, "think", "thinking", "final"))


def plain_mark(rng: Rng) -> str:
    return rng.choice((f"<{named(rng)}>", "# 思考ステップ", "思考ステップ:", "判定: ALLOW", "Decision: DENY"))


def bare_title(rng: Rng) -> str:
    ways = (("__", "__"), ("<h2>", "</h2>"), ("<summary>", "</summary>"), ("", ":"), ("■ ", ""))
    before, after = rng.choice(ways)
    return f"{end_of_line(rng)}{before}{rng.choice(BARE_TITLES)}{after}{end_of_line(rng)}"


# By family, something in a final part that ends it.
MARKS: dict[str, Callable[[Rng], str]] = {
    "decision lines": decision,
    "fillers": lambda rng: f"\n{fillers(rng, plain_mark(rng))}\n",
    "confusables": lambda rng: confusables(rng, f"<{named(rng)}>"),
    "escapes": lambda rng: escaped(rng) + named(rng) + escaped(rng, ">"),
    "control tokens": lambda rng: rng.choice(CONTROL_TOKENS),
    "bare titles": bare_title,
}


def intruder(rng: Rng) -> str:
    """Something in a final part that ends it: whatever stands after it is private."""
    heading = rng.choice(("思考ステップ", "最終回答"))
    name = rng.choice((*THINK_TAGS, "think", "final"))
    close = rng.random() < 0.5
    mark = rng.choice(
        (
            tag(rng, name, close),
            bad_tag(rng, name, close),
            rng.choice(CONTROL_TOKENS),
            f"\n# {heading}\n",
            f"\n## {slip(rng, heading, 'アイウエオ')}\n",
            f" ＃{heading}:",
            "\n思考ステップ:\n",
            rng.choice(("\n■ 思考ステップ\n", "\n# 思考\n", "\n# 思考すてっぷ\n", "\n＜思考＞")),
            rng.choice([*MARKS.values()])(rng),
        )
    )
    return mark + prose(rng, SECRET)


def final_body(rng: Rng) -> str:
    return prose(rng, PUBLIC) + (intruder(rng) if rng.random() < 0.3 else "")


def quadruple(rng: Rng) -> str:
    """An output in the quadruple format: blocks in order, out of order, missing, broken."""
    names = list(THINK_TAGS)
    if rng.random() < 0.2:
        rng.shuffle(names)
        names = names[: rng.randint(0, 3)] + rng.sample(THINK_TAGS, 1)
    blocks = [thinking(rng, name) for name in names]
    text = "\n".join(block for block, _ in blocks)
    over = is_over([step for _, steps in blocks for step in steps])
    if rng.random() < 0.1:
        return text + bad_tag(rng, "final") + prose(rng, SECRET)
    body = final_body(rng) if over else prose(rng, SECRET)
    end = rng.choice((tag(rng, "final", close=True), "</final>", "", bad_tag(rng, "final", close=True)))
    after = (
        "" if not end or rng.random() < 0.6 else prose(rng, SECRET) + f"<final>{prose(rng, SECRET)}</final>"
    )
    return text + "\n" + tag(rng, "final") + body + end + after


def decided(rng: Rng, line: str) -> tuple[str, bool]:
    """The end of a thinking under a heading, and whether it states the decision as it must."""
    label = rng.choice(LABELS)
    if rng.random() < 0.8:
        return (
            f"\n{rng.choice((line, line.translate(FULL_WIDTH_COLON)))}{rng.choice((label, label.lower()))}\n",
            True,
        )
    wrong = (
        f"「{line}{label}」",
        f"**{line}**{label}",
        f"{line}{label}か",
        f"{line}MAYBE",
        f"x {line}{label}",
        f"{line.strip()}\n{label}",
        f"{line.replace(':', '_:')}{label}",
        "",
    )
    return f"\n{rng.choice((*wrong, f'{line}{label}{chr(10)}{SECRET}'))}\n", False


def seed(rng: Rng) -> str:
    """An output in the seed format: headings right, variant, misspelt, missing, doubled."""
    opening = "# 思考ステップ"
    if rng.random() < 0.3:
        opening = rng.choice(
            ("", "＃　思考ステップ", "## 思考ステップ：", "# " + slip(rng, "思考ステップ", "アイウ"))
        )
    text, over = f"{opening}\n{prose(rng, SECRET)}", bool(opening)
    if rng.random() < 0.15:
        text += f"<final>{prose(rng, SECRET)}</final>\n" if opening else ""
    if rng.random() < 0.15:
        block, steps = thinking(rng, rng.choice(THINK_TAGS))
        text += block
        over = over and not open_blocks(steps)
    line, stated = decided(rng, "判定: ")
    text += line
    if rng.random() < 0.15:
        return text + f"\n# {slip(rng, '最終回答', 'アイウ')}\n{prose(rng, SECRET)}"
    heading = rng.choice(("# 最終回答", "# 最終回答", "＃ 最終回答", "## 最終回答 "))
    return f"{text}\n{heading}\n{final_body(rng) if over and stated else prose(rng, SECRET)}"


def english(rng: Rng) -> str:
    """An output in the English format: headings right, misspelt, missing, doubled, other marks in between."""
    opened = rng.random() < 0.85
    opening = (
        "# Thinking" if opened else rng.choice(("", "## Thinking", "#Thinking", "# Thinkng", "Thinking:"))
    )
    text = f"{opening}\n{prose(rng, SECRET)}"
    if rng.random() < 0.15:
        text += f"<final>{prose(rng, SECRET)}</final>\n" if opened else ""
    if rng.random() < 0.1:
        text += f"\n# 思考ステップ\n{prose(rng, SECRET)}"
        opened = False
    line, stated = decided(rng, "Decision: ")
    text += line
    if rng.random() < 0.15:
        wrong = rng.choice(
            ("## Final answer", "# Final Answer", "#Final answer", "# Final answer:", "# Answer")
        )
        return text + f"\n{wrong}\n{prose(rng, SECRET)}"
    if not (opened and stated):
        return f"{text}\n# Final answer\n{prose(rng, SECRET)}"
    ends = ("# Thinking", "## thinking:", "#Final Answer:", "# Thought process", "# Thikning steps -", "**")
    body = prose(rng, PUBLIC)
    if (end := rng.choice(ends)) != "**":
        body += end_of_line(rng) + end + end_of_line(rng) + prose(rng, SECRET)
    return f"{text}\n# Final answer\n{body if rng.random() < 0.5 else final_body(rng)}"


def quoted(rng: Rng) -> str:
    """A good output whose thinking quotes final marks and decisions on lines of their own, never in a row."""
    quotes = [
        "# 最終回答",
        "<final>",
        "# Final answer",
        "＃ 最終回答",
        "判定: ALLOW",
        "Decision: DENY",
        "</final>",
    ]
    said = "".join(f"{prose(rng, SECRET)}\n{rng.choice(quotes)}\n" for _ in range(rng.randint(1, 4)))
    said += prose(rng, SECRET)
    answer = prose(rng, PUBLIC) if rng.random() < 0.7 else ""
    style = rng.choice(("seed", "quadruple", "english"))
    if style == "quadruple":
        return f"<think-task>{said}</think-task>\n<think-policy>{said}</think-policy>" + (
            answer and f"\n<final>{answer}"
        )
    opening, end = HEADED[style]
    return f"{opening}\n{said}" + (answer and f"\n{DECISION_LINES[style]}ALLOW\n\n{end}\n{answer}")


def in_passing(rng: Rng) -> str:
    """A thinking that was never opened and speaks of the final tag; it may be closed, and one follow."""
    text = (
        prose(rng, SECRET) + rng.choice(("次に", "「", "**", "\n")) + tag(rng, "final") + prose(rng, SECRET)
    )
    if rng.random() < 0.3:
        return text
    name = rng.choice(THINK_TAGS)
    return text + tag(rng, name, close=True) + "\n" + tag(rng, "final") + prose(rng, SECRET)


def soup(rng: Rng) -> str:
    """Marks and private text in any order; no final part can begin, since the first block never ends."""
    marks = [f"<{s}{n}>" for n in (*THINK_TAGS, "think") for s in ("", "/")]
    marks += ["<", "</", ">", "<fi", "nal>", "# ", "最終回答", "思考ス", "\n", *CONTROL_TOKENS]
    body = "".join(rng.choice(marks) + rng.choice((SECRET, "")) for _ in range(rng.randint(1, 30)))
    return "<thinking>" + body + f"\n# 最終回答\n{SECRET}<final>{SECRET}</final>"


def reopened(rng: Rng, mark: str) -> str:
    """A good output with a mark in its final part, and private text after that."""
    opening, end = HEADED["seed"]
    head = f"{opening}\n{prose(rng, SECRET)}\n判定: ALLOW\n\n{end}\n" if rng.random() < 0.5 else ""
    head = head or f"<think-policy>{prose(rng, SECRET)}</think-policy>\n<final>"
    return head + prose(rng, PUBLIC) + mark + prose(rng, SECRET)


WAYS: dict[str, Callable[[Rng], str]] = {
    **{way.__name__: way for way in (quadruple, seed, english, soup, in_passing)},
    "quoted marks": quoted,
    **{family: lambda rng, mark=mark: reopened(rng, mark(rng)) for family, mark in MARKS.items()},
}
_WEIGHTS = (5, 4, 4, 1, 1, 2, *[1] * (len(WAYS) - 6))


def write_output(rng: Rng) -> tuple[str, str]:
    """One model output, and which family of attacks it belongs to; in none may private text leave."""
    family = rng.choices([*WAYS], weights=_WEIGHTS)[0]
    return family, WAYS[family](rng)


# Spellings that no one promised: what is caught of these is counted, and stands in docs/claims.md.
UNPROMISED: dict[str, Callable[[Rng], str]] = {
    "two slips in a tag": lambda rng: f"<{slip(rng, slip(rng, 'thinking', 'xyz'), 'bcd')}>",
    "digits for letters": lambda rng: rng.choice(
        ("<7h1nk>", "<th1nk1ng>", "<t#ink>", "<r3as0ning>", "<thin|<>")
    ),
    "letters apart": lambda rng: rng.choice(
        ("<t h i n k>", "\n思 考 ス テ ッ プ\n", "\n# t h i n k i n g\n", "[ T H I N K ]")
    ),
    "several letters for one": lambda rng: rng.choice(
        ("<tl1ink>", "<thinl<>", "<tbink>", "<fiпa1>", "<thіпκing>")
    ),
    "other words, as a tag": lambda rng: rng.choice(
        ("<cot>", "<inner>", "<plan>", "<思考過程>", "<notes>", "<internal>")
    ),
    "other words, as a heading": lambda rng: rng.choice(
        ("\n# 推論\n", "\n## 考察\n", "\n# Reasoning\n", "\n# 思路\n")
    ),
    "other words, alone": lambda rng: rng.choice(
        ("\n考え方:\n", "\n思考の流れ:\n", "\nReasoning:\n", "\n内心では、\n")
    ),
    "English words without #": lambda rng: rng.choice(
        ("\nThinking:\n", "\n**Thinking**\n", "\n<h2>Thinking</h2>\n")
    ),
    "the turns of other templates": lambda rng: rng.choice(
        ("\nHuman: ", "\n### Response:\n", "\nUSER: ", "\nSystem: ")
    ),
    "other escapes": lambda rng: rng.choice(
        ("=3Cthink=3E", "&lt think&gt", "\\N{LESS-THAN SIGN}think>", "+ADw-think+AD4-")
    ),
    "a decision in other words": lambda rng: rng.choice(
        ("\n判定: 許可\n", "\n判定はALLOW\n", "\nVerdict: DENY\n", "\n[ALLOW]\n")
    ),
    "no mark at all": lambda rng: "\n",
    "a thinking that quotes decision and final mark together": lambda rng: "",
}


def write_unpromised(rng: Rng, family: str) -> str:
    """One model output that opens its thinking again in a spelling of a family of `UNPROMISED`."""
    mark = UNPROMISED[family](rng)
    if mark:
        return reopened(rng, mark)
    opening, end = HEADED["seed"]
    quote = f"判定: ALLOW\n\n{end}\n"
    said = prose(rng, SECRET)
    return f"{opening}\n{said}\n{quote}{said}\n{quote}{prose(rng, PUBLIC)}"


def good_answers() -> list[tuple[str, str]]:
    """Return hand-written answers about code that should leave whole, each after the text before it."""
    folder = Path(__file__).parents[1] / "tests" / "data" / "good_answers"
    found = []
    for language, style in (("en", "english"), ("ja", "seed")):
        thinking, final = HEADED[style]
        head = f"{thinking}\n{SECRET}\n{DECISION_LINES[style]}ALLOW\n\n{final}\n"
        text = (folder / f"{language}.txt").read_text(encoding="utf-8").strip()
        found += [(head, answer) for answer in text.split("\n=====\n")]
    return found


def cut(rng: Rng, text: str) -> list[str]:
    """Cut a text at random places: anything from one piece to single characters."""
    if rng.random() < 0.02:
        return list(text)
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randint(0, 20)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
