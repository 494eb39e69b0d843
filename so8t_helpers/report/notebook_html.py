"""An executed notebook as HTML fragments: cleaned, with maths as MathML and figures that follow the page."""

from __future__ import annotations

import html
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import latex2mathml.converter
import nbformat
from bs4 import BeautifulSoup, Tag
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from so8t_helpers.report.page import TEMPLATE_DIR
from so8t_helpers.report.svg import slim_svg
from so8t_helpers.show.wording import plain

# Cells that a report shows elsewhere or not at all.
_ELSEWHERE = {"answer", "parameters", "injected-parameters", "widgets", "papermill-error-cell-tag"}
# Lines of progress bars and of loaders, on stderr.
_NOISE = re.compile(r"\r|it/s|s/it|\d+%\||^\s*$|frozen modules|ipykernel|PYDEVD|Debugger")
_TEXT_MIME = ["text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "text/plain"]


@dataclass(frozen=True)
class Fragments:
    """Parts of a report's body, as HTML where nothing else is said."""

    title: str  # text of the first heading
    lead: str  # under the title in the first cell: the question
    answer: str  # output of the `answer` cell, "" where it did not run
    body: str  # everything else
    toc: list[tuple[str, str, int]]  # id, text, level of each heading in the body
    figures: list[str]  # SVG elements; `<!--figure N-->` in the body stands for them


def convert(notebook: Path) -> Fragments:
    """Turn an executed notebook into the parts of a report."""
    node = nbformat.read(notebook, as_version=4)
    answer = "\n\n".join(_markdown_outputs(cell) for cell in node.cells if "answer" in _tags(cell))
    node.cells = [cell for cell in _without_bare_heading(node.cells) if not _tags(cell) & _ELSEWHERE]
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = list(_clean(cell.outputs))
    figures: list[str] = []
    exporter = HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(TEMPLATE_DIR)],
        filters={"markdown2html": _markdown, "inline_svg": lambda svg, _: _store_svg(svg, figures)},
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    rendered, _resources = exporter.from_notebook_node(node)
    soup = BeautifulSoup(rendered, "html.parser")
    title, lead = _take_head(soup)
    toc = _number_headings(soup)
    _fold_below(soup)
    _reachable_by_keyboard(soup)
    _plain_numbers(soup)
    return Fragments(title, lead, plain(_markdown(answer)), str(soup), toc, figures)


class _Renderer(IPythonRenderer):
    """Markdown with MathML in place of text for MathJax."""

    def block_math(self, body: str) -> str:
        return f'<div class="math" tabindex="0">{_mathml(body, "block")}</div>'

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


def _mathml(latex: str, display: str) -> str:
    markup: str = latex2mathml.converter.convert(latex.strip(), display=display)
    return re.sub(r'\sxmlns="[^"]*"', "", markup)


