"""Arms that go on through stages 03 to 05, and what is kept and said of them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from so8t_helpers.evaluate.statistics import confusion, macro_f1, macro_f1_interval, resamples
from so8t_helpers.run.files import read_json, sha256_file, write_yaml
from so8t_helpers.study import full_results
from so8t_helpers.study.engine import Session
from so8t_helpers.study.page import make_page
from so8t_helpers.study.plan import load_study
from so8t_helpers.study.stage import carry_out
from tests.dataset_inputs import many, write
from tests.small_study import small_base, small_study


@pytest.mark.slow
def test_arms_that_the_study_names_go_through_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From records of its own, which the study makes into data first."""
    names = ["gates"]
    path = small_study(
        tmp_path,
        small_base(tmp_path / "base"),
        seeds=2,
        trials=1,
        full={"arms": names, "seeds": 2, "prompts": 4},
    )
    profile = yaml.safe_load((tmp_path / "profile.yaml").read_text(encoding="utf-8"))
    records = write(tmp_path / "in.jsonl", many(80))
    profile["dataset"] = {"inputs": [str(records)], "eval_share": 0.2, "workers": 1}
    profile["training"] |= {"dataset_dir": None, "sequence_length": 512}
    profile["gguf"] = {"types": ["f16", "q8_0"], "quality_tokens": 512}
    profile["eval"] = {"engine": "llama_cpp", "max_new_tokens": 8}
    write_yaml(tmp_path / "profile.yaml", profile)
    study = load_study(str(path))
    found = carry_out(study)
    run = study.folder.parents[1] / "study-small-2-gates-1"
    manifest = read_json(run / "03_bake" / "manifest.json")
    adapter = found.arms["gates"].outcomes[0].folder / "adapter"
    assert manifest["inputs"]["02_train/adapter/adapter_model.safetensors"]["sha256"] == sha256_file(
        adapter / "adapter_model.safetensors"
    ), "what is asked is the study's own training"
    scores = read_json(run / "05_ollama_eval" / "scores.json")["models"]["q8_0"]
    measured = full_results.measures(found.full["gates"])
    for name, key in (
        ("in format", "format"),
        ("label F1", "label_f1"),
        ("refused where not", "over_refusal"),
    ):
        sums, counts = measured[name]
        assert sums[0].sum() / counts.sum() == pytest.approx(scores[key])
    quality = read_json(run / "04_gguf" / "quality.json")
    assert measured["KL from F16"][0][0, 0] == quality["files"]["q8_0"]["kl_mean"]
    assert 0 < measured["o_proj's error"][0][0, 0] < 0.1
    table = full_results.table(found)
    assert list(table) == names and set(measured) == set(table.index)
    assert (study.settings.reports_dir.parent / run.name / "05_ollama_eval.html").is_file()

    for arm in found.arms.values():  # what is kept needs neither the runs nor the adapters
        for outcome in arm.outcomes:
            shutil.rmtree(outcome.folder / "adapter", ignore_errors=True)
    shutil.rmtree(run)
    monkeypatch.setattr(Session, "_train", lambda *_: pytest.fail("trained again"))
    assert carry_out(study).full == found.full
    page = make_page(study, {}).read_text(encoding="utf-8")
    assert full_results.said(found) in page
    assert "Stages 04 and 05, with 95% intervals" in page


def test_the_prompts_share_of_label_f1():
    """The mean is F1; the spread is that of the bootstrap, which asks nothing of the formula."""
    generator = np.random.default_rng(3)
    labels = generator.choice(["ALLOW", "DENY", "REFUSE"], size=200, p=[0.5, 0.3, 0.2])
    said = np.where(generator.random(200) < 0.7, labels, "ESCALATION")
    values = full_results.f1_by_prompt(pd.DataFrame({"label": labels, "decision": said}))
    assert values.mean() == pytest.approx(macro_f1(confusion(labels.tolist(), said.tolist())))
    draws = resamples(200, 2000, 0)
    low, high = macro_f1_interval(labels.tolist(), said.tolist(), draws)
    error = values.std(ddof=1) / math.sqrt(200)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.1)  # 2,000 draws know it within 2%
