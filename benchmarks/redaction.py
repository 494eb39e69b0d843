"""Redaction under fire: generated model outputs, broken in every way we know, cut at random places.

Claims: no text that is not in a final part leaves; no exception; every chunking gives the one-shot result;
more than 5 MB/s on one core. `python benchmarks/redaction.py [--outputs N] [--seed S] [--processes P]`
Several processes share the outputs; the speed is bytes over the CPU seconds of all, so of one core.
"""

from __future__ import annotations

import argparse
import os
import random
import string
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from so8t_helpers.thinking.format import parse
from so8t_helpers.thinking.markers import THINK_TAGS
from so8t_helpers.thinking.redaction import REFUSAL_TEXT, StreamingFinal, final_of_separated, final_only

BATCH, PART = 2000, 50_000

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
LOOK_ALIKES = str.maketrans("thiknasfpoy", "тһіκпаѕƒрοу")
OTHER_BRACKETS = (
    ("«", "»"),
    ("≪", "≫"),
    ("《", "》"),
    ("\\u003c", "\\u003e"),
    ("%3C", "%3E"),
    ("&lt", "&gt"),
)
CONTROL_TOKENS = ("<|end|>", "<|user|>\n", "<|assistant|>\n", "<｜end▁of▁sentence｜>")

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
    return rng.choice((*ways, word[:i] + word[i + 1] + word[i] + word[i + 2 :]))


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


def all_closed(steps: Steps) -> bool:
    """Whether every block that the steps open is closed by its own name later."""
    depth: dict[str, int] = {}
    for name, change in steps:
        depth[name] = max(0, depth.get(name, 0) + change)
    return not any(depth.values())


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
    closed = all_closed([step for _, steps in blocks for step in steps])
    if rng.random() < 0.1:
        return text + bad_tag(rng, "final") + prose(rng, SECRET)
    body = final_body(rng) if closed else prose(rng, SECRET)
    end = rng.choice((tag(rng, "final", close=True), "</final>", "", bad_tag(rng, "final", close=True)))
    after = (
        "" if not end or rng.random() < 0.6 else prose(rng, SECRET) + f"<final>{prose(rng, SECRET)}</final>"
    )
    return text + "\n" + tag(rng, "final") + body + end + after


def seed(rng: Rng) -> str:
    """An output in the seed format: headings right, variant, misspelt, missing, doubled."""
    opening = "# 思考ステップ"
    if rng.random() < 0.3:
        opening = rng.choice(
            ("", "＃　思考ステップ", "## 思考ステップ：", "# " + slip(rng, "思考ステップ", "アイウ"))
        )
    text = f"{opening}\n{prose(rng, SECRET)}"
    if rng.random() < 0.15:
        text += f"<final>{prose(rng, SECRET)}</final>\n" if opening else ""
    if rng.random() < 0.15:
        return text + f"\n# {slip(rng, '最終回答', 'アイウ')}\n{prose(rng, SECRET)}"
    if rng.random() < 0.15:
        block, steps = thinking(rng, rng.choice(THINK_TAGS))
        text += block
        if not all_closed(steps):
            return f"{text}\n# 最終回答\n{prose(rng, SECRET)}"
    heading = rng.choice(("# 最終回答", "# 最終回答", "＃ 最終回答", "## 最終回答 "))
    return f"{text}\n\n{heading}\n{final_body(rng)}"


def english(rng: Rng) -> str:
    """An output in the English format: headings right, misspelt, missing, doubled, other marks in between."""
    opened = rng.random() < 0.85
    opening = (
        "# Thinking" if opened else rng.choice(("", "## Thinking", "#Thinking", "# Thinkng", "Thinking:"))
    )
    text = f"{opening}\n{prose(rng, SECRET)}"
    if rng.random() < 0.15:
        text += f"<final>{prose(rng, SECRET)}</final>\n" if opened else ""
    if rng.random() < 0.15:
        wrong = rng.choice(
            ("## Final answer", "# Final Answer", "#Final answer", "# Final answer:", "# Answer")
        )
        return text + f"\n{wrong}\n{prose(rng, SECRET)}"
    if rng.random() < 0.1:
        return f"{text}\n# 思考ステップ\n{prose(rng, SECRET)}\n# Final answer\n{prose(rng, SECRET)}"
    if not opened:
        return f"{text}\n# Final answer\n{prose(rng, SECRET)}"
    ends = ("# Thinking", "## thinking:", "#Final Answer:", "# Thought process", "# Thikning steps -", "**")
    body = prose(rng, PUBLIC)
    if (end := rng.choice(ends)) != "**":
        body += f"\n{end}\n{prose(rng, SECRET)}"
    return f"{text}\n\n# Final answer\n{body if rng.random() < 0.5 else final_body(rng)}"