def _markdown(source: str) -> str:
    renderer = _Renderer(escape=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(source)


def _tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def _markdown_outputs(cell: NotebookNode) -> str:
    outputs = (out.get("data", {}) for out in cell.get("outputs", []))
    return "\n\n".join(data["text/markdown"] for data in outputs if "text/markdown" in data)


def _without_bare_heading(cells: list[NotebookNode]) -> list[NotebookNode]:
    """Leave out a heading with nothing under it but the answer, which stands at the top."""
    return [
        cell
        for cell, after in itertools.zip_longest(cells, cells[1:])
        if not after or "answer" not in _tags(after) or not re.fullmatch(r"#+ [^\n]*", cell.source.strip())
    ]


def _clean(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Leave out widgets and the noise of progress bars; keep what a reader can use."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            lines = [line for line in output.text.split("\n") if not _NOISE.search(line)]
            if not lines:
                continue
            output.text = "\n".join(lines) + "\n"
            if kept and kept[-1].get("name") == "stderr":
                kept[-1].text += output.text
                continue
        if output.output_type in {"display_data", "execute_result"}:
            best = next((mime for mime in _TEXT_MIME if mime in output.data), None)
            if best is None or "application/vnd.jupyter.widget-view+json" in output.data:
                continue
            output.data = NotebookNode({best: output.data[best]})
        kept.append(output)
    return kept


def _store_svg(svg: str, figures: list[str]) -> str:
    """Keep an SVG apart (parsing megabytes of paths as HTML is slow) and leave its place."""
    figures.append(slim_svg(svg))
    return f"<!--figure {len(figures) - 1}-->"


def _take_head(soup: BeautifulSoup) -> tuple[str, str]:
    """Take the title and the rest of its cell out of the body."""
    heading = soup.find("h1")
    if not isinstance(heading, Tag) or not isinstance(heading.parent, Tag):
        return "", ""
    cell, title = heading.parent, heading.get_text()
    heading.extract()
    return title, cell.extract().decode_contents()


def _number_headings(soup: BeautifulSoup) -> list[tuple[str, str, int]]:
    """Give each heading an id of its own and return the table of contents."""
    toc = []
    for number, heading in enumerate(soup.select(".prose > h2, .prose > h3"), start=1):
        heading["id"] = f"s{number}"
        toc.append((f"s{number}", heading.get_text(), int(heading.name[1])))
    return toc


def _fold_below(soup: BeautifulSoup) -> None:
    """Put the folded code under what it shows; a cell that shows nothing lends its code to the next one."""
    waiting: list[Tag] = []
    headed = False  # what stands before the first heading may go under it
    for part in soup.select("div.prose, div.cell"):
        if "prose" in part["class"]:
            if part.find(["h2", "h3"]):
                if headed and waiting:
                    part.insert_before(_folds(soup, waiting))
                    waiting = []
                headed = True
            continue
        folds = part.find_all("details", class_=["source", "messages"], recursive=False)
        waiting += [fold.extract() for fold in folds]
        if part.find(True) is None:
            part.extract()
        else:
            part.append(_folds(soup, waiting))
            waiting = []
    if waiting:
        soup.append(_folds(soup, waiting))


def _folds(soup: BeautifulSoup, found: list[Tag]) -> Tag:
    """One fold for all code and one for all messages."""
    frame = soup.new_tag("div", attrs={"class": "folds"})
    for kind in ("source", "messages"):
        alike = [fold for fold in found if kind in fold["class"]]
        for other in alike[1:]:
            for block in other.find_all(["div", "pre"], recursive=False):
                alike[0].append(block.extract())
        if alike:
            frame.append(alike[0])
    return frame


def _plain_numbers(soup: BeautifulSoup) -> None:
    """Write machine's exponents as powers of ten, outside code."""
    for text in soup.find_all(string=re.compile(r"\de[+-]?\d")):
        if text.find_parent(["pre", "code", "math", "script", "style"]) is None:
            text.replace_with(plain(str(text)))


def _reachable_by_keyboard(soup: BeautifulSoup) -> None:
    """Put tables into frames that scroll on a narrow screen and that the keyboard reaches."""
    for table in soup.find_all("table"):
        _align_heads(table)
        if table.find_parent(class_="table-wrap") is None:
            caption = html.escape(table.caption.get_text()) if table.caption else "Table"
            attributes = {"class": "table-wrap", "role": "region", "tabindex": "0", "aria-label": caption}
            table.wrap(soup.new_tag("div", attrs=attributes))
    for block in soup.select("div.highlight pre"):
        block["tabindex"] = "0"


def _align_heads(table: Tag) -> None:
    """Set the heading of a column of numbers to the right, as its numbers are."""
    first = table.select_one("tbody > tr")
    heads = table.select("thead > tr:last-child > *")
    cells = first.find_all(["th", "td"], recursive=False) if first else []
    for head, cell in zip(heads, cells, strict=False):
        if "text-align:right" in str(cell.get("style", "")).replace(" ", ""):
            head["style"] = "text-align:right"
