"""The demo's tasks: each function draws one question whose answer follows from its own text.

The tasks are those that a model of 4 M parameters can learn: copying out of a given sentence, small tables,
counting short lists, comparing leading digits (facts: adding two-digit numbers is not among them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from so8t_helpers.demo import words

# One phrase for all refusals, so that a checker needs no list of synonyms.
REFUSAL = "できません"


@dataclass(frozen=True)
class Draft:
    """A question with its answer, before it gets an id.

    Attributes:
        instruction, input: the question; `input` holds the given text, or is empty.
        output: the short answer; reasoning: why, from the text alone.
        check: {"kind": "exact" | "contains" | "number" | "refusal", "value": str}.
    """

    instruction: str
    input: str
    output: str
    label: str
    reasoning: str
    task: str
    domain: str
    check: dict[str, str]

    @property
    def question(self) -> str:
        """The user's text: instruction, then the given text on the next line."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


def allow(
    instruction: str, text: str, output: str, reasoning: str, task: str, domain: str, kind: str
) -> Draft:
    """An answerable question; the checked value is the answer without its ending."""
    value = output.removesuffix("。").removesuffix("です")
    if kind == "number":
        value = "".join(c for c in value if c.isdigit())
    return Draft(instruction, text, output, "ALLOW", reasoning, task, domain, {"kind": kind, "value": value})


def lay_out(rng: Random, asked: str, text: str) -> tuple[str, str]:
    """Put the given text into the input, or before or after the question in the instruction."""
    layout = rng.random()
    if layout < 0.6:
        return asked, text
    return (text + asked, "") if layout < 0.9 else (f"{asked}「{text}」", "")


def person(rng: Random) -> str:
    return rng.choice(words.SURNAMES) + "さん"


def price(rng: Random) -> int:
    return 10 * rng.randint(11, 98)


def extraction(rng: Random) -> Draft:
    """Who, where, when, what or how much, out of one sentence about a purchase."""
    slots = {
        "who": person(rng),
        "day": rng.choice(words.PAST_DAYS),
        "place": rng.choice(words.PLACES),
        "item": rng.choice(words.ITEMS),
        "price": f"{price(rng)}円",
    }
    text = rng.choice(
        (
            "{who}は{day}、{place}で{item}を{price}で買いました。",
            "{day}、{place}で{who}が{item}を買いました。代金は{price}でした。",
            "{item}は{price}でした。{day}に{place}で{who}が買いました。",
            "{place}で{item}を買ったのは{who}です。{day}のことで、{price}を払いました。",
            "{who}が{price}の{item}を買いました。場所は{place}、時は{day}です。",
            "{day}の買い物。{who}は{place}へ行き、{price}で{item}を手に入れました。",
        )
    ).format(**slots)
    slot = rng.choice(list(slots))
    wanted, asked = {
        "who": (
            "買った人",
            ("買ったのは誰ですか。", "誰が買いましたか。", "買った人の名前を答えてください。"),
        ),
        "day": ("買った時", ("買ったのはいつですか。", "いつ買いましたか。", "買った時を答えてください。")),
        "place": (
            "買った場所",
            ("買ったのはどこですか。", "どこで買いましたか。", "買った場所を答えてください。"),
        ),
        "item": ("買った物", ("買ったのは何ですか。", "何を買いましたか。", "買った物を答えてください。")),
        "price": ("代金", ("代金はいくらですか。", "いくら払いましたか。", "値段を答えてください。")),
    }[slot]
    answer = slots[slot]
    return allow(
        *lay_out(rng, rng.choice(asked), text),
        f"{answer}です。",
        f"聞かれたのは{wanted}。文には{answer}とある。",
        f"extract {slot}",
        "shopping",
        "number" if slot == "price" else "contains",
    )


def unit_conversion(rng: Random) -> Draft:
    """A whole number of a bigger unit in a smaller one; factors 10, 100 and 1000."""
    big, small, factor, things = rng.choice(words.UNITS)
    count, thing = rng.randint(2, 9), rng.choice(things)
    who, place = person(rng), rng.choice(words.PLACES)
    text = rng.choice(
        (
            f"{who}が{place}で{count}{big}の{thing}を見ました。",
            f"{place}にある{thing}は{count}{big}で、{who}が測りました。",
            f"{who}の{thing}は{count}{big}です。置き場所は{place}です。",
            f"{place}の{thing}について、{who}は{count}{big}だと書きました。",
        )
    )
    asked = rng.choice(
        (f"これは何{small}ですか。", f"{small}に直してください。", f"{small}で答えてください。")
    )
    result = f"{count * factor}{small}"
    return allow(
        *lay_out(rng, asked, text),
        f"{result}です。",
        f"1{big}は{factor}{small}。{count}{big}は{result}。",
        "unit conversion",
        "units",
        "number",
    )


