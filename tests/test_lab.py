"""The explorer in a real JupyterLab, in Chromium: a person's sliders and buttons change the figure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page

from benchmarks.lab_browser import chromium, explorer_copy, run_explorer, running_lab
from so8t_helpers.settings import Settings

pytestmark = pytest.mark.slow
WHAT_IF = 2  # its picture, after those of the explorer's two runs


@pytest.fixture(scope="module")
def lab(demo_run: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """JupyterLab on a copy of the notebook that looks at the demo run; gives its address."""
    home = tmp_path_factory.mktemp("lab")
    explorer_copy(home, demo_run.run_dir.parent, demo_run.run.name)
    with running_lab(home, tmp_path_factory.mktemp("lab-settings")) as address:
        yield address


@pytest.fixture(scope="module")
def page(lab: str) -> Iterator[Page]:
    """The notebook, opened and run to its end."""
    with chromium() as browser:
        yield run_explorer(browser, lab)


def picture(page: Page, which: int = 0) -> str | None:
    return page.locator("img.widget-image").nth(which).get_attribute("src")


def wait_for_other_picture(page: Page, before: str | None, which: int = 0) -> None:
    page.wait_for_function(
        "([which, before]) => document.querySelectorAll('img.widget-image')[which].src !== before",
        arg=[which, before],
    )


def test_no_cell_failed(page: Page):
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator("text=Traceback").count() == 0


def test_the_figure_is_a_picture_that_shows(page: Page):
    width = page.evaluate("document.querySelector('img.widget-image').naturalWidth")
    assert width > 1000


@pytest.mark.parametrize(("which", "key"), [(0, "ArrowLeft"), (1, "ArrowLeft"), (2, "ArrowLeft")])
def test_each_slider_changes_the_figure(page: Page, which: int, key: str):
    page.locator(".moved button").first.click()  # somewhere no slider stands at its end
    before = picture(page)
    handle = page.locator(".explorer .noUi-handle").nth(which)
    handle.focus()
    handle.press(key)
    wait_for_other_picture(page, before)


def test_a_click_goes_to_a_block_that_moved(page: Page):
    buttons = page.locator(".moved button")
    buttons.nth(0).click()
    before = picture(page)
    wanted = buttons.nth(3).inner_text()
    buttons.nth(3).click()
    wait_for_other_picture(page, before)
    layer, block = wanted.split("·")
    # The note is drawn after the picture: wait for it too.
    page.locator(f".note >> text=Layer {layer}, block {block}").wait_for()


def test_a_second_run_stands_beside_the_first(page: Page):
    page.locator(".explorer select").nth(1).select_option("demo")
    page.locator("img.widget-image").nth(1).wait_for(state="visible")
    page.wait_for_function("document.querySelectorAll('img.widget-image')[1].naturalWidth > 1000")


def wait_for_readout(page: Page, text: str) -> None:
    """Wait until the slider stands there: the kernel answers a click in its own time."""
    page.wait_for_function(
        "t => document.querySelector('.what-if .widget-readout').innerText === t", arg=text
    )


def test_turning_the_gates_changes_the_picture_and_the_answer(page: Page):
    page.locator(".what-if button >> text=off (0)").click()
    wait_for_readout(page, "0")
    before = picture(page, WHAT_IF)
    page.locator(".what-if button >> text=doubled (2)").click()
    wait_for_readout(page, "2")
    wait_for_other_picture(page, before, WHAT_IF)
    page.locator(".what-if button >> text=answer at all four").click()
    page.wait_for_function("document.querySelectorAll('.what-if pre').length === 4")
    page.locator(".what-if button:enabled >> text=answer at this t").wait_for()
    assert all(page.locator(".what-if pre").all_inner_texts())
