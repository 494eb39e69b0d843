"""Files that are not lines of JSON, read record by record: tables, Parquet, Arrow, Excel, arrays of JSON."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import orjson

from so8t_helpers.dataset.fields import Given, are_known
from so8t_helpers.dataset.inputs import json_values
from so8t_helpers.dataset.inputs.files import InputFile, whole
from so8t_helpers.dataset.inputs.kinds import BINARY, TABLES, quoted, suggestion
from so8t_helpers.dataset.inputs.packing import open_bytes
from so8t_helpers.run.files import StageError, remove
from so8t_helpers.settings import SettingsError

ROWS_AT_ONCE = 256
_MOST_CELL = 10 * 2**20


def as_lines(files: list[InputFile], folder: Path) -> list[InputFile]:
    """Return the files, with the records of those that are no lines of JSON written as such in `folder`.

    A record's number in its file is then its line's.

    Raises:
        SettingsError: a table none of whose columns is known, a format whose library is not installed.
        StageError: a file that is cut or damaged.
    """
    return [
        _written(file, folder / f"lines-{n:04d}") if _needs_it(file) else file for n, file in enumerate(files)
    ]


def check_heads(files: list[InputFile]) -> None:
    """Look at the columns of the tables, as far as that takes no unpacking; errors as `as_lines`."""
    for file in files:
        if file.format in TABLES and not (file.format in BINARY and file.compression != "none"):
            with whole(file), ExitStack() as stack:
                next(_records(file, file.path, stack), None)


def _needs_it(file: InputFile) -> bool:
    return file.format != "jsonl" or file.encoding.startswith("utf-16") or file.encoding.startswith("utf-32")


def _written(file: InputFile, target: Path) -> InputFile:
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    with whole(file), ExitStack() as stack, target.open("wb", 2**20) as out:
        source = file.path
        if file.format in BINARY and file.compression != "none":  # these are read here and there
            source = target.with_suffix(".unpacked")
            stack.callback(remove, source)
            with open_bytes(file.path, file.compression) as packed, source.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)
        for record in _records(file, source, stack):
            out.write(_line(record))
            out.write(b"\n")
    return replace(file, lines=target)


def _line(record: Any) -> bytes:
    if type(record) is bytes:
        return record
    try:
        return orjson.dumps(record, default=str)
    except TypeError:  # half of a character, or a number beyond 64 bits: its line is judged as any other
        try:  # bytes that were no text stand there as they were
            return json.dumps(record, default=str, ensure_ascii=False).encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return json.dumps(record, default=str).encode()


def _records(file: InputFile, source: Path, stack: ExitStack) -> Iterator[Any]:
    """Yield a file's records; what is opened is closed by `stack`."""
    if file.format == "parquet":
        yield from _parquet(file, source, stack)
    elif file.format == "arrow":
        yield from _arrow(file, source, stack)
    elif file.format == "xlsx":
        yield from _sheet(file, source, stack)
    else:
        stream = stack.enter_context(open_bytes(source, file.compression))
        encoding = "utf-8-sig" if file.bom else file.encoding
        text = io.TextIOWrapper(stream, encoding, "surrogateescape", newline="")
        if file.format == "jsonl":
            yield from (line.rstrip("\r\n").encode("utf-8", "replace") for line in text)
        elif file.format == "json":
            yield from json_values.records(text, file)
        else:
            yield from _cells(file, text)


def _cells(file: InputFile, text: IO[str]) -> Iterator[Any]:
    csv.field_size_limit(_MOST_CELL)
    first = text.readline()
    signs, before = "\t" if file.format == "tsv" else ",;\t|", 0
    if (said := first.rstrip("\r\n"))[:4].lower() == "sep=" and len(said) == 5:  # Excel's own first line
        signs, first, before = said[4], text.readline(), 1
    delimiter = max(signs, key=first.count)
    # Strict, or one quotation that does not end would swallow all lines after it.
    rows = csv.reader(_chained(first, text), delimiter=delimiter, strict=True)
    yield from _by_name(file, _quoted_well(file, rows, before))


