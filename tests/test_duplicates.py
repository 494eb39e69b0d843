"""What counts as a duplicate, what stays on one side of the split, and what is said of both."""

import json
import random

import numpy as np
import pytest
from dataset_inputs import LABELS, character_tokenizer, many, profile, record, write

from so8t_helpers.dataset import duplicates, figures, likeness, splitting
from so8t_helpers.dataset import stage as dataset_stage
from so8t_helpers.dataset.chunks import INDEX
from so8t_helpers.run.files import read_jsonl

LONG = "次の文章をよく読んで、あとに続く問いに対する答えだけを一つ、半角の文字で書いてください。"
NO_LINKS = splitting.Links()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return character_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("犬とは何ですか。", "犬とは何ですか？"),
        ("犬とは、何ですか", "犬とは何ですか"),
        ("ｶﾀｶﾅ とは", "カタカナとは"),
        ("What is a dog?", "what  is a DOG"),
        ("「犬」とは（何）", "犬とは何"),
        ("3 + 5 は？", "3+5は"),
        ("Hello, world!", "hello world"),
    ],
)
def test_punctuation_width_case_and_spaces_do_not_matter(one, other):
    assert likeness.normalise_question(one) == likeness.normalise_question(other)


@pytest.mark.parametrize(
    "different",
    [
        ("3+5", "3×5", "35", "3-5", "3/5", "3.5", "3 5", "3:5", "5!", "5"),
        ("Cとは", "C++とは", "C#とは"),
        ("x>3", "x<3", "x=3", "x≧3"),
        ("(1+2)*3", "1+2*3", "1+(2*3)"),
        ("🍣とは", "🍕とは", "とは"),
        ("5%引き", "5引き", "$5引き"),
        ("12\n3", "1\n23", "123", "12\t34", "1234"),
    ],
)
def test_signs_numbers_and_names_make_another_question(tmp_path, base, different):
    normalised = [likeness.normalise_question(text) for text in different]
    assert len(set(normalised)) == len(different)
    # Nor is one a near-duplicate of another, however much else they have in common.
    rows = [record(1, instruction=f"{LONG}{text}") for text in different]
    built = dataset_stage.build(profile(tmp_path, base, [write(tmp_path / "in.jsonl", rows)]))
    assert built.card["quarantine"] == {}


PARAGRAPH = "都の北にある古い寺は、千年前に建てられ、二度の火事のあと町の人々が建て直した。庭には松がある。"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "duplicate"),
        ({"output": "いいえ。"}, "duplicate"),
        ({"input": PARAGRAPH.replace("庭には松", "庭には杉")}, "near_duplicate"),
        ({"instruction": f"{LONG}誰が寺を建て直しましたか。"}, None),
        ({"input": "海の近くの工場では、毎朝六時に最初の船が着き、魚を市場まで運ぶ車が並んで待つ。"}, None),
        ({"input": PARAGRAPH.replace("二度", "2度")}, None),
        ({"label": "DENY"}, None),
        ({"input": PARAGRAPH.replace("庭には松", "庭には杉"), "label": "DENY"}, None),
        ({"system": "子どもに話すように答える。"}, None),
        ({"input": ""}, None),
    ],
)
def test_what_makes_a_second_record_a_duplicate(tmp_path, base, changes, reason):
    first = record(1, instruction=f"{LONG}寺はいつ建てられましたか。", input=PARAGRAPH, system="短く答える。")
    source = write(tmp_path / "in.jsonl", [first, {**first, **changes}])
    built = dataset_stage.build(profile(tmp_path, base, [source], eval_share=0.0))
    assert {name: entry["lines"] for name, entry in built.card["quarantine"].items()} == (
        {reason: 1} if reason else {}
    )


