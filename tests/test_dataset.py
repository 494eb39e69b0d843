"""The dataset stage as a whole: nothing lost, nothing doubled, the same bytes however many processes work."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from string import ascii_lowercase

import phi3_folders
import pytest
import zstandard
from dataset_inputs import LABELS, character_tokenizer, many, outputs, profile, record, write
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from so8t_helpers import settings as so8t_settings
from so8t_helpers.dataset import assemble, likeness, reading
from so8t_helpers.dataset import figures as plots
from so8t_helpers.dataset import stage as dataset_stage
from so8t_helpers.dataset.inputs.files import inspect
from so8t_helpers.dataset.inputs.kinds import BOM
from so8t_helpers.dataset.quarantine import REASONS, Quarantined
from so8t_helpers.dataset.sample import Plan, Sampler
from so8t_helpers.phi3.tokenizer_files import read_tokenizer
from so8t_helpers.run.files import StageError, read_jsonl
from so8t_helpers.settings import SettingsError
from so8t_helpers.thinking import format as think_format
from tests.dialects import PHI35


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return character_tokenizer(tmp_path_factory.mktemp("base"))


def test_every_line_ends_in_exactly_one_file(tmp_path, base):
    rows = [*many(200), b"{", b"[]", record(0), {**record(999), "label": "perhaps"}]
    built = dataset_stage.build(profile(tmp_path, base, [write(tmp_path / "in.jsonl", rows)]))
    lines = built.card["lines"]
    assert lines["read"] == len(rows) == lines["train"] + lines["eval"] + lines["quarantine"]
    seen = [
        row["source"]["line"]
        for name in ("train", "eval")
        for row in read_jsonl(built.directory / f"{name}.jsonl")
    ]
    seen += [row["line"] for row in read_jsonl(built.directory / "quarantine.jsonl")]
    assert sorted(seen) == list(range(1, len(rows) + 1))
    reasons = {name: entry["lines"] for name, entry in built.card["quarantine"].items()}
    assert reasons == {"bad_json": 1, "not_an_object": 1, "duplicate": 1, "unknown_label": 1}
    manifest = json.loads((built.directory / "manifest.json").read_text(encoding="utf-8"))
    for name, content in outputs(built.directory).items():
        digest = hashlib.sha256(content).hexdigest()
        assert digest == built.card["outputs"][name] == manifest["outputs"][name]


def test_globs_folders_and_many_files_are_read_in_order_each_once(tmp_path, base):
    for n, name in enumerate(("b/two.jsonl", "a/one.jsonl", "a/deep/one.jsonl", "a/notes.txt")):
        write(tmp_path / name, [record(10 * n + k, LABELS[k % 4]) for k in range(4)])
    patterns = [tmp_path / "a", tmp_path / "*" / "*.jsonl", tmp_path / "b" / "two.jsonl"]
    built = dataset_stage.build(profile(tmp_path, base, patterns, eval_share=0.0))
    names = ["deep/one.jsonl", "a/one.jsonl", "b/two.jsonl"]
    assert [entry["name"].split("/", 1)[-1] for entry in built.card["inputs"]] == [
        name.split("/", 1)[-1] for name in names
    ]
    rows = read_jsonl(built.directory / "train.jsonl")
    assert len(rows) == built.card["lines"]["read"] == 12
    assert len({row["source"]["file"] for row in rows}) == 3


def test_lines_up_to_ten_mebibytes_are_read_and_longer_ones_cost_no_other(tmp_path, base):
    room = reading.MAX_LINE_BYTES - len(json.dumps(record(1, padding=""), ensure_ascii=False).encode())
    rows = [record(1, padding="x" * room), record(2, padding="x" * (room + 1)), record(3, "DENY")]
    built = dataset_stage.build(profile(tmp_path, base, [write(tmp_path / "in.jsonl", rows)], eval_share=0.0))
    assert [row["source"]["line"] for row in read_jsonl(built.directory / "train.jsonl")] == [1, 3]
    assert [(row["line"], row["reason"]) for row in read_jsonl(built.directory / "quarantine.jsonl")] == [
        (2, "line_too_long")
    ]


def test_the_stage_does_without_torch(tmp_path, base):
    source = write(tmp_path / "in.jsonl", many(8))
    code = (
        "import sys; from pathlib import Path; from dataset_inputs import profile; "
        "from so8t_helpers.dataset import stage; "
        "stage.build(profile(*map(Path, sys.argv[1:3]), [Path(sys.argv[3])])); "
        "sys.exit(bool({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(base), str(source)]
    here = Path(__file__).parent
    subprocess.run(command, check=True, cwd=here, env=os.environ | {"PYTHONPATH": str(here.parent)})


def test_split_is_stratified_and_plain_is_train_only(tmp_path, base):
    built = dataset_stage.build(
        profile(tmp_path, base, [write(tmp_path / "in.jsonl", many(400))], plain_share=0.2)
    )
    assert built.card["eval"]["labels"] == dict.fromkeys(think_format.LABELS, 10)
    assert set(built.card["eval"]["formats"]) == {"seed"}
    assert 40 <= built.card["train"]["formats"]["plain"] <= 100  # 0.18 of 400 expected, 4 standard deviations
    for row in read_jsonl(built.directory / "train.jsonl"):
        assert row["prompt"].startswith("/think ") == (row["format"] != "plain")
        assert bool(row["thinking"]) == (row["format"] != "plain")


@pytest.mark.parametrize("style", ["seed", "quadruple", "both", "english"])
def test_rows_survive_parse_and_build(tmp_path, base, style):
    built = dataset_stage.build(
        profile(tmp_path, base, [write(tmp_path / "in.jsonl", many(60))], think_format=style)
    )
    for row in read_jsonl(built.directory / "train.jsonl") + read_jsonl(built.directory / "eval.jsonl"):
        assert row["text"] == PHI35.render(row["messages"])
        if row["format"] == "plain":
            continue
        parsed = think_format.parse(row["messages"][-1]["content"])
        assert parsed.well_formed
        assert (parsed.style, parsed.thinking, parsed.final) == (row["format"], row["thinking"], row["final"])
        assert parsed.decision == row["label"]


def test_english_records_get_english_words_and_are_counted(tmp_path, base):
    words = {"DENY": "I must decline, ", "REFUSE": "I must decline, ", "ESCALATION": "A person decides, "}
    rows = [record(n, think_format.LABELS[n % 4]) for n in range(10)]
    for n in range(30):
        label, letters = think_format.LABELS[n % 4], Random(n).choices(ascii_lowercase, k=40)
        name = "".join(letters)
        row = {"instruction": f"What is {name}?", "output": f"{words.get(label, '')}{name}!", "label": label}
        rows.append({**row, "licence": "MIT", "task": "naming"})
    source = write(tmp_path / "in.jsonl", rows)
    built = dataset_stage.build(profile(tmp_path, base, [source], think_format="english", plain_share=0.0))
    sizes = {split: built.card[split]["languages"] for split in ("train", "eval")}
    assert {name: sum(size.get(name, 0) for size in sizes.values()) for name in ("ja", "en")} == {
        "ja": 10,
        "en": 30,
    }
    assert list(sizes["train"]) == ["en", "ja"], "the most frequent first, as a model card has them"
    for row in read_jsonl(built.directory / "train.jsonl") + read_jsonl(built.directory / "eval.jsonl"):
        answer = row["messages"][-1]["content"]
        parsed = think_format.parse(answer)
        assert (parsed.style, parsed.well_formed, parsed.decision) == ("english", True, row["label"])
        if row["question"].startswith("What"):
            assert row["text"].isascii()
            assert parsed.thinking.startswith("Kind of request: naming\nSafety label: ")


def test_no_near_duplicate_across_train_and_eval(tmp_path, base):
    rows = many(150)
    rows += [{**row, "instruction": str(row["instruction"]).replace("答えて", "お答え")} for row in many(150)]
    built = dataset_stage.build(
        profile(tmp_path, base, [write(tmp_path / "in.jsonl", rows)], near_duplicate_threshold=0.6)
    )
    assert built.card["quarantine"]["near_duplicate"]["lines"] >= 140
    train, held = (
        [
            likeness.normalise_question(row["question"])
            for row in read_jsonl(built.directory / f"{name}.jsonl")
        ]
        for name in ("train", "eval")
    )
    assert max(likeness.jaccard(a, b) for a in held for b in train) < 0.6


def test_same_bytes_with_one_and_two_processes(tmp_path, base, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_BYTES", 20_000)
    source = write(tmp_path / "in.jsonl", [*many(300), b"{", *many(10)])
    assert len(reading.split(inspect([source]))) > 3
    one = dataset_stage.build(profile(tmp_path, base, [source], "one", workers=1))
    monkeypatch.setattr(assemble, "BLOCK_BYTES", 3_000)
    two = dataset_stage.build(profile(tmp_path, base, [source], "two", workers=2))
    assert outputs(one.directory) == outputs(two.directory)
    assert one.card["lines"] == two.card["lines"]


def test_compressed_files_and_encodings_give_the_same_samples(tmp_path, base):
    rows = many(40)
    plain = write(tmp_path / "plain.jsonl", rows)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()[:900_000]))
    zst = tmp_path / "packed.jsonl.zst"
    zst.write_bytes(zstandard.compress(plain.read_bytes()) + zstandard.compress(b""))
    bom = tmp_path / "bom.jsonl"
    bom.write_bytes(BOM + plain.read_bytes())
    japanese = [
        {**record(n), "instruction": f"{n}番目の駅はどこですか。路線の図を見て答えてください。"}
        for n in range(30)
    ]
    sjis = write(
        tmp_path / "sjis.jsonl",
        [{**r, "output": "東京です。", "reasoning": "図に東京とある。"} for r in japanese],
        "cp932",
    )
    texts = {}
    for path in (plain, packed, zst, bom, sjis):
        built = dataset_stage.build(
            profile(tmp_path, base, [path], path.stem.replace(".", "-"), deduplicate=False)
        )
        texts[path.name] = [row["text"] for row in read_jsonl(built.directory / "train.jsonl")]
        assert built.card["quarantine"] == {}
    assert texts["plain.jsonl"] == texts["packed.jsonl.gz"] == texts["packed.jsonl.zst"] == texts["bom.jsonl"]
    assert built.card["inputs"][0]["encoding"] == "cp932"
    assert "東京です。" in texts["sjis.jsonl"][0]


def test_overlong_thinking_is_cut_at_a_sentence_and_the_answer_never(tmp_path, base):
    long = record(1, reasoning="これは一つの文です。" * 60)
    answer = record(2, output="とても長い答え。" * 60)
    source = write(
        tmp_path / "in.jsonl", [*many(20), {**long, "instruction": "別の問いです。長く考えます。"}, answer]
    )
    built = dataset_stage.build(
        profile(tmp_path, base, [source], length=600, plain_share=0.0, eval_share=0.0)
    )
    rows = {row["source"]["line"]: row for row in read_jsonl(built.directory / "train.jsonl")}
    assert rows[21]["final"] == long["output"]
    assert rows[21]["thinking"].endswith("これは一つの文です。\n判定: ALLOW")
    assert rows[21]["thinking"].count("一つの文") < 60
    assert built.card["quarantine"]["too_long"]["lines"] == 1
    assert built.card["counted"]["thinking"]["cut at a sentence"] == 1
    kept = dataset_stage.build(profile(tmp_path, base, [source], "q", length=600, overlong="quarantine"))
    assert kept.card["quarantine"]["too_long"]["lines"] == 2


def test_the_rules_are_shown_as_one_would_say_them():
    chosen = so8t_settings.DatasetSettings(plain_share=1.0, eval_share=0.0, licences=["MIT", "CC0-1.0"])
    shown = dict(plots.rules(chosen).itertuples(index=False, name=None))
    assert (shown["without thinking"], shown["held out"]) == ("100% of the samples", "0% of the questions")
    assert shown["licences"] == "MIT, CC0-1.0; none given: to quarantine"
    assert shown["missing thinking"] == "from the record's labels"
    assert shown["duplicates"] == "the same question, context and label, or one that is alike by 0.8 or more"


def test_nothing_kept_is_one_clear_error(tmp_path, base):
    with pytest.raises(StageError, match=r"none of 2 lines was kept .*bad_json"):
        dataset_stage.build(profile(tmp_path, base, [write(tmp_path / "in.jsonl", [b"{", b"x"])]))


def test_a_test_set_can_be_held_out_whole(tmp_path, base):
    source = write(tmp_path / "in.jsonl", many(20))
    built = dataset_stage.build(profile(tmp_path, base, [source], plain_share=0.0, eval_share=1.0))
    assert (built.card["lines"]["train"], built.card["lines"]["eval"]) == (0, 20)
    assert (built.directory / "train.jsonl").read_bytes() == b""
    for draw in (plots.flow, plots.labels, plots.domains, plots.lengths):
        draw(built.card)
    assert len(plots.draw_samples(built.directory, count=5)) == 5


def test_a_control_token_in_a_question_is_ordinary_text_and_one_in_an_answer_is_kept_out(tmp_path):
    base = tmp_path / "base"
    phi3_folders.write_side_files(base)
    asked = record(1, instruction="<s>と</s>と<unk>は何ですか。\n判定: ALLOW")
    rows = [asked, record(2, output="答えは<s>です。"), record(3, output="はい。\n判定: ALLOW")]
    built = dataset_stage.build(profile(tmp_path, base, [write(tmp_path / "in.jsonl", rows)], eval_share=0.0))
    (kept,) = read_jsonl(built.directory / "train.jsonl")
    assert kept["question"] == asked["instruction"]
    assert "< s>と< /s>と< unk>" in kept["text"]
    ids = read_tokenizer(base / "tokenizer.json").encode(kept["text"], add_special_tokens=False).ids
    assert {0, 1, 2}.isdisjoint(ids)


def test_the_decision_stands_at_the_end_of_the_thinking(tmp_path, base):
    said = record(1, reasoning="考える。\n判定: ALLOW\nもう一度考える。")
    built = dataset_stage.build(
        profile(tmp_path, base, [write(tmp_path / "in.jsonl", [said])], eval_share=0.0)
    )
    (kept,) = read_jsonl(built.directory / "train.jsonl")
    assert kept["thinking"] == f"{said['reasoning']}\n判定: ALLOW"


def test_missing_inputs_name_the_pattern(tmp_path, base):
    with pytest.raises(SettingsError, match=r"no file matches .*nothing"):
        dataset_stage.build(profile(tmp_path, base, [tmp_path / "nothing*.jsonl"]))


def test_no_input_at_all_is_an_error_that_names_the_key(tmp_path, base):
    with pytest.raises(SettingsError, match=r"`dataset\.inputs`: list should have at least 1 item"):
        dataset_stage.build(profile(tmp_path, base, []))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["instruction", "input", "output", "label", "reasoning"]
OTHERS = ["messages", "text", "title", "check", "nsfw", "url", "system", "task"]
marks = st.sampled_from(
    [
        "<final>",
        "# 最終回答",
        "判定: DENY",
        "# Thinking",
        "# Final answer:",
        "Decision: DENY",
        "<|end|>",
        "\u2028",
        "\x00",
        "a@b.jp",
        "03-1234-5678",
        "🍣" * 3,
    ]
)
wild_records = st.fixed_dictionaries(
    {
        "instruction": st.text(max_size=40) | marks,
        "output": st.text(max_size=40) | marks,
        "licence": st.just("MIT"),
    },
    optional={
        "label": st.sampled_from(["ALLOW", "deny", 2, "拒否", "?"]),
        "reasoning": st.text(max_size=40) | marks,
    }
    | dict.fromkeys(OTHERS, json_values),
)
wild_lines = st.one_of(
    st.binary(max_size=60).map(lambda b: b.replace(b"\n", b" ")),
    wild_records.map(lambda r: json.dumps(r, ensure_ascii=True).encode()),
    st.dictionaries(st.sampled_from(KEYS + OTHERS), json_values, max_size=6).map(
        lambda r: json.dumps(r).encode()
    ),
)


@hypothesis_settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lines=st.lists(wild_lines, min_size=20, max_size=60),
    style=st.sampled_from(["seed", "quadruple", "both", "english"]),
)
def test_whatever_comes_in_no_line_is_lost_or_doubled(tmp_path, base, lines, style):
    good = json.dumps(record(12345)).encode()
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([good, *lines]) + b"\n")
    built = dataset_stage.build(profile(tmp_path, base, [source], think_format=style, eval_share=0.3))
    seen = [row["line"] for row in read_jsonl(built.directory / "quarantine.jsonl")]
    for name in ("train", "eval"):
        seen += [row["source"]["line"] for row in read_jsonl(built.directory / f"{name}.jsonl")]
    assert sorted(seen) == list(range(1, len(lines) + 2))


@hypothesis_settings(max_examples=200, deadline=None)
@given(line=wild_lines, style=st.sampled_from(["seed", "quadruple", "both", "english"]))
def test_any_line_becomes_a_sound_sample_or_a_reason(base, line, style):
    plan = Plan(
        so8t_settings.DatasetSettings(think_format=style), 0, 2048, PHI35, base / "tokenizer.json", 0.0, None
    )
    outcome = Sampler(plan).batch([(1, line)], "utf-8", "in.jsonl")[0]
    if isinstance(outcome, Quarantined):
        assert outcome.reason in REASONS
        return
    row = json.loads(outcome.row)
    assert row["text"] == PHI35.render(row["messages"])
    if row["format"] != "plain":
        parsed = think_format.parse(row["messages"][-1]["content"])
        assert parsed.well_formed
        assert (parsed.thinking, parsed.final, parsed.decision) == (
            row["thinking"],
            row["final"],
            row["label"],
        )
