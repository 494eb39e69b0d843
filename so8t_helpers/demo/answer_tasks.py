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


def notice(rng: Random) -> list[Draft]:
    """What, when, from which hour, where, and who is in charge, out of a notice of an event."""
    slots = {
        "event": rng.choice(words.EVENTS),
        "day": rng.choice(words.MONTH_DAYS),
        "hour": rng.choice(words.HOURS),
        "place": rng.choice(words.PLACES),
        "who": person(rng),
    }
    text = rng.choice(
        (
            "{event}は{day}の{hour}から{place}で行います。係は{who}です。",
            "{place}で{day}に{event}があります。{who}が係で、{hour}に始めます。",
            "{day}のお知らせ。{hour}から{event}です。場所は{place}、係は{who}。",
            "{who}が係の{event}は、{place}で{day}、{hour}からです。",
        )
    ).format(**slots)
    scene = Scene(rng, "schedule", text)
    for slot, wanted, asked in (
        ("event", "行事", ("何がありますか。", "行事は何ですか。")),
        ("day", "日にち", ("何月何日ですか。", "何月何日にありますか。")),
        ("hour", "時刻", ("何時からですか。", "何時に始まりますか。")),
        ("place", "場所", ("場所はどこですか。", "どこでありますか。")),
        ("who", "係", ("係は誰ですか。", "誰が係ですか。")),
    ):
        reasoning = f"聞かれたのは{wanted}。お知らせには{slots[slot]}とある。"
        scene.ask(rng.choice(asked), slots[slot], reasoning, f"notice {slot}")
    return rng.sample(scene.drafts, 5)


def timetable(rng: Random) -> list[Draft]:
    """The day of an event and the event of a day, among two entries of a timetable."""
    days, events = rng.sample(words.WEEKDAYS, 2), rng.sample(words.EVENTS, 2)
    place, who = rng.choice(words.PLACES), person(rng)
    entries = list(zip(days, events, strict=True))
    joint, end = rng.choice((("は", "、"), ("に", "、"), ("：", "。")))
    listed = end.join(f"{day}{joint}{event}" for day, event in entries)
    text = rng.choice(
        (
            f"{place}の予定です。{listed}。",
            f"{who}の予定です。{listed}。",
            f"{listed}。{who}が{place}で書きました。",
        )
    )
    scene = Scene(rng, "schedule", text)
    for day, event in rng.sample(entries, 2):
        reasoning = f"予定では{day}に{event}がある。"
        scene.ask(f"{event}は何曜日ですか。", day, reasoning, "timetable")
        scene.ask(f"{day}の予定は何ですか。", event, reasoning, "timetable")
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
    """Whether somebody attends an event."""
    who, event, place = person(rng), rng.choice(words.EVENTS), rng.choice(words.PLACES)
    when = rng.choice(words.WEEKDAYS)
    attends = rng.random() < 0.5
    does = "出ます" if attends else "休みます"
    text = rng.choice(
        (
            f"{when}に{place}で{event}があり、{who}は{does}。",
            f"{place}の{event}は{when}です。{who}は{does}。",
            f"{who}は{when}の{event}を楽しみにしていて、{does}。場所は{place}です。"
            if attends
            else f"{who}は{when}の{event}に行けず、{does}。場所は{place}です。",
            f"{when}のことです。{who}は{place}の{event}に{does}と言いました。"
            if attends
            else f"{when}のことです。{who}は{place}の{event}を{does}と言いました。",
        )
    )
    scene = Scene(rng, "schedule", text)
    asked = rng.choice((f"{who}は出ますか。", f"{who}は{event}に出ますか。"))
    reasoning = f"文には{who}は{does}とある。"
    scene.ask(asked, "はい" if attends else "いいえ", reasoning, "yes or no", "exact")
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