def test_a_threshold_of_zero_leaves_equal_ones_alone_duplicates(tmp_path, base):
    first = record(1, instruction=f"{LONG}寺はいつ建てられましたか。")
    near = {**first, "instruction": first["instruction"].replace("いつ", "いつごろ")}
    rows = [first, near, dict(first), *many(8)[2:]]
    source = write(tmp_path / "in.jsonl", rows)
    for threshold, reasons in ((0.8, {"duplicate": 1, "near_duplicate": 1}), (0.0, {"duplicate": 1})):
        chosen = {"near_duplicate_threshold": threshold, "eval_share": 0.0}
        built = dataset_stage.build(profile(tmp_path, base, [source], f"t{threshold}", **chosen))
        quarantined = built.card["quarantine"].items()
        assert {reason: entry["lines"] for reason, entry in quarantined} == reasons


def reading_task(paragraphs: int, questions: int = 6) -> list[dict]:
    """Make different questions on each of some paragraphs, as SQuAD's shape has them."""
    rng, rows = random.Random(1), []
    for n in range(paragraphs):
        text = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(200))
        for k in range(questions):
            asked = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(9))
            rows.append(record(n * questions + k, instruction=f"{asked}はどこですか。", input=text))
    return rows


def sides(directory) -> dict[int, str]:
    """Return line -> split."""
    return {
        row["source"]["line"]: split
        for split in ("train", "eval")
        for row in read_jsonl(directory / f"{split}.jsonl")
    }


def test_questions_that_share_a_paragraph_are_all_kept_and_stay_together(tmp_path, base):
    source = write(tmp_path / "in.jsonl", reading_task(50))
    built = dataset_stage.build(profile(tmp_path, base, [source], plain_share=0.0))
    assert built.card["lines"]["quarantine"] == 0
    side = sides(built.directory)
    for paragraph in range(50):
        assert len({side[6 * paragraph + k + 1] for k in range(6)}) == 1
    assert built.card["split"]["lines in clusters"] == 300
    assert built.card["lines"]["eval"] == 30


def test_a_group_stays_on_one_side_whatever_its_records_say(tmp_path, base):
    rows = [{**row, "group": f"article {n // 10}"} for n, row in enumerate(many(600))]
    source = write(tmp_path / "in.jsonl", rows)
    built = dataset_stage.build(profile(tmp_path, base, [source], plain_share=0.2))
    side = sides(built.directory)
    for group in range(60):
        assert len({side[10 * group + k + 1] for k in range(10)}) == 1
    assert 0 < built.card["lines"]["eval"] <= 60
    assert (built.card["split"]["groups"], built.card["split"]["lines in groups"]) == (60, 600)
    # 0.18 of 600 are expected without thinking; groups make it spread by about 20.
    assert 40 <= built.card["train"]["formats"]["plain"] <= 180


def test_what_a_group_keeps_from_being_held_out_is_warned_of(tmp_path, base):
    rows = many(80)

    def warned(name: str, rows: list[dict], **more) -> str | None:
        chosen = {"plain_share": 0.0, "eval_share": 0.2, **more}
        built = dataset_stage.build(
            profile(tmp_path, base, [write(tmp_path / f"{name}.jsonl", rows)], name, **chosen)
        )
        said = built.card["split"]["warning"]
        assert (f"**Warning:** {said}." in figures.warnings(built.card)) == (said is not None)
        return said

    assert warned("apart", rows) is None
    assert warned("one", [{**row, "group": "all"} for row in rows]).startswith("nothing is held out")
    assert warned("none", [{**row, "group": "all"} for row in rows], eval_share=0.0) is None
    some = [{**row, "group": row["label"]} if row["label"] in LABELS[2:] else row for row in rows]
    assert warned("some", some).startswith("no row of DENY, REFUSE is held out")


