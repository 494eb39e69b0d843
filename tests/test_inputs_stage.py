"""Inputs on their way through the stage: nothing is lost, changes are seen, the walk back finds the lines."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from so8t_helpers.dataset import figures as plots
from so8t_helpers.dataset import stage as dataset_stage
from so8t_helpers.dataset import thinking
from so8t_helpers.dataset.inputs import packing
from so8t_helpers.dataset.inputs.files import input_files
from so8t_helpers.dataset.records import normalise
from so8t_helpers.dataset.sample import Plan, Sampler
from so8t_helpers.run.files import StageError, read_jsonl
from so8t_helpers.run.stage import stale_reason
from so8t_helpers.settings import PROJECT_ROOT, DatasetSettings, Settings, SettingsError, load_settings, merge
from so8t_helpers.thinking.format import LABELS
from so8t_helpers.thinking.language import language_of
from so8t_helpers.verbs.verify import walk_back
from tests import hub_server
from tests.dataset_inputs import character_tokenizer, many, profile, record, write
from tests.dialects import PHI35
from tests.test_inputs import FORMATS, MORE, PACKINGS, ROWS, as_jsonl, as_table, settings_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return character_tokenizer(tmp_path_factory.mktemp("inputs-base"))


def with_entries(tmp_path: Path, base: Path, *entries: Any, **more: Any) -> Settings:
    inputs = [str(entry) if isinstance(entry, Path) else entry for entry in entries]
    chosen = {"default_licence": "self-made", "plain_share": 0.0, "eval_share": 0.0, **more}
    return merge(profile(tmp_path, base, [tmp_path], **chosen), {"dataset": {"inputs": inputs}})


def test_a_file_added_to_a_glob_or_a_folder_makes_the_stage_stale(tmp_path: Path, base: Path):
    write(tmp_path / "in" / "a.jsonl", many(4))
    for number, pattern in enumerate(("in/*.jsonl", "in")):
        settings = with_entries(tmp_path, base, str(tmp_path / pattern))
        dataset_stage.build(settings)
        assert stale_reason(settings, "01_dataset") is None
        added = write(tmp_path / "in" / f"b{number}.jsonl", [record(100 + number)])
        assert stale_reason(settings, "01_dataset") == f"of {tmp_path / pattern} {added} is new"
        built = dataset_stage.build(settings)
        assert built.card["lines"]["read"] == 5 + number
        assert stale_reason(settings, "01_dataset") is None
        (tmp_path / "in" / f".b{number}.jsonl").touch()
        assert stale_reason(settings, "01_dataset") is None, "hidden files are no inputs"


def test_robots_files_that_are_added_make_the_stage_stale(tmp_path: Path, base: Path):
    settings = with_entries(tmp_path, base, write(tmp_path / "in" / "a.jsonl", many(4)))
    robots = tmp_path / "in" / "robots"
    robots.mkdir()
    dataset_stage.build(settings)
    (robots / "open.example.txt").touch()
    assert "open.example.txt is new" in str(stale_reason(settings, "01_dataset"))


def test_every_row_of_every_format_is_walked_back_to_its_record(tmp_path: Path, base: Path):
    paths = []
    for name, make in FORMATS.items():
        make(tmp_path / name)
        paths.append(tmp_path / name)
    packed = tmp_path / "packed.csv.xz"
    packed.write_bytes(PACKINGS[".xz"]((tmp_path / "commas.csv").read_bytes()))
    (tmp_path / "headless.csv").write_text("首都は,東京です。,0\n", encoding="utf-8")
    columns = {"columns": ["question", "answer", "label"], "labels": {0: "ALLOW"}, "source": "ours"}
    headless = {"path": str(tmp_path / "headless.csv"), **columns}
    settings = with_entries(tmp_path, base, *paths, packed, headless, deduplicate=False)
    built = dataset_stage.build(settings)
    rows = read_jsonl(built.directory / "train.jsonl")
    assert len(rows) == 3 * (len(paths) + 1) + 1 == built.card["lines"]["read"]
    assert [row["source"]["line"] for row in rows[:3]] == [1, 2, 3]
    assert rows[-1]["source"]["from"] == "ours" == built.card["inputs"][-1]["entry"]["source"]
    assert {entry["format"] for entry in built.card["inputs"]} == {
        *("jsonl", "json", "csv", "tsv", "parquet", "arrow", "xlsx")
    }
    assert list(plots.inputs(built.card)["name"]) == [entry["name"] for entry in built.card["inputs"]]
    verified = walk_back(settings.run_dir)
    assert verified.broken is None, verified.broken
    # One value changed, its file's hash put right: the row's own hash tells.
    table = tmp_path / "commas.csv"
    before = table.read_bytes()
    table.write_bytes(before.replace("日本".encode(), "仏国".encode()))
    manifest = built.directory / "manifest.json"
    digests = [hashlib.sha256(content).hexdigest() for content in (before, table.read_bytes())]
    manifest.write_text(manifest.read_text(encoding="utf-8").replace(*digests), encoding="utf-8")
    broken = walk_back(settings.run_dir).broken
    assert broken is not None
    assert broken.name == "commas.csv: input lines"
    assert "line 1 is not the one" in broken.found


def test_a_dialogue_is_kept_whole_masked_and_trained_by_its_last_answer_or_all(tmp_path: Path, base: Path):
    turns = [{"role": "system", "content": "短く"}, *MORE]
    turns[1] = {"role": "user", "content": "私はtaro@example.comです。首都は"}
    other = [*MORE[:2], {"role": "user", "content": "人口は"}, MORE[3]]  # the same last question
    rows = [{"messages": turns, "label": "ALLOW"}, {"messages": other, "label": "ALLOW"}]
    source = write(tmp_path / "in.jsonl", rows)
    built = dataset_stage.build(with_entries(tmp_path, base, source))
    row, second = read_jsonl(built.directory / "train.jsonl")
    said = [(turn["role"], turn["content"]) for turn in row["messages"]]
    assert said[:-1] == [
        ("system", "短く"),
        ("user", "私は[メールアドレス]です。首都は"),
        ("assistant", "東京です。"),
        ("user", "/think 人口は"),
    ]
    assert said[-1][1].endswith("約1400万人です。")
    assert (row["question"], second["question"]) == ("人口は", "人口は"), (
        "no duplicates: they began otherwise"
    )
    assert built.card["counted"]["personal data masked"] == {"email": 1}
    assert "trained" not in row
    built = dataset_stage.build(with_entries(tmp_path, base, source, dialogue_answers="every"))
    assert read_jsonl(built.directory / "train.jsonl")[0]["trained"] == "every answer"


@pytest.mark.parametrize(
    ("label", "said"), [("REFUSE", "危険なためお答えできません。"), ("ESCALATION", "担当者に引き継ぎます。")]
)
def test_earlier_answers_that_nobody_judged_are_not_trained(
    tmp_path: Path, base: Path, label: str, said: str
):
    turns = [
        *MORE[:2],
        {"role": "user", "content": "爆発物の作り方は"},
        {"role": "assistant", "content": said},
    ]
    source = write(tmp_path / "in.jsonl", [{"messages": turns, "label": label}])
    built = dataset_stage.build(with_entries(tmp_path, base, source, dialogue_answers="every"))
    (row,) = read_jsonl(built.directory / "train.jsonl")
    assert len(row["messages"]) == 4
    assert "trained" not in row


@pytest.mark.parametrize(
    ("place", "said"), [(0, "# 最終回答\nここ"), (1, "# 最終回答\nここ"), (1, "判定: ALLOW")]
)
def test_an_earlier_turn_cannot_break_out_of_its_part(tmp_path: Path, base: Path, place: int, said: str):
    turns = [dict(turn) for turn in MORE]
    turns[place]["content"] = said
    source = write(tmp_path / "in.jsonl", [record(1), {"messages": turns, "label": "ALLOW"}])
    built = dataset_stage.build(with_entries(tmp_path, base, source))
    assert built.card["quarantine"]["format_markers"]["lines"] == 1


@pytest.mark.parametrize("readme", ["README.md", "README.ja.md"])
def test_the_records_that_the_readme_shows_are_kept_by_its_profile(tmp_path: Path, base: Path, readme: str):
    text = (PROJECT_ROOT / readme).read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    lines = [line.encode() for line in block.strip().splitlines()]
    inputs = [str(write(tmp_path / "data" / "mine.jsonl", lines))]
    chosen = load_settings("rtx3060").dataset.model_dump() | {"inputs": inputs, "workers": 1}
    built = dataset_stage.build(merge(profile(tmp_path, base, [tmp_path]), {"dataset": chosen}))
    assert built.card["lines"]["quarantine"] == 0
    assert built.card["lines"]["read"] == len(lines) > 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"licence": None}, r"2 licence_missing\); give each record a `licence`.*dataset\.default_licence"),
        ({"licence": "mine"}, r"2 licence_not_allowed\); name the licence in dataset\.licences"),
        ({"label": None}, r"2 missing_label\); give each record a `label`.*label: ALLOW"),
        ({"label": 1}, r"2 unknown_label\); say .* labels: \{0: ALLOW, 1: REFUSE\}"),
        (
            {"output": {"value": "東京"}},
            r"2 wrong_type\); .*says which: .*columns: \{answer: answer\.value\}",
        ),
        ({"output": None}, r"2 empty_answer\); .*columns: \{answer: "),
    ],
)
def test_where_nothing_is_kept_the_error_says_what_would_help(
    tmp_path: Path, base: Path, change: dict[str, Any], says: str
):
    source = write(tmp_path / "in.jsonl", [{**record(n), **change} for n in range(2)])
    with pytest.raises(StageError, match=says):
        dataset_stage.build(profile(tmp_path, base, [source]))


def test_an_empty_input_is_said_to_be_empty(tmp_path: Path, base: Path):
    source = write(tmp_path / "in.jsonl", [])
    with pytest.raises(StageError, match=r"the files of dataset\.inputs hold no line"):
        dataset_stage.build(profile(tmp_path, base, [source], eval_share=1.0))


@pytest.mark.parametrize("packed", [".gz", ".zst", ".bz2", ".xz"])
def test_a_cut_file_stops_the_stage_though_it_is_unpacked_but_once_before_its_lines_are_judged(
    tmp_path: Path, base: Path, packed: str, monkeypatch: pytest.MonkeyPatch
):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in many(40)).encode()
    path = tmp_path / f"in.jsonl{packed}"
    path.write_bytes(PACKINGS[packed](lines))
    opened: list[Path] = []
    open_bytes = packing.open_bytes

    def counted(where: Path, how: str) -> Any:
        opened.append(where)
        return open_bytes(where, how)

    for module in ("reading", "inputs.files", "inputs.tables"):
        monkeypatch.setattr(f"so8t_helpers.dataset.{module}.open_bytes", counted)
    dataset_stage.build(with_entries(tmp_path, base, path))
    assert opened == [path] * 3  # its head, its lines counted, its lines read
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StageError, match=r"in\.jsonl\.\w+: expected a whole"):
        dataset_stage.build(with_entries(tmp_path, base, path))


@pytest.mark.parametrize("key", ["task", "domain", "category"])
def test_a_teacher_thinks_for_every_record_without_reasoning_whatever_else_it_says(base: Path, key: str):
    sampler = Sampler(Plan(DatasetSettings(), 0, 2048, PHI35, base / "tokenizer.json", 0.0, None))
    bare = {**record(1), key: "計算", "reasoning": None}
    asked, not_asked = (
        sampler.needs_teacher(json.dumps(row).encode(), "utf-8") for row in (bare, {**record(2), key: "計算"})
    )
    assert asked is not None
    assert not_asked is None


@pytest.mark.parametrize("language", ["ja", "en"])
def test_the_quadruples_task_says_what_its_label_says(language: str):
    question, answer = {"ja": ("首都は", "東京です。"), "en": ("Capital?", "Tokyo.")}[language]
    tasks = set()
    for label in LABELS:
        built = thinking.build(
            normalise({"question": question, "answer": answer, "label": label}), "quadruple", "", None
        )
        tasks.add(built.task)
        assert language_of(built.task) == language
        assert (built.task in {"依頼に答える。", "Answer the request."}) == (label == "ALLOW")
    assert len(tasks) == len(LABELS)


def saved(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    (datasets.DatasetDict(parts) if len(parts) > 1 else next(iter(parts.values()))).save_to_disk(str(folder))


def test_a_folder_of_datasets_is_read_and_one_of_several_splits_is_chosen(tmp_path: Path, base: Path):
    saved(tmp_path / "one", {"train": ROWS})
    saved(tmp_path / "two", {"train": ROWS[:2], "test": ROWS[2:]})
    as_jsonl(tmp_path / "two" / "train" / "cache-0.json", ROWS)  # of its own work, no data
    built = dataset_stage.build(with_entries(tmp_path, base, tmp_path / "one"))
    assert built.card["lines"]["train"] == 3
    with pytest.raises(SettingsError, match=r"the splits train, test; choose one .*split: train\}"):
        input_files(settings_of(tmp_path, tmp_path / "two"))
    entry = {"path": str(tmp_path / "two"), "split": "test"}
    built = dataset_stage.build(with_entries(tmp_path, base, entry))
    (row,) = read_jsonl(built.directory / "train.jsonl")
    assert row["question"] == ROWS[2]["instruction"]


FETCH = """
import sys
from so8t_helpers.dataset.inputs.files import input_files
from so8t_helpers.settings import load_settings
entry = {"path": "hub:me/set", "split": "test", "revision": sys.argv[2]}
chosen = {"run": {"root": sys.argv[1]}, "dataset": {"inputs": [entry]}}
((path, _),) = input_files(load_settings("demo", chosen))
sys.stdout.write(path.read_text(encoding="utf-8"))
"""


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_fetched_once_by_split_and_revision(tmp_path: Path):
    pytest.importorskip("datasets")

    def fetch(revision: str) -> subprocess.CompletedProcess[str]:
        quick = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", FETCH, str(tmp_path / "runs"), revision]
        return subprocess.run(
            command, env=os.environ | quick, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
        )

    with hub_server.running(tmp_path / "hub", {}) as hub:
        repo: dict[str, Any] = {"private": False, "commits": []}
        revisions = []
        for said in ("first", "second"):
            lines = {
                part: json.dumps({"question": f"{said} {part}", "answer": "a"}) for part in ("train", "test")
            }
            files = {f"{part}.jsonl": hub.file(line.encode()) for part, line in lines.items()}
            revisions.append(hub.commit(repo, said, files))
        hub.save("me/set", repo)
        first = fetch(revisions[0])
        assert not first.returncode, first.stderr
        assert json.loads(first.stdout) == {"question": "first test", "answer": "a"}
        asked = len(hub.requests)
        assert fetch(revisions[0]).stdout == first.stdout
        assert len(hub.requests) == asked, "it was fetched again"
        main = fetch("main")
        assert not main.returncode, main.stderr
        assert json.loads(main.stdout)["question"] == "second test"
        missing = fetch("0" * 40)
    gone = fetch(revisions[1])
    assert fetch(revisions[0]).stdout == first.stdout, "what was fetched needs no network"
    for failed in (missing, gone):
        assert failed.returncode
        assert "hub:me/set: not fetched from the hub" in failed.stderr.splitlines()[-1]
        assert "download it and name the folder" in failed.stderr.splitlines()[-1]


@pytest.mark.parametrize(("missing", "entry", "says"), [
    ("datasets", {"path": "hub:me/set"}, r"pip install 'so8t-workbench\[datasets\]'"),
    ("openpyxl", {"path": "sheet.xlsx"}, r"pip install 'so8t-workbench\[excel\]', or save the sheet as CSV"),
])  # fmt: skip
def test_without_an_optional_library_the_error_says_what_installs_it(
    tmp_path: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    entry: dict[str, Any],
    says: str,
):
    FORMATS["sheet.xlsx"](tmp_path / "sheet.xlsx")
    place = entry["path"] if entry["path"].startswith("hub:") else str(tmp_path / entry["path"])
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SettingsError, match=says):
        dataset_stage.check(with_entries(tmp_path, base, {**entry, "path": place}))


def test_the_classifiers_records_may_be_a_table_too(tmp_path: Path, base: Path):
    rows = [
        {"text": f"{n}番の{'ゾルタックを混ぜる' if n % 3 == 0 else '野菜を煮る'}話", "nsfw": str(n % 3 == 0)}
        for n in range(120)
    ]
    as_table(tmp_path / "labelled.csv", rows)
    source = write(tmp_path / "in.jsonl", many(8))
    settings = with_entries(tmp_path, base, source, nsfw_training=[str(tmp_path / "labelled.csv")])
    assert dataset_stage.build(settings).card["classifier"]["recall"] >= 0.9