def in_passing(rng: Rng) -> str:
    """A thinking that was never opened and speaks of the final tag; it may be closed and an answer follow."""
    text = prose(rng, SECRET) + rng.choice(("次に", "「", "**")) + tag(rng, "final") + prose(rng, SECRET)
    if rng.random() < 0.3:
        return text
    name = rng.choice(THINK_TAGS)
    return text + tag(rng, name, close=True) + "\n" + tag(rng, "final") + final_body(rng)


def soup(rng: Rng) -> str:
    """Marks and private text in any order; no final part can begin, since the first block never ends."""
    marks = [f"<{s}{n}>" for n in (*THINK_TAGS, "think") for s in ("", "/")]
    marks += ["<", "</", ">", "<fi", "nal>", "# ", "最終回答", "思考ス", "\n", *CONTROL_TOKENS]
    body = "".join(rng.choice(marks) + rng.choice((SECRET, "")) for _ in range(rng.randint(1, 30)))
    return "<thinking>" + body + f"\n# 最終回答\n{SECRET}<final>{SECRET}</final>"


def write_output(rng: Rng) -> str:
    """One model output."""
    ways = (quadruple, seed, english, soup, in_passing)
    return rng.choices(ways, weights=(5, 4, 4, 1, 1))[0](rng)


def cut(rng: Rng, text: str) -> list[str]:
    """Cut a text at random places: anything from one piece to single characters."""
    if rng.random() < 0.02:
        return list(text)
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randint(0, 20)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def streamed(chunks: list[str]) -> str:
    stream = StreamingFinal()
    return "".join(map(stream.feed, chunks)) + stream.close()


def fault(text: str, one_shot: str, in_pieces: str) -> str | None:
    """Say what is wrong with the redaction of one output, None where nothing is."""
    if in_pieces != one_shot:
        return "chunking"
    if one_shot == REFUSAL_TEXT:
        return None
    return "leak" if SECRET in one_shot or one_shot not in text else None


def run(outputs: int, first_seed: int) -> Counter[str]:
    """Redact `outputs` generated texts; raise AssertionError with the seed of the first bad one."""
    count: Counter[str] = Counter()
    for start in range(first_seed, first_seed + outputs, BATCH):
        seeds = range(start, min(start + BATCH, first_seed + outputs))
        texts = [write_output(Rng(s)) for s in seeds]
        chunked = [cut(Rng(-s), text) for s, text in zip(seeds, texts, strict=True)]
        begun = time.process_time()
        one_shot = [final_only(text) for text in texts]
        middle = time.process_time()
        in_pieces = [streamed(chunks) for chunks in chunked]
        count["seconds"] += time.process_time() - middle
        count["one_shot_seconds"] += middle - begun
        for s, text, whole, pieces in zip(seeds, texts, one_shot, in_pieces, strict=True):
            bad = fault(text, whole, pieces)
            assert bad is None, f"seed {s}: {bad}: {text!r} gave {whole!r} at once, {pieces!r} in pieces"
            parsed = parse(text)
            assert (parsed.final or REFUSAL_TEXT) == whole, f"seed {s}: parse and redaction differ: {text!r}"
            held = final_of_separated(text[: len(text) // 2], text[len(text) // 2 :], "quadruple")
            assert SECRET not in held or held in text, (
                f"seed {s}: engine's own parting: {text!r} gave {held!r}"
            )
            count["released"] += whole != REFUSAL_TEXT
        count["outputs"] += len(texts)
        count["bytes"] += sum(len(text.encode()) for text in texts)
        count["chunks"] += sum(map(len, chunked))
    return count


def main() -> None:
    from claims import claim, write_claims

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    starts = range(options.seed, options.seed + options.outputs, PART)
    sizes = [min(PART, options.seed + options.outputs - start) for start in starts]
    with ProcessPoolExecutor(options.processes) as pool:
        count = sum(pool.map(run, sizes, starts), Counter())
    speed, one_shot = (count["bytes"] / count[key] / 1e6 for key in ("seconds", "one_shot_seconds"))
    figures = {
        **{key: round(value, 1) for key, value in count.items()},
        "processes": options.processes,
        "one_shot_mb_per_s": round(one_shot, 2),
        "mean_chunk_bytes": round(count["bytes"] / count["chunks"], 1),
    }
    claims = [
        # `run` stops at the first output that breaks one of the first three.
        claim("leaks", 0, 0, "outputs"),
        claim("crashes", 0, 0, "outputs"),
        claim("chunkings that differ from one shot", 0, 0, "outputs"),
        claim("outputs redacted, at least", count["outputs"], 1_000_000, "outputs", at_least=True),
        claim("speed in random chunks, at least", round(speed, 2), 5, "MB/s on one core", at_least=True),
    ]
    raise SystemExit(0 if write_claims("redaction", figures, claims) else 1)


if __name__ == "__main__":
    main()