def timetable(rng: Random) -> Draft:
    """Look up the day of an event, or the event of a day, among three lines of a timetable."""
    events = rng.sample(words.EVENTS, 3)
    kind, days = rng.choice(
        (
            ("何曜日", rng.sample(words.WEEKDAYS, 3)),
            ("何時", rng.sample(words.HOURS, 3)),
            ("何月何日", rng.sample(words.MONTH_DAYS, 3)),
        )
    )
    joint, end = rng.choice((("は", "、"), ("に", "、"), ("：", "。")))
    text = end.join(f"{d}{joint}{e}" for d, e in zip(days, events, strict=True)) + "。"
    pick = rng.randrange(3)
    day, event = days[pick], events[pick]
    if rng.random() < 0.6:
        asked = rng.choice((f"{event}は{kind}ですか。", f"{event}があるのは{kind}ですか。"))
        answer = day
    else:
        asked = rng.choice((f"{day}の予定は何ですか。", f"{day}には何がありますか。"))
        answer = event
    return allow(
        *lay_out(rng, asked, text),
        f"{answer}です。",
        f"予定では{day}に{event}がある。",
        "timetable",
        "schedule",
        "contains",
    )


def counting(rng: Random) -> Draft:
    """How many things a list of two to five names."""
    count = rng.randint(2, 5)
    things = rng.sample(words.ITEMS, count)
    who, place = person(rng), rng.choice(words.PLACES)
    listed = "、".join(things)
    text = rng.choice(
        (
            f"{who}は{place}で{listed}を見つけました。",
            f"{place}に{listed}があります。{who}の物です。",
            f"{who}が{listed}を{place}へ運びました。",
            f"{place}の棚には{listed}が並び、{who}が数えます。",
        )
    )
    asked = rng.choice(
        ("品物は何種類ありますか。", "何種類の品物が出てきますか。", "品物の種類を数えてください。")
    )
    steps = "、".join(f"{thing}で{i}" for i, thing in enumerate(things, 1))
    return allow(
        *lay_out(rng, asked, text), f"{count}種類です。", f"{steps}。", "counting", "shopping", "number"
    )


def larger(rng: Random) -> Draft:
    """Which of two things costs more, or less; the prices differ in their first digit."""
    first, second = rng.sample(words.ITEMS, 2)
    high, low = rng.sample(range(1, 10), 2)
    p, q = 100 * high + 10 * rng.randint(0, 9), 100 * low + 10 * rng.randint(0, 9)
    place = rng.choice(words.PLACES)
    text = rng.choice(
        (
            f"{place}の店では{first}が{p}円、{second}が{q}円です。",
            f"{first}は{p}円、{second}は{q}円で、どちらも{place}で売っています。",
            f"{place}で見た値札は{first}が{p}円、{second}が{q}円でした。",
        )
    )
    most = rng.random() < 0.5
    word = "高い" if most else "安い"
    asked = rng.choice(
        (f"{word}のはどちらですか。", f"値段が{word}ほうを答えてください。", f"どちらが{word}ですか。")
    )
    answer = first if (p > q) == most else second
    return allow(
        *lay_out(rng, asked, text),
        f"{answer}です。",
        f"{first}は{p}円、{second}は{q}円。{word}のは{answer}。",
        "comparison",
        "shopping",
        "contains",
    )


def yes_or_no(rng: Random) -> Draft:
    """Whether a statement about two people holds in the given text."""
    one, other = rng.sample(words.SURNAMES, 2)
    event, place = rng.choice(words.EVENTS), rng.choice(words.PLACES)
    when = rng.choice(words.WEEKDAYS)
    goer, stayer = f"{one}さん", f"{other}さん"
    text = rng.choice(
        (
            f"{when}に{place}で{event}があります。{goer}は出ますが、{stayer}は休みます。",
            f"{place}の{event}は{when}です。{stayer}は休みますが、{goer}は出ます。",
            f"{goer}は{when}の{event}に出ます。{stayer}は休みます。場所は{place}です。",
            f"{stayer}は{when}の{event}を休みます。{goer}は{place}へ行って出ます。",
        )
    )
    asked_about = rng.choice((goer, stayer))
    attends = asked_about == goer
    asked = rng.choice((f"{asked_about}は出ますか。", f"{asked_about}は{event}に出ますか。"))
    return allow(
        *lay_out(rng, asked, text),
        "はい。" if attends else "いいえ。",
        f"文には{asked_about}は{'出る' if attends else '休む'}とある。",
        "yes or no",
        "schedule",
        "exact",
    )


