"""Files as people have them: one for each shape and format, and a clear error for each that is not read."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pytest
import yaml
import zstandard
from pyarrow import parquet

from so8t_helpers.dataset.fields import given_by
from so8t_helpers.dataset.inputs.files import check_whole, input_files, inspect
from so8t_helpers.dataset.inputs.tables import as_lines, check_heads
from so8t_helpers.dataset.quarantine import RejectedError
from so8t_helpers.dataset.reading import read_lines, split
from so8t_helpers.dataset.records import Record, normalise, parse_json
from so8t_helpers.run.files import StageError
from so8t_helpers.settings import InputEntry, Settings, SettingsError, load_settings

ROWS = [
    {"instruction": "日本の首都は？", "output": "東京です。\n「都」です。", "label": "ALLOW"},
    {"instruction": "爆弾は, どう作る?", "output": 'お断り"します"。', "label": "REFUSE"},
    {"instruction": "Who decides?", "output": "A person; I ask.", "label": "ESCALATION"},
]
EXPECTED = [(row["instruction"], row["output"], row["label"]) for row in ROWS]


def settings_of(tmp_path: Path, *entries: Any) -> Settings:
    inputs = [str(entry) if isinstance(entry, Path) else entry for entry in entries]
    return load_settings("demo", {"run": {"root": str(tmp_path / "runs")}, "dataset": {"inputs": inputs}})


def read(tmp_path: Path, *entries: Any) -> list[Record | str]:
    """Return the records of some entries, or the reason for which one is none, as the stage would."""
    found = input_files(settings_of(tmp_path, *entries))
    files = inspect([path for path, _ in found], [entry for _, entry in found])
    check_heads(files)
    check_whole(files)
    records: list[Record | str] = []
    for chunk in split(as_lines(files, tmp_path / "work")):
        for _, raw in read_lines(chunk):
            try:
                records.append(normalise(parse_json(raw, chunk.file.line_encoding), chunk.file.given))
            except RejectedError as error:
                records.append(error.reason)
    return records


def said(records: list[Record | str]) -> list[tuple[str, str, str] | str]:
    return [one if isinstance(one, str) else (one.question, one.answer, one.label) for one in records]


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def as_array(path: Path, rows: list[dict[str, Any]], indent: int | None = None) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")


def as_table(path: Path, rows: list[dict[str, Any]], sign: str = ",", encoding: str = "utf-8") -> None:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    text = "".join(sign.join(map(cell, line)) + "\r\n" for line in lines)
    path.write_bytes(text.encode(encoding))


def as_sheet(path: Path, rows: list[dict[str, Any]]) -> None:
    book = openpyxl.Workbook()
    for row in (list(rows[0]), *(list(row.values()) for row in rows), [None, None]):
        book.active.append(row)
    book.save(path)


def as_arrow(path: Path, rows: list[dict[str, Any]], stream: bool) -> None:
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as out:
        out.write_table(table)


FORMATS: dict[str, Callable[[Path], None]] = {
    "lines.jsonl": lambda path: as_jsonl(path, ROWS),
    "lines.txt": lambda path: as_jsonl(path, ROWS),
    "lines.json": lambda path: as_jsonl(path, ROWS),
    "array.json": lambda path: as_array(path, ROWS),
    "indented.json": lambda path: as_array(path, ROWS, 2),
    "array.jsonl": lambda path: as_array(path, ROWS, 2),
    "under-a-key.json": lambda path: path.write_text(
        json.dumps({"version": {"of": [1, 2]}, "data": ROWS, "more": 1}, indent=1), encoding="utf-8"
    ),
    "one-after-the-other.json": lambda path: path.write_text(
        "\n".join(json.dumps(row, indent=4) for row in ROWS), encoding="utf-8"
    ),
    "commas.csv": lambda path: as_table(path, ROWS),
    "semicolons.csv": lambda path: as_table(path, ROWS, ";"),
    "bom.csv": lambda path: as_table(path, ROWS, encoding="utf-8-sig"),
    "shift-jis.csv": lambda path: as_table(path, ROWS, encoding="cp932"),
    "euc-jp.csv": lambda path: as_table(path, ROWS, encoding="euc_jp"),
    "utf-16.csv": lambda path: as_table(path, ROWS, encoding="utf-16"),
    "tabs.tsv": lambda path: as_table(path, ROWS, "\t"),
    "table.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(ROWS), path),
    "file.arrow": lambda path: as_arrow(path, ROWS, stream=False),
    "stream.arrow": lambda path: as_arrow(path, ROWS, stream=True),
    "sheet.xlsx": lambda path: as_sheet(path, ROWS),
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_as_it_is(tmp_path: Path, name: str):
    FORMATS[name](tmp_path / name)
    assert said(read(tmp_path, tmp_path / name)) == EXPECTED


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    "name", ["lines.jsonl", "indented.json", "commas.csv", "table.parquet", "sheet.xlsx"]
)
def test_every_format_may_be_packed(tmp_path: Path, name: str, packing: str):
    FORMATS[name](tmp_path / name)
    packed = tmp_path / "packed" / f"{name}{packing}"
    packed.parent.mkdir()
    packed.write_bytes(PACKINGS[packing]((tmp_path / name).read_bytes()))
    assert said(read(tmp_path, packed)) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp932", "euc_jp", "iso2022_jp", "utf-16", "utf-16-le"])
def test_lines_of_json_may_have_any_encoding_that_japanese_has(tmp_path: Path, encoding: str):
    path = tmp_path / "in.jsonl"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    path.write_bytes(lines.encode(encoding))
    assert said(read(tmp_path, path)) == EXPECTED


def test_a_folder_is_all_data_in_it_and_nothing_that_is_hidden_or_left_over(tmp_path: Path):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for n, name in enumerate(("a.jsonl", "b.csv", "deep/c.parquet", "d.json")):
        row = ROWS[0] | {"instruction": name}
        {"csv": as_table, "parquet": lambda p, rows: parquet.write_table(pa.Table.from_pylist(rows), p)}.get(
            name.rpartition(".")[2], as_jsonl
        )(folder / name, [row])
        assert len(said(read(tmp_path, folder))) == n + 1
    for name in ("a.jsonl.bak", ".a.jsonl", ".hidden/x.jsonl", "a.jsonl~", "notes.txt", "dataset_info.json"):
        (folder / name).write_text("no data", encoding="utf-8")
    assert [one.question for one in read(tmp_path, folder) if isinstance(one, Record)] == [
        *("a.jsonl", "b.csv", "d.json", "deep/c.parquet")
    ]
    assert len(read(tmp_path, folder / "*.jsonl*")) == 1


CHAT = [{"role": "user", "content": "首都は"}, {"role": "assistant", "content": "東京です。"}]
MORE = [*CHAT, {"role": "user", "content": "人口は"}, {"role": "assistant", "content": "約1400万人です。"}]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in MORE
]
ONE = ((), "首都は", "東京です。")
TWO = (("首都は", "東京です。"), "人口は", "約1400万人です。")
SHAPES: dict[str, tuple[dict[str, Any], tuple[tuple[str, ...], str, str], dict[str, Any]]] = {
    "alpaca": (
        {"instruction": "首都は", "input": "日本", "output": "東京です。"},
        ((), "首都は\n日本", "東京です。"),
        {},
    ),
    "dolly": (
        {"instruction": "首都は", "context": "", "response": "東京です。", "category": "closed_qa"},
        ONE,
        {"domain": "closed_qa"},
    ),
    "input and output": ({"input": "首都は", "output": "東京です。"}, ONE, {}),
    "question and answer": ({"question": "首都は", "answer": "東京です。"}, ONE, {}),
    "Q and A": ({"Q": "首都は", "A": "東京です。"}, ONE, {}),
    "質問 and 回答": ({"質問": "首都は", "回答": "東京です。"}, ONE, {}),
    "問題 and 解答": ({"問題": "首都は", "解答": "東京です。"}, ONE, {}),
    "openai": ({"messages": CHAT}, ONE, {"group": None}),
    "openai, system": (
        {"messages": [{"role": "developer", "content": "短く"}, *CHAT]},
        ONE,
        {"system": "短く"},
    ),
    "openai, several turns": ({"messages": MORE}, TWO, {"group": "首都は\n東京です。"}),
    "openai, a last question without answer": ({"messages": [*MORE, CHAT[0]]}, TWO, {}),
    "openai, two in a row": (
        {"messages": [CHAT[0], CHAT[0], CHAT[1]]},
        ((), "首都は\n首都は", "東京です。"),
        {},
    ),
    "sharegpt": ({"conversations": SHAREGPT, "system": "短く"}, TWO, {"system": "短く"}),
    "utterances": (
        {"utterances": [{"name": "user", "text": "首都は"}, {"name": "agent", "text": "東京です。"}]},
        ONE,
        {},
    ),
    "trl, texts": ({"prompt": "首都は", "completion": "東京です。"}, ONE, {}),
    "trl, messages": ({"prompt": MORE[:3], "completion": MORE[3:]}, TWO, {}),
    "trl, text and messages": ({"prompt": "首都は", "completion": CHAT[1:]}, ONE, {}),
    "llama-factory": (
        {"instruction": "人口は", "output": "約1400万人です。", "history": [["首都は", "東京です。"]]},
        TWO,
        {"group": "首都は\n東京です。"},
    ),
    "dpo, texts": ({"prompt": "首都は", "chosen": "東京です。", "rejected": "大阪です。"}, ONE, {}),
    "dpo, messages": ({"prompt": MORE[:3], "chosen": MORE[3:], "rejected": CHAT[1:]}, TWO, {}),
    "dpo, the whole chat": ({"prompt": "首都は", "chosen": CHAT, "rejected": CHAT}, ONE, {}),
    "dpo, without prompt": ({"chosen": MORE, "rejected": CHAT}, TWO, {}),
    "dpo, sharegpt": (
        {"conversations": SHAREGPT[:3], "chosen": SHAREGPT[3], "rejected": SHAREGPT[1]},
        TWO,
        {},
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: 首都は\n\nAssistant: 東京です。"
            "\n\nHuman: 人口は\n\nAssistant: 約1400万人です。",
            "rejected": "\n\nHuman: 首都は\n\nAssistant: 大阪です。",
        },
        TWO,
        {},
    ),
    "squad": (
        {
            "title": "東京",
            "context": "首都は東京。",
            "question": "首都は",
            "answers": {"text": ["東京です。", "東京"], "answer_start": [3, 3]},
        },
        ((), "首都は\n首都は東京。", "東京です。"),
        {"group": "東京"},
    ),
    "squad, a list": (
        {"context": "首都は東京。", "question": "首都は", "answers": [{"text": "東京です。"}]},
        ((), "首都は\n首都は東京。", "東京です。"),
        {"group": "首都は東京。"},
    ),
    "a thought": (
        {"question": "首都は", "answer": "<think>\n日本の話。\n</think>\n\n東京です。"},
        ONE,
        {"reasoning": "日本の話。"},
    ),
    "a thought without its opening": (
        {"question": "首都は", "answer": "日本の話。</think>東京です。"},
        ONE,
        {"reasoning": "日本の話。"},
    ),
    "no thought": (
        {"question": "首都は", "answer": "<think>\n\n</think>\n\n東京です。"},
        ONE,
        {"reasoning": ""},
    ),
    "thoughts in a dialogue": (
        {
            "messages": [
                CHAT[0],
                {"role": "assistant", "content": "<think>日本。</think>東京です。"},
                MORE[2],
                {"role": "assistant", "content": "<think>都の話。</think>約1400万人です。"},
            ]
        },
        TWO,
        {"reasoning": "都の話。"},
    ),
    "a group of its own": ({"question": "首都は", "answer": "東京です。", "group": 7}, ONE, {"group": "7"}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_found_by_itself(tmp_path: Path, shape: str):
    data, (history, question, answer), more = SHAPES[shape]
    for name, write in (("in.jsonl", as_jsonl), ("in.parquet", None)):
        row = {**data, "label": "ALLOW"}
        if write is None:  # what is a table keeps its nested columns
            parquet.write_table(pa.Table.from_pylist([row]), tmp_path / name)
        else:
            write(tmp_path / name, [row])
        (record,) = read(tmp_path, tmp_path / name)
        assert isinstance(record, Record), record
        assert (record.history, record.question, record.answer) == (history, question, answer)
        assert {key: getattr(record, key) for key in more} == more


def test_squads_own_files_are_articles_whose_questions_are_records(tmp_path: Path):
    def asked(question: str, *answers: str) -> dict[str, Any]:
        return {"question": question, "answers": [{"text": text} for text in answers], "label": "ALLOW"}

    paragraphs = [{"context": "首都は東京。", "qas": [asked("首都は", "東京"), asked("人口は")]}]
    data = {"version": "1.1", "data": [{"title": "日本", "paragraphs": paragraphs}]}
    (tmp_path / "squad.json").write_text(json.dumps(data), encoding="utf-8")
    first, second = read(tmp_path, tmp_path / "squad.json")
    assert isinstance(first, Record)
    assert (first.question, first.answer, first.group) == ("首都は\n首都は東京。", "東京", "日本")
    assert second == "empty_answer"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([CHAT[1], *MORE], "unknown_shape"),  # the assistant begins
        ([CHAT[0]], "unknown_shape"),
        ([CHAT[0], {"role": "tool", "content": "{}"}, CHAT[1]], "unknown_shape"),
        ([CHAT[0], {"role": "assistant", "content": ""}, *MORE[2:]], "unknown_shape"),
        ([{"role": "user", "content": ""}, CHAT[1]], "empty_question"),
        ([CHAT[0], {"role": "assistant", "content": None}], "empty_answer"),
    ],
)
def test_a_dialogue_that_cannot_be_trained_has_its_reason(tmp_path: Path, turns: Any, reason: str):
    as_jsonl(tmp_path / "in.jsonl", [{"messages": turns, "label": "ALLOW"}])
    assert read(tmp_path, tmp_path / "in.jsonl") == [reason]


def test_an_entry_says_what_its_columns_and_labels_mean(tmp_path: Path):
    rows = [
        {"問": "一は", "答え文": "いち", "判断": 0, "meta": {"title": "数"}, "licence": "MIT"},
        {"問": "二は", "答え文": "に", "判断": "1", "meta": {"title": "数"}},
        {"問": "三は", "答え文": "さん", "判断": 2.0, "meta": None},
        {"問": "四は", "答え文": "よん", "判断": 9},
        {"問": "五は", "答え文": "ご", "判断": None},
    ]
    as_jsonl(tmp_path / "in.jsonl", rows)
    entry = {
        "path": str(tmp_path / "in.jsonl"),
        "columns": {"question": "問", "answer": "答え文", "label": "判断"},
        "labels": {0: "ALLOW", 1: "ESCALATION", 2: "拒否"},
        "licence": "CC0-1.0",
        "source": "https://example.org/numbers",
        "group": "meta.title",
    }
    *good, unnamed, empty = read(tmp_path, entry)
    assert said(good) == [("一は", "いち", "ALLOW"), ("二は", "に", "ESCALATION"), ("三は", "さん", "REFUSE")]
    assert [(one.licence, one.group, one.source) for one in good if isinstance(one, Record)] == [
        ("MIT", "数", "https://example.org/numbers"),
        ("CC0-1.0", "数", "https://example.org/numbers"),
        ("CC0-1.0", None, "https://example.org/numbers"),
    ]
    assert (unnamed, empty) == ("unknown_label", "missing_label")
    # With a label for those that have none, and with one for all.
    assert said(read(tmp_path, entry | {"label": "DENY"}))[3:] == ["unknown_label", ("五は", "ご", "DENY")]
    whole = {**entry, "labels": {}, "label": "allow"}
    assert [one.label for one in read(tmp_path, whole) if isinstance(one, Record)] == ["ALLOW"] * 5


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        ("{0: ALLOW, 1: REFUSE}", [(0, 1), ("0", "1"), (0.0, 1.0), (" 0 ", "1.0")]),
        ("{no: ALLOW, yes: REFUSE}", [(False, True), ("no", "Yes"), ("False", "TRUE")]),
        ("{false: ALLOW, true: REFUSE}", [(False, True), ("false", "True"), ("No", "yes")]),
        ("{安全: ALLOW, Unsafe: REFUSE}", [("安全", "unsafe"), (" 安全", "UNSAFE")]),
    ],
)
def test_a_labels_value_is_found_however_yaml_and_the_file_write_it(labels: str, values: list[Any]):
    entry = InputEntry(path="x", labels=yaml.safe_load(labels))
    for pair in values:
        rows = [{"question": "首都は", "answer": "東京", "label": value} for value in pair]
        assert [normalise(row, given_by(entry)).label for row in rows] == ["ALLOW", "REFUSE"]


def test_a_number_typed_into_a_sheet_is_a_text(tmp_path: Path):
    as_sheet(tmp_path / "in.xlsx", [{"question": "六かける七は", "answer": 42, "label": "ALLOW"}])
    assert said(read(tmp_path, tmp_path / "in.xlsx")) == [("六かける七は", "42", "ALLOW")]


def test_a_number_is_no_label_until_its_entry_says_what_it_means(tmp_path: Path):
    for value in (0, "1", 2.0, 3):
        with pytest.raises(RejectedError, match=r"labels: \{0: ALLOW, 1: ESCALATION, 2: DENY, 3: REFUSE\}"):
            normalise({"question": "首都は", "answer": "東京", "label": value})


def test_a_table_without_a_head_has_its_columns_named(tmp_path: Path):
    (tmp_path / "in.csv").write_text("首都は,東京,ALLOW\n人口は,1400万,ALLOW,too,many\n", encoding="utf-8")
    entry = {"path": str(tmp_path / "in.csv"), "columns": ["question", "answer", "label"]}
    assert said(read(tmp_path, entry)) == [("首都は", "東京", "ALLOW"), "not_an_object"]


def test_an_entry_that_says_more_wins_over_a_glob(tmp_path: Path):
    as_jsonl(tmp_path / "a.jsonl", [{"question": "首都は", "answer": "東京"}])
    as_jsonl(tmp_path / "b.jsonl", [{"question": "人口は", "answer": "1400万", "label": "DENY"}])
    entry = {"path": str(tmp_path / "a.jsonl"), "label": "ALLOW"}
    for entries in ((tmp_path / "*.jsonl", entry), (entry, tmp_path / "*.jsonl")):
        assert [one[2] for one in said(read(tmp_path, *entries))] == ["ALLOW", "DENY"]


def test_values_that_json_does_not_know_are_texts(tmp_path: Path):
    row = ROWS[0] | {"when": datetime.date(2026, 11, 27), "bytes": b"\xff", "share": float("nan")}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "in.parquet")
    assert said(read(tmp_path, tmp_path / "in.parquet")) == EXPECTED[:1]


def test_bytes_that_are_none_of_the_encoding_cost_one_record_of_a_table(tmp_path: Path):
    as_table(tmp_path / "in.csv", ROWS)
    broken = (tmp_path / "in.csv").read_bytes().replace("日本".encode(), b"\xe6\x97", 1)
    (tmp_path / "in.csv").write_bytes(broken)
    assert said(read(tmp_path, tmp_path / "in.csv")) == ["bad_encoding", *EXPECTED[1:]]


TEXT = b"This is a text.\nIt has no records.\n"
UNREAD: dict[str, tuple[bytes, str]] = {
    "text.txt": (TEXT, r"text\.txt: looks like plain text.*- \{path: .*text\.txt, format: csv, columns: \["),
    "table.txt": (b"a\tb\n1\t2\n", r"looks like a table with tabs .*format: tsv"),
    "commas.txt": (b"a,b\n1,2\n", r"looks like a table with commas .*format: csv"),
    "unknown.csv": (b"x,y z\n", r"none of its columns is known \('x', 'y z'\); .*question: x, answer: y z\}"),
    "book.pdf": (b"%PDF-1.7\n%\xe2\xe3", r"book\.pdf: a PDF document \(it begins with b'%PDF-1\.7"),
    "old.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 9, r"an old Office file.*save it as \.xlsx"),
    "records.zip": (b"PK\x03\x04" + bytes(60), "a zip archive.*unpack it"),
    "records.tar": (bytes(257) + b"ustar" + bytes(300), "a tar archive.*unpack it"),
    "rows.sqlite": (b"SQLite format 3\0" + bytes(80), "an SQLite database.*export its table as CSV"),
    "rows.pkl": (b"\x80\x04\x95" + bytes(20), "a Python pickle"),
    "page.jsonl": (b"\n<!DOCTYPE html><html>", "an HTML or XML page.*failed download"),
    "page.csv": (b"<html>a,b", "an HTML or XML page"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer.*git lfs pull"),
    "noise.bin": (bytes(range(128, 256)) * 3, r"noise\.bin: a file of an unknown kind \(it begins with"),
    "cut.json": (b'[{"question": "a", "answer": "b"}, {"quest', r"cut\.json: .*after 1 records is no JSON"),
    "open.json": (b'[{"question": "a"}\n', r"open\.json: .*the end instead of ',' after 1 records"),
    "cut.parquet": (b"PAR1" + bytes(50), r"cut\.parquet: expected parquet"),
    "cut.arrow": (b"ARROW1\0\0" + bytes(50), r"cut\.arrow: expected arrow"),
    "cut.xlsx": (b"PK\x03\x04" + bytes(50), r"cut\.xlsx: expected xlsx"),
    "cut.csv.gz": (gzip.compress(b"question,answer\na,b\n" * 9)[:-9], r"cut\.csv\.gz: expected .*gzip"),
    "cut.jsonl.bz2": (bz2.compress(b'{"a": 1}\n' * 900)[:-9], r"cut\.jsonl\.bz2: expected .*bzip2"),
    "cut.jsonl.xz": (lzma.compress(b'{"a": 1}\n' * 900)[:-9], r"cut\.jsonl\.xz: expected .*xz"),
    "cut.jsonl.zst": (zstandard.compress(b'{"a": 1}\n' * 900)[:-3], r"cut\.jsonl\.zst: expected .*zstd"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_every_file_that_is_not_read_has_one_clear_error(tmp_path: Path, name: str):
    content, says = UNREAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((SettingsError, StageError), match=says) as caught:
        read(tmp_path, tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("table.txt", "首都は\t東京\tALLOW\n"),
        ("commas.txt", "首都は,東京,ALLOW\n"),
        ("unknown.csv", "1: 問,返し,判断\n首都は,東京,ALLOW\n"),
        ("a name, with # signs.csv", "x,y,z\n首都は,東京,ALLOW\n"),
    ],
)
def test_the_line_of_yaml_in_an_error_has_the_file_read(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, tmp_path / name)
    (line,) = re.findall(r"`- (.*?)`", str(caught.value))
    assert said(read(tmp_path, yaml.safe_load(line))) == [("首都は", "東京", "ALLOW")]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"columns": {"qestion": "q"}}, "columns has 'qestion'; did you mean 'question'"),
        ({"group": "artikel"}, r"in\.csv: has no column 'artikel'; it has 'instruction', 'output'"),
        (
            {"columns": {"question": "frage"}},
            r"in\.csv: has no column 'frage'; it has 'instruction', 'output'",
        ),
        ({"labels": {0: "maybe"}}, "'maybe' is none of ALLOW"),
        ({"label": "2"}, "'2' is none of ALLOW"),
        ({"encoding": "klingon"}, "encoding 'klingon' is none that Python knows"),
        ({"path": "nothing*.csv"}, r"no file matches .*nothing"),
        ({"path": "hub:no such"}, "expected hub:owner/name"),
    ],
)
def test_an_entry_that_cannot_be_meant_is_an_error(tmp_path: Path, entry: dict[str, Any], says: str):
    as_table(tmp_path / "in.csv", ROWS)
    with pytest.raises(SettingsError, match=says):
        read(tmp_path, {"path": str(tmp_path / "in.csv"), **entry})


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "table.parquet", "file.arrow"])
def test_a_list_of_columns_is_for_tables_without_names_alone(tmp_path: Path, name: str):
    FORMATS[name](tmp_path / name)
    with pytest.raises(SettingsError, match=rf"{name}: its columns have names of their own .*columns: \{{"):
        read(tmp_path, {"path": str(tmp_path / name), "columns": ["question", "answer", "label"]})


TRAIN_AND_TEST = {"train": ROWS[:1], "version": 1, "test": ROWS[1:]}


def test_of_several_lists_in_an_object_the_one_that_is_named_is_read(tmp_path: Path):
    for n, data in enumerate((TRAIN_AND_TEST, dict(reversed(TRAIN_AND_TEST.items())))):
        path = tmp_path / f"{n}.json"
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")
        with pytest.raises(SettingsError, match=r"records under 'train', and more under 'test'; ") as caught:
            read(tmp_path, path)
        (line,) = re.findall(r"`- (.*?)`", str(caught.value))
        assert said(read(tmp_path, yaml.safe_load(line))) == EXPECTED[:1]
        assert said(read(tmp_path, {"path": str(path), "split": "test"})) == EXPECTED[1:]
        with pytest.raises(SettingsError, match="without a list of records under 'dev', its `split`"):
            read(tmp_path, {"path": str(path), "split": "dev"})


def test_a_record_s_own_lists_are_no_file_of_records(tmp_path: Path):
    rows = [ROWS[0] | {"items": [{"name": "x"}]}, {"data": ["x"]} | ROWS[1]]
    path = tmp_path / "in.json"
    path.write_text("\n".join(json.dumps(row, indent=1) for row in rows), encoding="utf-8")
    assert said(read(tmp_path, path)) == EXPECTED[:2]
    path.write_text(json.dumps({"data": [{"name": "x"}]} | ROWS[1], indent=1), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"under 'data', and more under 'instruction', 'output'"):
        read(tmp_path, path)


def test_where_nothing_matches_the_files_that_are_there_are_named(tmp_path: Path):
    as_table(tmp_path / "in.csv", ROWS)
    with pytest.raises(SettingsError, match=r"holds in\.csv: name those, or the folder"):
        read(tmp_path, tmp_path / "*.jsonl")


def test_a_huge_array_is_read_in_constant_memory(tmp_path: Path):
    import tracemalloc

    path = tmp_path / "in.json"
    record = json.dumps(ROWS[0] | {"padding": "x" * 1000}, indent=1)
    with path.open("w", encoding="utf-8") as out:
        out.write("[" + ",\n".join([record] * 20_000) + "]")
    files = inspect([path])
    tracemalloc.start()
    (chunk, *more) = split(as_lines(files, tmp_path / "work"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chunk.lines + sum(one.lines for one in more) == 20_000
    assert peak < 12 * 2**20 < path.stat().st_size  # some blocks of a MiB, in Python's own characters


def test_entries_survive_the_way_through_a_runs_params(tmp_path: Path):
    from so8t_helpers.run.files import write_yaml

    entry = {"path": "x.csv", "labels": {0: "ALLOW", "yes": "DENY"}, "columns": {"question": "q"}}
    settings = settings_of(tmp_path, entry, "data/*.jsonl")
    write_yaml(tmp_path / "params.yaml", settings.model_dump())
    again = load_settings(tmp_path / "params.yaml")
    assert again.dataset.inputs == settings.dataset.inputs
    assert isinstance(again.dataset.inputs[0], InputEntry)
    assert again.dataset.inputs[0].labels == {"0": "ALLOW", "true": "DENY"}


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        # A column that was given to one field fills no other by its own name.
        (
            {"question": "input", "answer": "output"},
            {"input": "空の色は?", "output": "青"},
            ("空の色は?", "青"),
        ),
        ({"answer": "context"}, {"question": "空は?", "context": "青"}, ("空は?", "青")),
        ({}, {"Question": "空は?", "Answer": "青"}, ("空は?", "青")),
        ({}, {"q": "空は?", "a": "青"}, ("空は?", "青")),
        # An instruction stands before the question, unless it is the same, or the question's column is named.
        (
            {},
            {"instruction": "一語で。", "question": "色は?", "input": "空", "output": "青"},
            ("一語で。\n色は?\n空", "青"),
        ),
        ({}, {"指示": "一語で。", "質問": "空は?", "回答": "青"}, ("一語で。\n空は?", "青")),
        ({}, {"instruction": "空は?", "question": "空は?", "answer": "青"}, ("空は?", "青")),
        ({}, {"instruction": "空は?", "prompt": "### 空は?\n###", "answer": "青"}, ("空は?", "青")),
        ({"question": "問"}, {"問": "空は?", "Instruction": "Sky?", "answer": "青"}, ("空は?", "青")),
        (
            {"question": "問", "instruction": "前"},
            {"問": "空は?", "前": "一語で。", "answer": "青"},
            ("一語で。\n空は?", "青"),
        ),
        ({}, {"question": "空は?", "answer": "", "Answer": "青"}, ("空は?", "青")),
        ({}, {"Question": "海は?", "question": "空は?", "answer": "青"}, ("空は?", "青")),
        ({}, {"question": "6かける7は?", "answer": 42}, ("6かける7は?", "42")),
        # Of several answers that mean the same the first, whatever their column is called.
        (
            {"answer": "answers"},
            {"question": "何色?", "answers": {"text": ["青"], "x": [3]}},
            ("何色?", "青"),
        ),
        ({"answer": "answers"}, {"question": "何色?", "answers": [{"text": "青", "x": 3}]}, ("何色?", "青")),
        ({}, {"question": "何色?", "answer": ["青", "空色"]}, ("何色?", "青")),
        (
            {},
            {"question": "何色?", "answer": [{"type": "text", "text": "青"}, {"type": "text", "text": "。"}]},
            ("何色?", "青\n。"),
        ),
    ],
)
def test_each_column_fills_one_field(columns, row, expected, tmp_path: Path):
    as_jsonl(tmp_path / "in.jsonl", [row])
    (record,) = read(tmp_path, {"path": str(tmp_path / "in.jsonl"), "label": "ALLOW", "columns": columns})
    assert isinstance(record, Record)
    assert (record.question, record.answer, record.domain) == (*expected, None)


def test_a_quotation_that_does_not_end_swallows_no_lines(tmp_path: Path):
    lines = ["question,answer,label", '"空の色は?,青,ALLOW', *(f"{n}+1は?,{n + 1},ALLOW" for n in range(50))]
    (tmp_path / "in.csv").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(StageError, match=r"in\.csv:2: .*a quotation that does not end well"):
        read(tmp_path, tmp_path / "in.csv")


def test_what_stands_after_a_quotation_s_end_is_said_with_its_line_and_what_to_do(tmp_path: Path):
    text = 'sep=;\nquestion;answer;label\n"一\n二";"三";ALLOW\n四;"五"六;ALLOW\n'
    (tmp_path / "in.csv").write_text(text, encoding="utf-8")
    with pytest.raises(StageError, match=r'in\.csv:5: .*does not end well \(.*\); .*twice \(""\)'):
        read(tmp_path, tmp_path / "in.csv")


def test_excel_s_own_first_line_says_what_stands_between_the_cells(tmp_path: Path):
    as_table(tmp_path / "table.csv", ROWS, ";")
    (tmp_path / "in.csv").write_bytes(b"\xef\xbb\xbfsep=;\r\n" + (tmp_path / "table.csv").read_bytes())
    assert said(read(tmp_path, tmp_path / "in.csv")) == EXPECTED


def test_paragraphs_that_are_not_squad_s_are_a_record_s_own(tmp_path: Path):
    row = {"question": "空は?", "answer": "青", "label": "ALLOW", "paragraphs": [{"text": "空は青い。"}]}
    as_array(tmp_path / "in.json", [row])
    assert said(read(tmp_path, tmp_path / "in.json")) == [("空は?", "青", "ALLOW")]


@pytest.mark.parametrize(("column", "entry"), [("ticket", {"group": "ticket"}), ("group", {})])
def test_an_empty_cell_is_no_group(tmp_path: Path, column: str, entry: dict[str, str]):
    rows = [
        {"question": "空は?", "answer": "青", "label": "ALLOW", column: value} for value in ("", " ", "T1")
    ]
    as_table(tmp_path / "in.csv", rows)
    records = read(tmp_path, {"path": str(tmp_path / "in.csv"), **entry})
    assert [one.group for one in records if isinstance(one, Record)] == [None, None, "T1"]
    # A dialogue's opening and a paragraph are shared where nothing else is said.
    dialogue = {"messages": MORE, "label": "ALLOW", column: " "}
    as_jsonl(tmp_path / "in.jsonl", [dialogue])
    (record,) = read(tmp_path, {"path": str(tmp_path / "in.jsonl"), **entry})
    assert isinstance(record, Record)
    assert record.group == "首都は\n東京です。"


def test_a_renamed_squad_still_shares_its_article(tmp_path: Path):
    row = {"title": "空", "context": "空は青い。", "question": "何色?", "answers": {"text": ["青"]}}
    as_jsonl(tmp_path / "in.jsonl", [row])
    entry = {"path": str(tmp_path / "in.jsonl"), "label": "ALLOW", "columns": {"answer": "answers"}}
    (record,) = read(tmp_path, entry)
    assert isinstance(record, Record)
    assert record.group == "空"


def test_a_label_word_stands_beside_numbers_that_are_explained(tmp_path: Path):
    rows = [{"question": "空は?", "answer": "青", "label": label} for label in (0, "REFUSE", 7)]
    as_jsonl(tmp_path / "in.jsonl", rows)
    found = read(tmp_path, {"path": str(tmp_path / "in.jsonl"), "labels": {0: "ALLOW"}})
    assert [one if isinstance(one, str) else one.label for one in found] == [
        "ALLOW",
        "REFUSE",
        "unknown_label",
    ]


def test_a_flag_that_gives_the_label_still_says_that_a_record_is_unsafe(tmp_path: Path):
    as_jsonl(tmp_path / "in.jsonl", [{"question": "何?", "answer": "これ", "nsfw": True}])
    entry = {"path": str(tmp_path / "in.jsonl"), "columns": {"label": "nsfw"}, "labels": {True: "ALLOW"}}
    (record,) = read(tmp_path, entry)
    assert isinstance(record, Record)
    assert (record.label, record.flagged) == ("ALLOW", "nsfw")
