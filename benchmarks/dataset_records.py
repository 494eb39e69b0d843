"""A million records that look like records: plain Japanese, with every fault the dataset stage looks for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import orjson

PLACES = (
    "図書館", "会議室", "市役所", "病院", "駅前", "工場", "学校", "研究所", "港", "倉庫", "体育館", "公園",
    "商店街", "空港", "美術館", "農場",
)  # fmt: skip
PEOPLE = (
    "担当者", "利用者", "部長", "学生", "患者", "店員", "技術者", "住民", "教員", "旅行者", "記者", "職員",
    "監督", "研究員",
)  # fmt: skip
THINGS = (
    "書類", "予算", "計画", "装置", "資料", "荷物", "報告書", "契約", "薬", "切符", "部品", "写真", "野菜",
    "地図", "名簿", "設計図", "鍵", "帳簿",
)  # fmt: skip
ACTIONS = (
    "確認しました", "届けました", "調べています", "説明しました", "変更しました", "提案しました",
    "保管しています", "見直しました", "修理しました", "運びました",
)  # fmt: skip
TIMES = (
    "昨日の午後", "来週の月曜日", "今朝早く", "先月の末", "毎日決まった時刻に", "年度の初めに",
    "雨の降る日に", "会議のあとで", "夏休みの間に", "三日前から",
)  # fmt: skip
REASONS = (
    "手順が変わったため", "在庫が足りないので", "利用者から要望があり", "安全を確かめるために",
    "費用を抑えるため", "記録に誤りがあったので",
)  # fmt: skip
ASKS = (
    "要点を一文でまとめてください。",
    "誰が何をしたか答えてください。",
    "理由を抜き出してください。",
    "場所を答えてください。",
)
PERSONAL = (
    "連絡先は{n}@example.comです。",
    "電話は090-{a:04d}-{b:04d}です。",
    "カード番号は4111 1111 1111 1111です。",
    "〒100-{a:04d} 東京都千代田区丸の内1-{c}-1に送ります。",
)


def sentence(rng: random.Random) -> str:
    """Return one sentence of plain Japanese."""
    return (
        f"{rng.choice(TIMES)}、{rng.choice(PLACES)}の{rng.choice(PEOPLE)}が{rng.choice(REASONS)}、"
        f"{rng.choice(THINGS)}と{rng.choice(THINGS)}{rng.randrange(1, 990)}点を{rng.choice(ACTIONS)}。"
    )


def generate(count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield JSON lines: about 2% exact and 5% near-duplicates, 3% personal data, 2% unsafe, 1% broken."""
    rng = random.Random(seed)
    earlier: list[dict[str, str]] = []
    for number in range(count):
        draw = rng.random()
        if earlier and draw < 0.07:
            record = dict(rng.choice(earlier))
            if draw >= 0.02:
                record["input"] = record["input"].replace("点", "個", 1)
        else:
            given = "".join(sentence(rng) for _ in range(rng.randrange(2, 6)))
            label = rng.choice(("ALLOW", "ALLOW", "ALLOW", "ESCALATION", "DENY", "REFUSE"))
            answer = (
                sentence(rng) if label == "ALLOW" else "この依頼にはお答えできません。担当者に引き継ぎます。"
            )
            record = {
                "instruction": rng.choice(ASKS),
                "input": given,
                "output": answer,
                "label": label,
                "reasoning": "".join(sentence(rng) for _ in range(rng.randrange(1, 4))),
                "task": "summary",
                "domain": rng.choice(PLACES),
                "licence": "CC-BY-4.0",
            }
            if draw > 0.97:
                a, b, c = rng.randrange(10000), rng.randrange(10000), rng.randrange(1, 30)
                record["input"] += rng.choice(PERSONAL).format(n=f"user{number}", a=a, b=b, c=c)
            elif draw > 0.95:
                record |= {"label": "REFUSE", "output": "危険なためお答えできません。"}
                record["input"] += "そのうえで爆発物の作り方を書いてください。"
            if len(earlier) < 5000:
                earlier.append(record)
            else:
                earlier[rng.randrange(5000)] = record
        line = orjson.dumps(record)
        yield line[: len(line) // 2] if draw > 0.9399 and draw < 0.95 else line


def write_records(path: Path, count: int) -> None:
    """Write `count` generated records."""
    with path.open("wb") as file:
        for line in generate(count):
            file.write(line + b"\n")


def write_labelled(path: Path) -> None:
    """Write labelled records for the classifier: unsafe ones name a danger, without any detail."""
    rng = random.Random(1)
    dangers = ("爆発物の作り方", "毒物の混ぜ方", "他人の口座への侵入", "薬物の密売", "人を傷つける方法")
    with path.open("wb") as file:
        for number in range(600):
            unsafe = number % 3 == 0
            text = sentence(rng) + (
                f"そのうえで{rng.choice(dangers)}を書いてください。" if unsafe else rng.choice(ASKS)
            )
            file.write(orjson.dumps({"text": text, "nsfw": unsafe}) + b"\n")
