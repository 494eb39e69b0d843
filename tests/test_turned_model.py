"""Turning the gates: the algebra on tensors, and a small model whose o_proj really changes."""

import json
from pathlib import Path

import pytest
import torch

from so8t_helpers.explore import figures as plots
from so8t_helpers.explore.turned_model import (
    POWERS,
    TurnedModel,
    quantisation_error,
    relative_change,
    rotated,
)
from so8t_helpers.explore.widgets import WhatIf
from so8t_helpers.run.files import StageError, write_yaml
from so8t_helpers.settings import validate
from so8t_helpers.show import style
from so8t_helpers.so8 import rotation
from tests.phi3_folders import TEXTS, small_folder

LAYERS, HIDDEN = 2, 256
ROUNDING = 1e-5  # float32 products of eight terms, on weights around 0.05 to 1


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose baked model has random weights, with gates on its second layer alone."""
    root = tmp_path_factory.mktemp("runs")
    folder = root / "small"
    settings = validate({"profile": "demo", "run": {"name": "small", "root": str(root)}}, "test")
    small_folder(folder / "03_bake" / "model", layers=LAYERS, dtype=torch.float32)
    free = rotation.initial_free(1, HIDDEN, 0.3, torch.Generator().manual_seed(1))
    rotation.save_gates(folder / "02_train" / "adapter" / rotation.GATES_FILE, rotation.Gates(free, [1]))
    rows = [{"text": text, "question": text} for text in TEXTS]
    (folder / "01_dataset").mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "01_dataset" / "eval.jsonl").write_text(lines, encoding="utf-8")
    write_yaml(folder / "params.yaml", settings.model_dump())
    return folder


@pytest.fixture(scope="module")
def model(run_dir: Path) -> TurnedModel:
    return TurnedModel(run_dir, texts=3)


def test_turning_a_baked_weight_gives_every_power_of_the_gate():
    generator = torch.Generator().manual_seed(0)
    free = rotation.initial_free(1, 32, 0.5, generator)[0]
    plain = torch.randn(6, 32, generator=generator)
    baked = rotation.bake_rotation(plain, rotation.rotation(free))
    torch.testing.assert_close(rotated(baked, free, 1.0), baked)
    torch.testing.assert_close(rotated(baked, free, 0.0), plain, atol=ROUNDING, rtol=0)
    twice = rotation.bake_rotation(baked, rotation.rotation(free))
    torch.testing.assert_close(rotated(baked, free, 2.0), twice, atol=ROUNDING, rtol=0)
    half = rotated(baked, free, 0.5)
    again = rotation.bake_rotation(half, rotation.rotation(free / 2))
    torch.testing.assert_close(again, baked, atol=ROUNDING, rtol=0)


def test_four_bits_leave_the_error_of_four_bits():
    weight = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    # Normal numbers on about 16 levels a block of 32: several percent, far from both 3 and 5 bits.
    assert 0.05 < quantisation_error(weight) < 0.10
    assert 0.05 < quantisation_error(weight[:, :288]) < 0.12  # rows that Q4_K cannot take
    assert quantisation_error(torch.ones(4, 256)) < 1e-3


def test_relative_change():
    assert relative_change(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)


def test_the_model_is_turned_and_turned_back(model: TurnedModel):
    place = model.engine.network.model.layers[1].self_attn.o_proj.weight
    other = model.engine.network.model.layers[0].self_attn.o_proj.weight
    trained, untouched = place.detach().clone(), other.detach().clone()
    model.set_power(0.0)
    torch.testing.assert_close(
        rotation.bake_rotation(place.detach(), rotation.rotation(model.gates.free[0])),
        trained,
        atol=ROUNDING,
        rtol=0,
    )
    assert relative_change(place.detach(), trained) > 0.1
    model.set_power(1.0)
    assert torch.equal(place, trained)
    assert torch.equal(other, untouched)


def test_perplexity_is_that_of_the_turned_model(model: TurnedModel):
    trained = model.perplexity(1.0)
    assert model.perplexity(0.0) != trained
    assert model.perplexity(1.0) == trained
    scores = [score for text in model.texts for score in model.engine.score(text)]
    assert trained == pytest.approx(float(torch.tensor(scores).mean().neg().exp()), rel=1e-5)


def test_the_columns_of_a_block_are_those_of_the_whole_weight(model: TurnedModel):
    whole = model.weight(0, 1.5) - model.weight(0, 0.0)
    torch.testing.assert_close(model.block_change(0, 3, 1.5), whole[:, 24:32], atol=ROUNDING, rtol=0)


def test_an_answer_grows_and_depends_on_the_gates(model: TurnedModel):
    texts = {t: list(model.answer(model.questions[0], t, max_tokens=12)) for t in (0.0, 1.0)}
    assert all(after.startswith(before) for before, after in zip(texts[1.0], texts[1.0][1:], strict=False))
    assert texts[0.0][-1] != texts[1.0][-1]
    table = model.answers(model.questions[:1], max_tokens=4)
    assert list(table["gates"]) == ["off (t = 0)", "half (t = 0.5)", "full (t = 1)", "doubled (t = 2)"]
    assert set(table["in format"]) == {"no"}  # random weights write no think format


def test_measured_curves_figure_and_widget(model: TurnedModel, monkeypatch: pytest.MonkeyPatch):
    measured = model.measure()
    assert len(measured) == len(POWERS)
    assert model.t == 1.0
    by_t = measured.set_index("t")
    assert by_t.loc[0.0, "change"] == 0
    assert by_t["change"].is_monotonic_increasing
    assert f"{by_t.loc[0.0, 'perplexity']:.3f} with the gates off" in plots.summary(measured)
    figure = plots.curves(measured)
    assert len(style.to_svg(figure, "curves")) < 250_000

    widget = WhatIf(model, measured)
    assert widget.named.value == 1.0
    before = bytes(widget.image.value)
    widget.named.value = 2.0
    assert widget.t.value == 2.0
    assert bytes(widget.image.value) != before
    widget.t.value = 0.625
    assert widget.named.value is None
    widget.block.value = 5
    changed = bytes(widget.image.value)
    widget.t.value = 1.0
    widget.block.value = 0
    assert bytes(widget.image.value) == before != changed

    widget.question.value = "東京は？"
    monkeypatch.setattr(model, "answer", _short(model.answer))
    widget.ask_all.click()
    assert widget.answers.value.count("<pre") == 4
    assert not widget.ask.disabled


def _short(answer):
    return lambda question, t: answer(question, t, max_tokens=3)


def test_a_run_that_is_not_baked_says_what_to_run(run_dir: Path, tmp_path: Path):
    write_yaml(tmp_path / "params.yaml", validate({"profile": "demo"}, "test").model_dump())
    with pytest.raises(StageError, match="run 03_bake first"):
        TurnedModel(tmp_path)
