"""Held-out loss and what is made of it: against transformers, by part, best adapter, patience, answers."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from so8t_helpers.phi3.shape import read_shape
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.phi3.weights import weight_reader
from so8t_helpers.run.files import read_jsonl, write_jsonl, write_yaml
from so8t_helpers.settings import PROJECT_ROOT, Settings, SettingsError, load_settings, merge
from so8t_helpers.study.engine import what_if
from so8t_helpers.thinking import format as think_format
from so8t_helpers.thinking.format import LABELS, ThinkText
from so8t_helpers.train import batches, heldout, stage
from so8t_helpers.train.adapters import Adapters
from so8t_helpers.train.batches import IGNORE
from so8t_helpers.train.frozen import load_base
from so8t_helpers.train.micro_step import MicroStep
from so8t_helpers.train.workers import Workers
from so8t_helpers.train.writing import Writer, choose_prompts
from tests.dialects import PHI35
from tests.phi3_folders import small_folder

LENGTH = 256


def rows(count: int, first: int = 0) -> list[dict]:
    found = []
    for i in range(first, first + count):
        label = LABELS[i % 4]
        thinking = think_format.with_decision(f"数は{i}。", label)
        seed = ThinkText("seed", f"{i}です。", thinking)
        quadruple = ThinkText("quadruple", f"{i}です。", "", "課題", "安全", thinking)
        answer = [think_format.build(seed), think_format.build(quadruple), f"{i}です。"][i % 3]
        messages = [{"role": "user", "content": f"/think {i}は？"}, {"role": "assistant", "content": answer}]
        found.append({"id": str(i), "label": label, "question": f"{i}は？", "messages": messages})
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base whose logits can be large: with random weights of one size it could never be sure."""
    folder = tmp_path_factory.mktemp("heldout") / "base"
    small_folder(folder, dtype=torch.float32, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    weights = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    for name in weights.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
        weights[name] *= 10
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Settings:
    chosen = load_settings(
        "demo",
        {
            "run": {"name": "t", "root": str(tmp_path / "runs"), "reports_root": str(tmp_path / "reports")},
            "model": {"base": str(base)},
            "lora": {"r": 4, "alpha": 8},
            "training": {
                "sequence_length": LENGTH,
                "max_steps": 8,
                "checkpoint_steps": 2,
                "eval_steps": 2,
                "eval_samples": None,
                "sample_steps": 4,
                "sample_prompts": 3,
            },
        },
    )
    write_jsonl(chosen.run_dir / "01_dataset" / "train.jsonl", rows(30))
    write_jsonl(chosen.run_dir / "01_dataset" / "eval.jsonl", rows(9, first=30))
    return chosen


def parts_of(
    settings: Settings, base: Path
) -> tuple[MicroStep, Adapters, list[heldout.HeldOutDocument], object]:
    """A micro-step of the base with adapters that do something, and the held-out documents."""
    chosen = merge(settings, {"model": {"quantization": "none"}, "so8t": {"init_scale": 0.3}})
    shape, cpu = read_shape(base), torch.device("cpu")
    weights = load_base(shape, weight_reader(base), chosen.model, cpu, torch.float32)
    adapters = Adapters(shape, chosen, cpu)
    with torch.no_grad():
        adapters.lora.copy_(
            torch.randn(adapters.lora.shape, generator=torch.Generator().manual_seed(1)) * 0.1
        )
    tokenizer = load_tokenizer(base)
    documents = heldout.read_documents(rows(9, first=30), tokenizer, LENGTH)
    return MicroStep(weights, adapters, chosen, False, 4), adapters, documents, tokenizer


def libraries(base: Path, adapters: Adapters) -> torch.nn.Module:
    """transformers' model with LoRA and rotations merged in float64: nothing of ours but the numbers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for i, layer in enumerate(model.model.layers):
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            linear = getattr(layer.self_attn if name in ("qkv_proj", "o_proj") else layer.mlp, name)
            a, b = (adapters.matrices[i, name, side].detach().double() for side in "ab")
            linear.weight.data += 2.0 * b @ a
            if name == "o_proj":
                linear.weight.data @= torch.block_diag(*adapters.rotations[i].detach().double())
    return model


def test_parts_cover_every_target_and_the_label_is_the_decision(base: Path):
    tokenizer = load_tokenizer(base)
    labels = heldout.label_tokens(tokenizer)
    assert len({tuple(label) for label in labels}) == 4
    for row, found in zip(rows(9), heldout.read_documents(rows(9), tokenizer, LENGTH), strict=True):
        targets, parts = found.document.targets, found.parts
        assert ((parts >= 0) == (targets != batches.IGNORE)).all()
        text = row["messages"][-1]["content"]
        private = text != f"{row['id']}です。"
        assert set(parts[parts >= 0]) == ({0, 1, 2} if private else {2})
        decision = tokenizer.decode(targets[parts == 1])
        assert decision.strip() == (row["label"] if private else "")
        final = tokenizer.decode(targets[parts == 2])
        assert f"{row['id']}です。" in final and "数は" not in final and final.endswith("<|end|>")
        forks = np.flatnonzero(found.choices[:, 0] >= 0)
        assert len(forks) >= private
        assert (found.choices[forks, 0] == targets[forks]).all() and (parts[forks] == 1).all()


def test_english_turns_have_the_same_parts(base: Path):
    tokenizer = load_tokenizer(base)
    for label in LABELS:
        thinking = think_format.with_decision("So it is.", label, "english")
        answer = think_format.build(ThinkText("english", "It is 72.", thinking))
        messages = [{"role": "user", "content": "/think 9x8?"}, {"role": "assistant", "content": answer}]
        row = {"id": "1", "label": label, "question": "9x8?", "messages": messages}
        (found,) = heldout.read_documents([row], tokenizer, LENGTH)
        targets, parts = found.document.targets, found.parts
        assert tokenizer.decode(targets[parts == 1]).strip() == label
        assert "It is 72." in tokenizer.decode(targets[parts == 2])
        assert "So it is" in tokenizer.decode(targets[parts == 0])
        forks = np.flatnonzero(found.choices[:, 0] >= 0)
        assert len(forks) and (found.choices[forks, 0] == targets[forks]).all()


def test_labels_that_begin_alike_are_told_apart_by_two_choices():
    labels = [[10], [11], [12, 1], [12, 2, 3]]  # as the demo's tokenizer has DENY and REFUSE
    forks = [list(heldout._forks(labels, right)) for right in range(4)]
    assert forks[0] == [(0, [10, 11, 12])] and forks[1] == [(0, [11, 10, 12])]
    assert forks[2] == [(0, [12, 10, 11]), (1, [1, 2])]
    assert forks[3] == [(0, [12, 10, 11]), (1, [2, 1])]


@pytest.mark.parametrize("batch_size", [1, 3])  # three sequences have more padding than one is long
def test_the_loss_is_that_of_transformers_part_by_part(settings: Settings, base: Path, batch_size: int):
    settings = merge(settings, {"training": {"batch_size": batch_size}})
    step, adapters, documents, _ = parts_of(settings, base)
    lengths = [len(d.parts) for d in documents]
    packed = heldout._pack(lengths, LENGTH * batch_size, 3)
    held_out = heldout.HeldOut(step, documents, packed, 0, Workers())
    measured = held_out.measure()
    model, right = libraries(base, adapters), 0
    for one, sums in zip(documents, measured.sums, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor(one.document.tokens)[None], use_cache=False).logits[0]
        targets = torch.tensor(one.document.targets)
        loss = functional.cross_entropy(logits, targets, reduction="none", ignore_index=batches.IGNORE)
        expected = [loss[torch.tensor(one.parts == part)].sum().item() for part in range(3)]
        # float32 through two layers: logits of size 1 are off by some 1e-6, a sum of 40 of them by 1e-5.
        assert sums.tolist() == pytest.approx(expected, abs=1e-4)
        forks = [(logits[at], tokens) for at, tokens in enumerate(one.choices.tolist()) if tokens[0] >= 0]
        right += bool(forks) and all(max(tokens, key=lambda t: row[t]) == tokens[0] for row, tokens in forks)
    assert ((measured.right > 0).sum(), (measured.right >= 0).sum()) == (right, 6)
    figures = held_out.figures(measured)
    assert figures["loss"] == pytest.approx((measured.sums.sum() / held_out.counts.sum()).item())
    again = held_out.measure()
    assert torch.equal(again.sums, measured.sums), "a look must not depend on the one before"


def test_the_loss_at_other_powers_of_the_rotations_is_that_of_transformers(settings: Settings, base: Path):
    step, adapters, documents, _ = parts_of(settings, base)
    packed = heldout._pack([len(d.parts) for d in documents], LENGTH, 3)
    held_out = heldout.HeldOut(step, documents, packed, 0, Workers())
    before, trained = held_out.measure(), adapters.rotations.detach().clone()
    found = what_if(adapters, held_out).set_index("t")
    assert found.loc[1.0, "loss"] == held_out.figures(before)["loss"]
    assert torch.equal(held_out.measure().sums, before.sums), "the gates are as they were"
    one = torch.eye(8).expand_as(trained)
    for t, rotations in ((0.0, one), (1.0, trained), (2.0, trained @ trained)):
        with torch.no_grad():
            adapters.rotations.copy_(rotations)
        model, total = libraries(base, adapters), 0.0
        for document in (d.document for d in documents):
            with torch.no_grad():
                logits = model(torch.tensor(document.tokens)[None], use_cache=False).logits[0]
            targets = torch.tensor(document.targets)
            total += functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE).item()
        # float32 through two layers, as above
        assert found.loc[t, "loss"] == pytest.approx(total / held_out.counts.sum().item(), abs=1e-5)


def test_answers_are_those_that_transformers_writes(settings: Settings, base: Path):
    step, adapters, _, tokenizer = parts_of(settings, base)
    chosen = choose_prompts(rows(9, first=30), 4)
    assert len({row["label"] for row in chosen}) == 4
    writer = Writer(step, chosen, tokenizer, LENGTH)
    texts = []
    writer._judge = lambda row, ids: texts.append(ids) or {}  # type: ignore[method-assign]
    writer.write()
    model = libraries(base, adapters)
    stops = tokenizer.convert_tokens_to_ids(list(PHI35.stops))
    for prompt, found in zip(writer.prompts, texts, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=writer.most,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert found == [token for token in out if token not in stops]
        assert len(found) > 3


def test_a_round_that_takes_too_long_is_given_up(settings: Settings, base: Path):
    step, _, _, tokenizer = parts_of(settings, base)
    written = Writer(step, choose_prompts(rows(9, first=30), 4), tokenizer, LENGTH).write(limit=0.0)
    assert written.rows == [] and written.seconds > 0


def test_a_training_leaves_curves_answers_and_a_verdict(settings: Settings):
    facts = stage.train(settings)
    folder = settings.run_dir / "02_train"
    frame = pd.read_parquet(folder / "heldout.parquet")
    assert frame["step"].tolist() == [0, 2, 4, 6, 8]
    assert frame["loss"].iloc[-1] < frame["loss"].iloc[0]
    stored = load_file(folder / "heldout_documents.safetensors")
    assert stored["sums"].shape == (5, 9, 3) and stored["counts"].sum() > 100
    mean = stored["sums"].sum((1, 2)) / stored["counts"].sum()
    assert mean.tolist() == pytest.approx(frame["loss"].tolist())
    assert facts["last held-out loss"] == round(float(frame["loss"].iloc[-1]), 4)
    written = read_jsonl(folder / "samples.jsonl")
    assert [row["step"] for row in written] == [4] * 3 + [8] * 3
    assert all("thinking" not in row for row in written)


def test_looking_changes_nothing_of_the_course(settings: Settings):
    stage.train(settings)
    blind = merge(settings, {"run": {"name": "blind"}, "training": {"eval_steps": None}})
    write_jsonl(blind.run_dir / "01_dataset" / "train.jsonl", rows(30))
    stage.train(blind)
    adapters = [
        load_file(s.run_dir / "02_train" / "adapter" / "adapter_model.safetensors") for s in (settings, blind)
    ]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])
    assert not (blind.run_dir / "02_train" / "heldout.parquet").exists()


@pytest.fixture
def worse(settings: Settings) -> Settings:
    """A training that goes on from a good adapter at a rate that ruins it: it is best at the start."""
    good = merge(settings, {"training": {"max_steps": 40, "learning_rate": 0.02, "sample_steps": None}})
    stage.train(good)
    training = {
        "continue_from": str(good.run_dir / "02_train" / "adapter"),
        "dataset_dir": str(settings.run_dir / "few"),
        "learning_rate": 0.5,
        "max_steps": 12,
    }
    write_jsonl(settings.run_dir / "few" / "train.jsonl", rows(1))
    write_jsonl(settings.run_dir / "few" / "eval.jsonl", rows(9, first=30))
    return merge(good, {"run": {"name": "worse"}, "training": training})


def test_the_best_adapter_is_kept_and_overfitting_said(worse: Settings):
    last = stage.train(worse)
    assert last["overfits"] is True and last["best step"] == 0
    assert last["kept held-out loss"] == last["last held-out loss"] > last["best held-out loss"]
    best = merge(worse, {"run": {"name": "best"}, "training": {"keep": "best"}})
    facts = stage.train(best)
    assert facts["overfits"] is True
    assert facts["kept held-out loss"] == facts["best held-out loss"] == last["best held-out loss"]
    assert load_file(best.run_dir / "02_train" / "angles.safetensors")["steps"].tolist() == [0]
    # The best is what it began with, to the last bit.
    begun = Path(str(worse.training.continue_from))
    for name in ("adapter_model.safetensors", "so8t_gates.safetensors"):
        kept, first = load_file(best.run_dir / "02_train" / "adapter" / name), load_file(begun / name)
        assert all(torch.equal(kept[key], first[key]) for key in first)


def test_a_killed_training_ends_with_the_same_curves_answers_and_best_adapter(
    settings: Settings, tmp_path: Path
):
    settings = merge(settings, {"training": {"keep": "best", "max_steps": 12, "learning_rate": 0.02}})
    stage.train(settings)
    data = str(settings.run_dir / "01_dataset")
    killed = merge(settings, {"run": {"name": "killed"}, "training": {"dataset_dir": data}})
    profile = tmp_path / "killed.yaml"
    write_yaml(profile, killed.model_dump())
    command = [sys.executable, "-m", "so8t_helpers.train.stage", str(profile)]
    process = subprocess.Popen(command, cwd=PROJECT_ROOT)
    saved = killed.run_dir / "02_train" / "checkpoints" / "step-0000006"
    deadline = time.monotonic() + 120
    while not saved.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert saved.is_dir() and not (killed.run_dir / "02_train" / "manifest.json").exists()
    stage.train(killed)
    folders = [s.run_dir / "02_train" for s in (settings, killed)]
    for name in ("heldout_documents.safetensors", "adapter/adapter_model.safetensors", "angles.safetensors"):
        one, other = (load_file(folder / name) for folder in folders)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    curves = [pd.read_parquet(folder / "heldout.parquet").drop(columns="seconds") for folder in folders]
    pd.testing.assert_frame_equal(*curves)
    assert read_jsonl(folders[0] / "samples.jsonl") == read_jsonl(folders[1] / "samples.jsonl")


def test_patience_stops_a_training_that_only_gets_worse(worse: Settings):
    facts = stage.train(merge(worse, {"training": {"patience": 2}}))
    assert facts["steps"] == 4 and facts["best step"] == 0


@pytest.mark.parametrize("training", [{"keep": "best"}, {"patience": 3}])
def test_what_needs_held_out_samples_says_so_before_any_work(settings: Settings, training: dict):
    write_jsonl(settings.run_dir / "01_dataset" / "eval.jsonl", [])
    with pytest.raises(SettingsError, match=r"needs held-out samples; set dataset.eval_share"):
        stage.train(merge(settings, {"training": training}))


def test_auto_keeps_within_three_percent():
    chosen = load_settings("demo").training
    lengths = [40 + i % 30 for i in range(300)]
    for steps in (20, 100, 618, 20_000):
        plan = heldout.plan(chosen, lengths, 512, 8, [1] * steps)
        assert {0, steps} <= plan.steps
        passes = len(plan.steps) * len(plan.sequences)
        assert passes <= max(2, 0.03 * steps / heldout._COST + 1)
        assert max(map(max, plan.sequences)) + 1 == len({i for one in plan.sequences for i in one})
    assert len(plan.sequences) == len(heldout._pack(lengths, 512, 8)), "all samples where there is time"


def test_a_difference_is_told_from_noise():
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(5, 40, (200, 3), generator=generator).double()
    base = counts * 1.5
    noise = torch.randn(200, 3, generator=generator).double()
    higher, half = heldout.overfitting(counts, base, base + noise)
    assert abs(higher) < half
    higher, half = heldout.overfitting(counts, base, base + noise + 0.02 * counts)
    assert higher - half > 0 and higher == pytest.approx(0.02, abs=half)
    assert math.isinf(heldout.overfitting(counts[:1], base[:1], base[:1])[1])