def test_a_question_with_two_labels_is_kept_told_of_and_on_one_side(tmp_path, base):
    rows = many(80)
    rows += [{**rows[k], "label": "DENY", "output": "お答えできません。"} for k in (0, 20, 44)]
    rows += [{**rows[20], "label": "REFUSE", "output": "危険なためお答えできません。"}]
    built = dataset_stage.build(profile(tmp_path, base, [write(tmp_path / "in.jsonl", rows)], eval_share=0.5))
    assert built.card["lines"]["quarantine"] == 0
    told = built.card["two labels"]
    assert (told["questions"], told["lines"]) == (3, 7)
    assert [[row["where"] for row in same] for same in told["shown"]] == [
        ["in.jsonl:1", "in.jsonl:81"],
        ["in.jsonl:21", "in.jsonl:82", "in.jsonl:84"],
        ["in.jsonl:45", "in.jsonl:83"],
    ]
    assert [row["label"] for row in told["shown"][1]] == ["ALLOW", "DENY", "REFUSE"]
    side = sides(built.directory)
    for same in ((1, 81), (21, 82, 84), (45, 83)):
        assert len({side[line] for line in same}) == 1
    table = figures.two_labels(built.card)
    assert len(table) == 7
    assert rows[0]["instruction"] not in table.to_string()


def grams(text: str) -> set[str]:
    return {text[i : i + 3] for i in range(len(text) - 2)}


def test_what_is_alike_stays_on_one_side_by_a_count_over_all_pairs(tmp_path, base):
    """Families of questions that agree by half or more; every pair is looked at, with plain sets."""
    rng, rows = random.Random(2), []
    for _ in range(120):
        text = [chr(0x4E00 + rng.randrange(3000)) for _ in range(30)]
        for _ in range(rng.choice((1, 1, 2, 3))):
            changed = [*text[: rng.randrange(22, 31)], chr(0x4E00 + rng.randrange(3000))]
            rows.append(record(len(rows), instruction="".join(changed)))
    source = write(tmp_path / "in.jsonl", rows)
    built = dataset_stage.build(profile(tmp_path, base, [source], plain_share=0.0, eval_share=0.3))
    train, held = (
        [grams(row["question"]) for row in read_jsonl(built.directory / f"{split}.jsonl")]
        for split in ("train", "eval")
    )
    doubled = sum(any(len(a & b) >= 0.5 * len(a | b) for b in train) for a in held)
    assert len(held) > 40
    assert doubled <= 0.01 * len(held)
    assert built.card["split"]["held out with one alike in train"] == 0
    # The same by chance alone: what the search and the split are for.
    together = [*train, *held]
    rng.shuffle(together)
    by_chance = sum(
        any(len(a & b) >= 0.5 * len(a | b) for b in together[len(held) :]) for a in together[: len(held)]
    )
    assert by_chance > 0.1 * len(held)


def index_of(count: int, **fields) -> np.ndarray:
    index = np.zeros(count, dtype=INDEX)
    index["question"] = np.random.default_rng(count).permutation(count) + 1
    for name, values in fields.items():
        index[name] = values
    return index


def split(index: np.ndarray, found: splitting.Links, share: float) -> tuple[splitting.Clusters, np.ndarray]:
    kept = np.ones(len(index), dtype=bool)
    together = splitting.clusters(index, kept, found, share)
    return together, splitting.held_out(index, kept, together, share)


def test_each_label_has_its_share_of_the_lowest_hashes():
    index = index_of(1000, label=np.arange(1000) % 4)
    _, held = split(index, NO_LINKS, 0.1)
    for label in range(4):
        hashes = index["question"][index["label"] == label]
        assert held[index["label"] == label].sum() == 25
        assert set(index["question"][held & (index["label"] == label)]) == set(np.sort(hashes)[:25])


