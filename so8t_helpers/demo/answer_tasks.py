"""Questions that may be answered: each function draws a text and the questions that it answers.

They are what a model of 4 M parameters can learn: copying out of a given sentence, small tables, counting
short lists, comparing leading digits. Adding two-digit numbers, for one, is not.
"""

from __future__ import annotations

from random import Random

from so8t_helpers.demo import words
from so8t_helpers.demo.scenes import Draft, Scene, person


def extraction(rng: Random) -> list[Draft]:
    """Who, where, when, what or how much, out of one sentence about a purchase."""
    slots = {
        "who": person(rng),
        "day": rng.choice(words.PAST_DAYS),
        "place": rng.choice(words.PLACES),
        "item": rng.choice(words.ITEMS),
        "price": f"{rng.randint(1, 9)}00円",
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
    scene = Scene(rng, "shopping", text)
    for slot, wanted, asked in (
        ("who", "買った人", ("買ったのは誰ですか。", "誰が買いましたか。")),
        ("day", "買った時", ("買ったのはいつですか。", "いつ買いましたか。")),
        ("place", "買った場所", ("買ったのはどこですか。", "どこで買いましたか。")),
        ("item", "買った物", ("買ったのは何ですか。", "何を買いましたか。")),
        ("price", "代金", ("代金はいくらですか。", "いくら払いましたか。")),
    ):
        reasoning = f"聞かれたのは{wanted}。文には{slots[slot]}とある。"
        kind = "number" if slot == "price" else "contains"
        scene.ask(rng.choice(asked), slots[slot], reasoning, f"extract {slot}", kind)
    return scene.drafts


def unit_conversion(rng: Random) -> list[Draft]:
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
    result = f"{count * factor}{small}"
    scene = Scene(rng, "units", text)
    scene.ask(
        rng.choice((f"これは何{small}ですか。", f"{small}では、いくつですか。")),
        result,
        f"1{big}は{factor}{small}。{count}{big}は{result}。",
        "unit conversion",
        "number",
    )
    return scene.drafts


def timetable(rng: Random) -> list[Draft]:
    """The day of an event and the event of a day, among three entries of a timetable."""
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
    scene = Scene(rng, "schedule", text)
    for day, event in rng.sample(list(zip(days, events, strict=True)), 3):
        reasoning = f"予定では{day}に{event}がある。"
        if rng.random() < 0.5:
            asked = rng.choice((f"{event}は{kind}ですか。", f"{event}は{kind}にありますか。"))
            scene.ask(asked, day, reasoning, "timetable")
        else:
            asked = rng.choice((f"{day}の予定は何ですか。", f"{day}には何がありますか。"))
            scene.ask(asked, event, reasoning, "timetable")
    return scene.drafts


def counting(rng: Random) -> list[Draft]:
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
    steps = "、".join(f"{thing}で{i}" for i, thing in enumerate(things, 1))
    asked = rng.choice(("品物は何種類ありますか。", "全部で何種類ですか。"))
    scene = Scene(rng, "shopping", text)
    scene.ask(asked, f"{count}種類", f"{steps}。", "counting", "number")
    return scene.drafts


def comparison(rng: Random) -> list[Draft]:
    """Which of two things costs more, and which less."""
    first, second = rng.sample(words.ITEMS, 2)
    p, q = (100 * hundreds for hundreds in rng.sample(range(1, 10), 2))
    place = rng.choice(words.PLACES)
    text = rng.choice(
        (
            f"{place}の店では{first}が{p}円、{second}が{q}円です。",
            f"{first}は{p}円、{second}は{q}円で、どちらも{place}で売っています。",
            f"{place}で見た値札は{first}が{p}円、{second}が{q}円でした。",
        )
    )
    scene = Scene(rng, "shopping", text)
    for word, answer in rng.sample(
        [("高い", first if p > q else second), ("安い", first if p < q else second)], 2
    ):
        asked = rng.choice((f"{word}のはどちらですか。", f"どちらが{word}ですか。"))
        reasoning = f"{first}は{p}円、{second}は{q}円。{word}のは{answer}。"
        scene.ask(asked, answer, reasoning, "comparison")
    return scene.drafts


def yes_or_no(rng: Random) -> list[Draft]:
    """Whether each of two people attends."""
    goer, stayer = (f"{name}さん" for name in rng.sample(words.SURNAMES, 2))
    event, place = rng.choice(words.EVENTS), rng.choice(words.PLACES)
    when = rng.choice(words.WEEKDAYS)
    text = rng.choice(
        (
            f"{when}に{place}で{event}があります。{goer}は出ますが、{stayer}は休みます。",
            f"{place}の{event}は{when}です。{stayer}は休みますが、{goer}は出ます。",
            f"{goer}は{when}の{event}に出ます。{stayer}は休みます。場所は{place}です。",
            f"{stayer}は{when}の{event}を休みます。{goer}は{place}へ行って出ます。",
        )
    )
    scene = Scene(rng, "schedule", text)
    for who, answer, does in rng.sample([(goer, "はい", "出る"), (stayer, "いいえ", "休む")], 2):
        asked = rng.choice((f"{who}は出ますか。", f"{who}は{event}に出ますか。"))
        scene.ask(asked, answer, f"文には{who}は{does}とある。", "yes or no", "exact")
    return scene.drafts


def ordering(rng: Random) -> list[Draft]:
    """Who stands first, second or last in a row of three."""
    row = [f"{name}さん" for name in rng.sample(words.SURNAMES, 3)]
    event, place = rng.choice(words.EVENTS), rng.choice(words.PLACES)
    listed = "、".join(row)
    text = rng.choice(
        (
            f"{place}の{event}は{listed}の順です。",
            f"{event}の順番は{listed}で、{place}で行います。",
            f"{place}に{listed}の順に並び、{event}を待ちます。",
        )
    )
    scene = Scene(rng, "schedule", text)
    for who, word in rng.sample(list(zip(row, ("最初", "2番目", "最後"), strict=True)), 3):
        scene.ask(f"{word}は誰ですか。", who, f"順番は{listed}。{word}は{who}。", "ordering")
    return scene.drafts
