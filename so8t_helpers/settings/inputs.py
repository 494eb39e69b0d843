"""An entry of `dataset.inputs`: a plain path, or a mapping that says how the files there are to be read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from so8t_helpers.settings.types import Place, Section

PLAIN, ENTRY = "plain", "entry"  # what stands for the two kinds among the parts of an error's place


# YAML reads these as a truth where they stand without quotes; a file may hold the word.
_TRUTHS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def value_key(value: Any) -> str | None:
    """Return how a label's value is looked up in `labels`; None: it is no scalar.

    That is its text in lower case; 1.0 is 1, and yes is true.
    """
    if not isinstance(value, str | int | float):
        return None
    text = str(value).strip().lower()
    return _TRUTHS.get(text, text.removesuffix(".0"))


def _text_keys(labels: Any) -> Any:
    """YAML reads 0 and yes as a number and a truth: what `labels` maps are texts."""
    return {value_key(key) or key: label for key, label in labels.items()} if type(labels) is dict else labels


class InputEntry(Section):
    """One entry of `dataset.inputs`; what is not said is found out from the files."""

    path: Place  # a file, glob or folder, or hub:owner/name
    format: Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "xlsx"] | None = None
    encoding: Place | None = None  # of text files, as Python names it
    # What our fields are called there ({question: 問}); a list names the columns of a table without a head.
    columns: dict[str, Place] | list[Place] = Field(default_factory=dict)
    label: Place | None = None  # of all its records; with `labels`, of those whose own is empty
    # What the values of the label mean: {0: ALLOW}.
    labels: Annotated[dict[str, Place], BeforeValidator(_text_keys)] = Field(default_factory=dict)
    licence: Place | None = None  # of records that name none
    source: Place | None = None  # where they come from, for rows and card
    group: Place | None = None  # the column whose records stay on one side of the split
    split: Place | None = None  # of a `datasets` folder or a hub data set
    revision: Place | None = None  # of a hub data set
    subset: Place | None = None  # of a hub data set that has several configurations


def _kind(value: Any) -> str:
    return PLAIN if isinstance(value, str) else ENTRY


Input = Annotated[Annotated[Place, Tag(PLAIN)] | Annotated[InputEntry, Tag(ENTRY)], Discriminator(_kind)]