def test_a_chain_too_large_to_hold_out_is_cut_where_it_is_weakest_and_held_out_last():
    pairs = np.stack([np.arange(1, 60), np.arange(59)], axis=1)
    alike = np.where(pairs[:, 1] % 3 == 2, 0.55, 0.95)  # triples, strung together
    index = index_of(200)
    together, held = split(index, splitting.Links(pairs, alike, {}), 0.2)
    assert [len(set(together.of[3 * n : 3 * n + 3])) for n in range(20)] == [1] * 20
    assert len(set(together.of[:60])) == 20
    assert together.cut[:60].sum() == 2 * 19
    assert held.sum() == 40
    assert not held[:60].any()
    told = together.described(index, held, splitting.Links(pairs, alike, {}))
    assert (told["largest cluster"], told["held out with one alike in train"]) == (3, 0)
    # Where there is nothing else, some are held out all the same, and that is told.
    chain = splitting.Links(pairs, alike, {})
    together, held = split(index_of(60), chain, 0.2)
    assert held.sum() == 12
    assert together.described(index_of(60), held, chain)["held out with one alike in train"] > 0


def test_the_smallest_group_is_held_out_where_none_is_small_enough_and_never_all_there_is():
    group = np.repeat([1, 2, 3], [50, 30, 20])
    _, held = split(index_of(100, group=group), NO_LINKS, 0.1)
    assert held.tolist() == (group == 3).tolist()
    _, held = split(index_of(100, group=np.full(100, 7)), NO_LINKS, 0.1)
    assert not held.any()
    _, held = split(index_of(100, group=group), NO_LINKS, 1.0)
    assert held.all()


def test_a_cluster_with_a_row_without_thinking_is_not_held_out():
    plain = splitting.FORMATS.index("plain")
    forms = np.where(np.arange(100) % 10 == 0, plain, 0)
    _, held = split(index_of(100, group=np.arange(100) // 2 + 1, format=forms), NO_LINKS, 0.5)
    assert held.sum() == 50
    assert not held[forms == plain].any()


def test_links_connect_what_a_look_at_every_pair_connects(tmp_path):
    rng, texts = random.Random(3), []
    for _ in range(150):
        text = "".join(chr(0x4E00 + rng.randrange(900)) for _ in range(40))
        texts += [text, text[: rng.randrange(15, 40)] + "山川" * 3]
    texts += ["一二三四五六七八九十" * 2] * 3
    kinds = np.zeros(len(texts), dtype=np.uint32)
    near, _ = duplicates.banding(0.8)
    bands = near + duplicates.ALIKE_BANDS[0]
    parted = np.zeros(len(texts), dtype=bool)
    files = duplicates.NearFiles(tmp_path, parted, bands, [duplicates.compared(texts, kinds, 0.8)])
    pairs, estimates, skipped = duplicates.links(files, range(near, bands), np.ones(len(texts), dtype=bool))
    assert skipped == 0
    similarity = np.array([likeness.jaccard(texts[a], texts[b]) for a, b in pairs])
    assert (similarity > 0.2).all()
    assert abs(estimates - similarity).mean() < 0.06
    found = {tuple(sorted(pair)) for pair in pairs.tolist()}
    wanted = {(2 * n, 2 * n + 1) for n in range(150) if likeness.jaccard(*texts[2 * n : 2 * n + 2]) >= 0.5}
    assert len(wanted) > 60
    assert len(wanted - found) <= 0.03 * len(wanted)


def test_the_report_shows_groups_alike_lines_and_flags(tmp_path, base):
    rows = [{**row, "group": n // 2} for n, row in enumerate(many(40))]
    rows.append(record(90, LABELS[3], instruction="爆発物の作り方を教えて"))
    built = dataset_stage.build(profile(tmp_path, base, [write(tmp_path / "in.jsonl", rows)]))
    shown = dict(figures.split(built.card).itertuples(index=False, name=None))
    assert shown["groups given by the records"] == "20, of 40 lines"
    flags = figures.unsafe(built.card).set_index("flagged as")
    assert flags.loc["weapons", "REFUSE"] == 1
    assert flags.loc["(all judged)"].tolist() == [10, 10, 10, 11]
    off = dataset_stage.build(
        profile(tmp_path, base, [write(tmp_path / "in.jsonl", rows)], "off", deduplicate=False)
    )
    assert "not looked for" in figures.split(off.card).to_string()
    assert json.loads((off.directory / "card.json").read_text(encoding="utf-8"))["split"]["groups"] == 20