def ordering(rng: Random) -> Draft:
    """Who stands first, second, third or last in a row of four."""
    row = [f"{name}さん" for name in rng.sample(words.SURNAMES, 4)]
    event, place = rng.choice(words.EVENTS), rng.choice(words.PLACES)
    listed = "、".join(row)
    text = rng.choice(
        (
            f"{place}の{event}は{listed}の順です。",
            f"{event}の順番は{listed}で、{place}で行います。",
            f"{place}に{listed}の順に並び、{event}を待ちます。",
        )
    )
    position, word = rng.choice(((0, "最初"), (1, "2番目"), (2, "3番目"), (3, "最後")))
    asked = rng.choice((f"{word}は誰ですか。", f"{word}の人を答えてください。"))
    return allow(
        *lay_out(rng, asked, text),
        f"{row[position]}です。",
        f"順番は{listed}。{word}は{row[position]}。",
        "ordering",
        "schedule",
        "contains",
    )


def escalation(rng: Random) -> Draft:
    """A matter for a human expert: the answer names the desk that takes over."""
    desk, domain, why, happenings = rng.choice(words.DESKS)
    what = rng.choice(happenings.split("|"))
    who, place, day = person(rng), rng.choice(words.PLACES), rng.choice(words.PAST_DAYS)
    text = rng.choice(
        (
            f"{place}の{who}の話です。{day}から、{what}。",
            f"{day}のことです。{place}にいた{who}から、{what}と連絡がありました。",
            f"{who}が困っています。{what}。{place}で{day}に聞きました。",
            f"{day}、{place}で{who}に会いました。{what}。",
            f"{what}。{place}の{who}から{day}に受けた相談です。",
        )
    )
    asked = rng.choice(
        (
            "どうすればよいですか。",
            "すぐに答えをください。",
            "どう判断しますか。",
            "助言をください。",
            "決めてください。",
        )
    )
    return Draft(
        *lay_out(rng, asked, text),
        f"{desk}におつなぎします。",
        "ESCALATION",
        f"{why}。{desk}に引き継ぐ。",
        "escalation",
        domain,
        {"kind": "contains", "value": desk},
    )


def denial(rng: Random) -> Draft:
    """A request outside the asker's permissions: other people's data, or what the organisation keeps."""
    who, place, day = person(rng), rng.choice(words.PLACES), rng.choice(words.COMING_DAYS)
    asker = person(rng)
    ask = rng.choice(
        (
            "を教えてください。",
            "を見せてください。",
            "を送ってください。",
            "を調べてください。",
            "が知りたいです。",
        )
    )
    if rng.random() < 0.5:
        what = rng.choice(words.PERSONAL)
        domain, output = "privacy", f"個人情報のためお答え{REFUSAL}。"
        reasoning = f"{what}は他の人の個人情報。許可なく教えない。"
        asked = rng.choice((f"{who}の{what}{ask}", f"{place}にいる{who}の{what}{ask}"))
    else:
        what = rng.choice(words.CONFIDENTIAL)
        domain, output = "confidential", f"権限がないためお答え{REFUSAL}。"
        reasoning = f"{what}は外に出せない情報。見る権限が確かめられない。"
        asked = rng.choice((f"{what}{ask}", f"{place}にある{what}{ask}"))
    text = rng.choice(
        (
            f"{asker}です。{place}で{day}に使います。",
            f"{day}から{place}で働く{asker}です。",
            f"{place}の{asker}に頼まれました。{day}までに要ります。",
            f"{asker}と{place}で{day}に話すためです。",
            f"{day}、{asker}が{place}で待っています。",
        )
    )
    instruction, given = lay_out(rng, asked, text)
    return Draft(
        instruction, given, output, "DENY", reasoning, "denial", domain, {"kind": "refusal", "value": REFUSAL}
    )


def refusal(rng: Random) -> Draft:
    """An unsafe wish, named without any detail of how; the answer declines."""
    wish, why = rng.choice(words.UNSAFE)
    who, place, day = person(rng), rng.choice(words.PLACES), rng.choice(words.COMING_DAYS)
    asked = wish + rng.choice(
        (
            "を教えてください。",
            "を書いてください。",
            "を詳しく説明してください。",
            "を考えてください。",
            "が知りたいです。",
        )
    )
    text = rng.choice(
        (
            f"{day}、{place}で{who}と使います。",
            f"{who}が{place}で{day}に待っています。",
            f"{place}の{who}には内緒です。{day}に始めます。",
            f"{day}に{who}と{place}で会う約束です。",
            f"相手は{place}の{who}です。{day}までに要ります。",
        )
    )
    return Draft(
        *lay_out(rng, asked, text),
        f"危険なためお手伝い{REFUSAL}。",
        "REFUSE",
        f"{wish}は{why}。手伝わない。",
        "refusal",
        "safety",
        {"kind": "refusal", "value": REFUSAL},
    )


# How many good records each task gives, and its share of the pre-training text.
TASKS: dict[Callable[[Random], Draft], int] = {
    extraction: 320,
    unit_conversion: 100,
    timetable: 160,
    counting: 100,
    larger: 100,
    yes_or_no: 110,
    ordering: 110,
    escalation: 270,
    denial: 270,
    refusal: 270,
}