def _quoted_well(file: InputFile, rows: Any, before: int) -> Iterator[list[str]]:
    """Yield a csv.reader's rows that hold anything; `before`: how many lines it was not given.

    Raises:
        StageError: a quotation that does not end well.
    """
    begins = 1
    try:
        for row in rows:
            if row:
                yield row
            begins = rows.line_num + 1
    except csv.Error as error:
        raise StageError(
            f"{file.path}:{begins + before}: the record that begins there has a quotation that does not end "
            f'well ({error}); within quotation marks a cell has its own ones twice (""), and ends with one'
        ) from error


def _chained(first: str, text: IO[str]) -> Iterator[str]:
    if first:
        yield first
    yield from text


def _sheet(file: InputFile, source: Path, stack: ExitStack) -> Iterator[Any]:
    try:
        from openpyxl import load_workbook  # noqa: PLC0415  (an optional extra)
    except ImportError as error:
        raise SettingsError(
            f"{file.path}: openpyxl reads Excel's files and is not installed; pip install "
            "'so8t-workbench[excel]', or save the sheet as CSV"
        ) from error
    opened = stack.enter_context(source.open("rb"))
    book = load_workbook(opened, read_only=True, data_only=True)
    stack.callback(book.close)
    rows = book.worksheets[0].iter_rows(values_only=True)
    filled = (row for row in rows if any(cell is not None for cell in row))
    # Who types 42 into a sheet may mean an answer: a number is a text, as in CSV.
    yield from _by_name(file, ([None if cell is None else str(cell) for cell in row] for row in filled))


def _by_name(file: InputFile, rows: Iterator[list[Any]]) -> Iterator[Any]:
    """Yield a table's rows as objects; one with more cells than names stays a list, which no record is."""
    listed = file.entry.columns
    names = listed if isinstance(listed, list) else [str(name or "").strip() for name in next(rows, [])]
    _check_names(file, names)
    for row in rows:
        extra = any(cell not in {None, ""} for cell in islice(row, len(names), None))
        yield row if extra else dict(zip(names, row, strict=False))


def _parquet(file: InputFile, source: Path, stack: ExitStack) -> Iterator[Any]:
    from pyarrow import parquet  # noqa: PLC0415  (tenths of a second in each process)

    table = stack.enter_context(parquet.ParquetFile(source, memory_map=True))
    _check_names(file, table.schema_arrow.names)
    for batch in table.iter_batches(ROWS_AT_ONCE, use_threads=False):
        yield from batch.to_pylist()


def _arrow(file: InputFile, source: Path, stack: ExitStack) -> Iterator[Any]:
    import pyarrow as pa  # noqa: PLC0415

    mapped = stack.enter_context(pa.memory_map(str(source)))
    try:
        table = pa.ipc.open_stream(mapped)  # what `datasets` writes
        batches = iter(table)
    except pa.ArrowInvalid:
        mapped.seek(0)
        table = pa.ipc.open_file(mapped)
        batches = (table.get_batch(i) for i in range(table.num_record_batches))
    _check_names(file, table.schema.names)
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield from batch.slice(start, ROWS_AT_ONCE).to_pylist()


def _check_names(file: InputFile, names: list[str]) -> None:
    """Raise SettingsError: a table without a column that is known, or without one that its entry names."""
    given = file.given or Given()
    for column in filter(None, (*(column for _, column in given.columns), given.group)):
        if column not in names and column.partition(".")[0] not in names:
            raise SettingsError(f"{file.path}: has no column {column!r}; it has {_listed(names)}")
    if not are_known(names, given):
        which = zip(("question", "answer", "label"), names, strict=False)
        columns = ", ".join(f"{field}: {quoted(name[:40])}" for field, name in which)
        line = suggestion(file.path, file.entry, f"columns: {{{columns}}}")
        plain = "; for a table without names in its first line `columns: [question, answer, label]`"
        also = plain if file.format not in {"parquet", "arrow"} else ""
        raise SettingsError(
            f"{file.path}: none of its columns is known ({_listed(names)}); {line} (by their order){also}"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:12])
    return f"{shown}, …" if len(names) > 12 else shown
