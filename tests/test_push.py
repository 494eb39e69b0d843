"""A run to the hub: what goes there, what never does, and an upload that is cut goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors.numpy import save_file

from so8t_helpers.__main__ import main
from so8t_helpers.bake.folder import write_card
from so8t_helpers.engines.ollama import Modelfile
from so8t_helpers.phi3.source import base_commit, base_folder
from so8t_helpers.run import files, origin
from so8t_helpers.run.records import StageRecord, write_record
from so8t_helpers.run.stage import manifest_path, open_stage
from so8t_helpers.settings import Settings, SettingsError, validate
from so8t_helpers.verbs.push import Plan, plan
from so8t_helpers.verbs.upload import send
from tests.dialects import PHI35
from tests.hub_server import Hub, running
from tests.test_verify import write_gguf

TOKEN = "hf_" + "aKeyThatNobodyMaySee"
LINE = '{"instruction": "一"}'
LOGITS = {"largest": 1e-6, "next_token_agreement": 1.0}
PROOF = {"tokens": 1, "texts": 1, "rounding_kl_mean": 0.0, "logits": {"baking": LOGITS, "rounding": LOGITS}}
CARD = {
    "purpose": "Unsafe records serve refusal only.",
    "lines": {"read": 2, "train": 1, "eval": 1, "quarantine": 0},
    "quarantine": {"duplicate": {"lines": 3, "meaning": ""}},
    "train": {"licences": {"CC0-1.0": 1}},
    "eval": {"licences": {"CC0-1.0": 1}},
    "counted": {"personal data masked": {"email": 2}},
    "not_covered": "names",
    "inputs": [{"name": "records.jsonl", "sha256": "0" * 64}],
    "settings": {"licences": ["CC0-1.0", "MIT"], "personal_data": "mask"},
}
QUALITY = {"files": {"f16": {"bytes": 10, "bits_per_weight": 16.0, "perplexity": 3.5}}, "reference": "f16"}
SCORE = {"format": 0.9, "answer": 0.5, "label_accuracy": 0.25, "refusal": None, "over_refusal": 0.0}
SCORES = {
    "models": {
        "f16": {**SCORE, "leaks": 0, "n": 20, "ci": {key: [0.1, 0.95] for key in SCORE} | {"refusal": None}}
    },
    "engine": {"name": "Ollama", "version": "0.24.0"},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of this test's own, which `huggingface_hub` takes for the one there is."""
    with running(tmp_path / "hub", {TOKEN: "me", "hf_stranger": "stranger"}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # this hub speaks plain git-LFS
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def small_run(tmp_path: Path, evaluated: bool = True, **sections: dict[str, object]) -> Settings:
    """A run of a few bytes, made by the stages' own code, with a page of its baking."""
    base = tmp_path / "models" / "small-base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    folders = {"name": "small", "root": str(tmp_path / "runs"), "reports_root": str(tmp_path / "reports")}
    gguf = {"types": ["f16"]}
    settings = validate({"run": folders, "model": {"base": str(base)}, "gguf": gguf, **sections}, "test")
    source = tmp_path / "records.jsonl"
    source.write_text(LINE, encoding="utf-8")
    run = settings.run_dir
    with open_stage(settings, "01_dataset") as stage:
        stage.read_file("input/records.jsonl", source)
        named = {"file": "records.jsonl", "line": 1, "sha256": hashlib.sha256(LINE.encode()).hexdigest()}
        for name in ("train", "eval"):
            files.write_jsonl(stage.directory / f"{name}.jsonl", [{"source": named}])
        files.write_json(stage.directory / "card.json", CARD)
    with open_stage(settings, "02_train") as stage:
        stage.read_file("01_dataset/train.jsonl", run / "01_dataset/train.jsonl")
        stage.read_file("base/config.json", base / "config.json")
        adapter = {"base_model_name_or_path": str(base), "revision": None, "r": 2}
        files.write_json(stage.directory / "adapter/adapter_config.json", adapter)
        _weights(stage.directory / "adapter/adapter_model.safetensors", 1)
        _weights(stage.directory / "adapter/so8t_gates.safetensors", 2)
    bake(settings, base)
    with open_stage(settings, "04_gguf") as stage:
        for name in ("model.safetensors", origin.FILE):
            stage.read_file(f"03_bake/model/{name}", run / "03_bake/model" / name)
        write_gguf(
            stage.directory / "small-f16.gguf", (run / "03_bake/model" / origin.FILE).read_text("utf-8")
        )
        files.write_json(stage.directory / "quality.json", QUALITY)
    if evaluated:
        with open_stage(settings, "05_ollama_eval") as stage:
            stage.read_file("04_gguf/small-f16.gguf", run / "04_gguf/small-f16.gguf")
            files.write_json(stage.directory / "scores.json", SCORES)
    return settings


def bake(settings: Settings, base: Path, value: int = 3) -> None:
    run = settings.run_dir
    with open_stage(settings, "03_bake") as stage:
        stage.read_file("base/config.json", base / "config.json")
        for name in ("adapter_config.json", "adapter_model.safetensors", "so8t_gates.safetensors"):
            stage.read_file(f"02_train/adapter/{name}", run / "02_train/adapter" / name)
        stage.read_file("01_dataset/card.json", run / "01_dataset/card.json")
        model = stage.directory / "model"
        _weights(model / "model.safetensors", value)
        files.write_text(model / "config.json", "{}\n")
        files.write_text(model / "tokenizer.json", f'{{"word": "{platform.node()}"}}')  # any word may be one
        carried = origin.of_bake(settings, stage, base_commit(base))
        files.write_json(model / origin.FILE, carried)
        write_card(model, base / "README.md", carried, "LoRA on 1 weight", CARD, PROOF)
    files.write_text(settings.reports_dir / "03_bake.html", f"<p>良い: {settings.run_dir / '03_bake'}</p>")
    done = files.sha256_file(manifest_path(settings, "03_bake"))
    write_record(settings, StageRecord("03_bake", "done", "", 1.0, "", done))


def _weights(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.full(300, value, dtype=np.float32)}, path, {"format": "pt"})


def command(settings: Settings, *words: str) -> list[str]:
    places = (("root", settings.run.root), ("reports_root", settings.run.reports_root))
    return [*words, *(part for key, value in places for part in ("--set", f"run.{key}={value}"))]


def contents(found: Plan) -> dict[str, bytes]:
    return {
        i.name: i.content if isinstance(i.content, bytes) else i.content.read_bytes() for i in found.items
    }


def test_a_dry_run_says_what_would_go_and_sends_nothing(hub: Hub, tmp_path: Path, capsys):
    settings = small_run(tmp_path, evaluated=False)
    assert main(command(settings, "push", "small", "me/small")) == 0
    said = capsys.readouterr().out.splitlines()
    assert hub.requests == []
    names = [line.split()[-1] for line in said if " MB  " in line]
    weights = ["model.safetensors", "small-f16.gguf"]
    adapter = [
        f"adapter/{n}" for n in ("adapter_config.json", "adapter_model.safetensors", "so8t_gates.safetensors")
    ]
    rest = ["config.json", origin.FILE, "tokenizer.json", "template", "params", "reports/03_bake.html"]
    assert names == [*weights, *adapter, *rest, "README.md"]
    assert "not there: 05_ollama_eval was not carried out" in said
    assert said[-2].startswith("small to me/small (private): 12 files")
    assert said[-1] == "nothing was sent; --upload sends it"
    assert main(command(settings, "push", "small", "me/small", "--public")) == 0
    assert "(PUBLIC: anybody can read it)" in capsys.readouterr().out


def test_an_upload_is_one_private_commit_byte_for_byte_and_a_second_one_sends_nothing(
    hub: Hub, tmp_path: Path
):
    settings = small_run(tmp_path)
    found = plan(settings, "me/small")
    address = send(found)
    repo = hub.repo("me/small")
    assert repo["private"] is True
    assert [commit["title"] for commit in repo["commits"]] == ["initial commit", "so8t run small"]
    assert address == f"{hub.url}/me/small/commit/{repo['commits'][1]['oid']}"
    there = {name: hub.content("me/small", name) for name in repo["commits"][1]["files"]}
    del there[".gitattributes"]
    assert there == contents(found)
    order = [request.split()[0] + request.split("/")[1] for request in hub.requests]
    puts = [i for i, request in enumerate(order) if request == "PUTlfs"]
    commits = [i for i, request in enumerate(hub.requests) if "/commit/" in request]
    assert len(puts) == 4 and len(commits) == 1 and max(puts) < commits[0]
    send(plan(settings, "me/small"))
    assert hub.repo("me/small") == repo
    assert len(hub.received) == 4


@pytest.mark.slow
def test_a_killed_upload_goes_on_with_what_is_missing(hub: Hub, tmp_path: Path):
    settings = small_run(tmp_path)
    hub.hold_after = 2
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    words = command(settings, "push", "small", "me/small", "--upload")
    process = subprocess.Popen(
        [sys.executable, "-m", "so8t_helpers", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert hub.held.wait(60)
    deadline = time.monotonic() + 30
    while len(hub.received) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    said = process.communicate()[0]
    assert list(hub.repo("me/small")["commits"][-1]["files"]) == [".gitattributes"]  # nothing to be seen yet
    hub.hold_after = None
    hub.hold.set()
    first = list(hub.received)
    assert len(first) == 2
    found = plan(settings, "me/small")
    send(found)
    assert len(hub.received) == len(set(hub.received)) == 4
    assert {name: hub.content("me/small", name) for name in contents(found)} == contents(found)
    assert TOKEN not in said


def test_the_token_is_in_no_output_log_or_file(hub: Hub, tmp_path: Path, capsys, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="huggingface_hub")
    settings = small_run(tmp_path)
    words = command(settings, "push", "small", "me/small", "--upload")
    assert main(words) == 0
    assert (
        main(command(settings, "push", "small", "stranger/small", "--upload")) == 2
    )  # refused with a reason
    monkeypatch.setenv("HF_TOKEN", "hf_" + "expiredLongAgo")
    assert main(words) == 2
    captured = capsys.readouterr()
    text = captured.out + captured.err + caplog.text
    assert "uploaded: " in text
    assert "the hub does not accept the token" in captured.err
    assert "you cannot create a repository for stranger" in captured.err
    text += "".join(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in text and "expiredLongAgo" not in text


def test_an_upload_that_the_storage_refuses_says_so_without_its_signed_address(hub: Hub, tmp_path: Path):
    signatures = iter(range(100))
    hub.sign = lambda digest: str(next(signatures))  # what was signed is never what is asked for
    with pytest.raises(files.StageError, match=r"push to me/small: Error while uploading .*403") as error:
        send(plan(small_run(tmp_path), "me/small"))
    assert "/lfs/" in str(error.value) and "Signature=" not in str(error.value)
    assert error.value.__suppress_context__


def test_no_token_is_an_error_that_says_where_it_belongs(hub: Hub, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(files.StageError, match="no token; `hf auth login`"):
        send(plan(small_run(tmp_path), "me/small"))
    assert hub.requests == []


def test_a_page_with_the_token_in_it_stays_here(hub: Hub, tmp_path: Path):
    settings = small_run(tmp_path)
    files.write_text(settings.reports_dir / "03_bake.html", f"<p>{TOKEN}</p>")
    with pytest.raises(files.StageError, match=r"reports/03_bake\.html holds your token") as error:
        send(plan(settings, "me/small"))
    assert TOKEN not in str(error.value)
    assert hub.requests == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, tmp_path: Path):
    settings = small_run(tmp_path)
    send(plan(settings, "me/open", public=True))
    assert hub.repo("me/open")["private"] is False
    before = list(hub.requests)
    with pytest.raises(files.StageError, match="is there already and is public; say --public"):
        send(plan(settings, "me/open"))
    send(plan(settings, "me/closed"))
    with pytest.raises(files.StageError, match="is private; leave out --public"):
        send(plan(settings, "me/closed", public=True))
    assert not any("me/open" in request and "POST" in request for request in hub.requests[len(before) :])


def test_a_repository_of_something_else_is_left_alone_and_an_old_push_s_files_go(hub: Hub, tmp_path: Path):
    settings = small_run(tmp_path)
    repo = {"private": True, "commits": []}
    own = hub.file(b"mine")
    hub.commit(repo, "mine", {"config.json": own})
    hub.save("me/mine", repo)
    with pytest.raises(files.StageError, match=r"me/mine holds config\.json, and no so8t_provenance\.json"):
        send(plan(settings, "me/mine"))
    assert hub.received == []
    old = ("old-q2_k.gguf", "adapter/old.safetensors", "reports/old.html", "system", origin.FILE)
    hub.commit(repo, "push", dict.fromkeys((*old, "NOTES.md"), own))
    hub.save("me/mine", repo)
    found = plan(settings, "me/mine")
    send(found)
    assert set(hub.repo("me/mine")["commits"][-1]["files"]) == {*contents(found), "NOTES.md"}


def test_the_base_is_named_by_its_id_and_a_file_that_names_the_machine_is_refused(
    tmp_path: Path, monkeypatch
):
    settings = small_run(tmp_path)
    sent = contents(plan(settings, "me/small"))
    adapter = json.loads(sent["adapter/adapter_config.json"])
    assert adapter == {"base_model_name_or_path": "small-base", "revision": None, "r": 2}
    everything = b"".join(sent.values())
    assert str(tmp_path).encode() not in everything and "良い: runs".encode() in everything
    base = Path(settings.model.base)
    for text, what in (
        (f'{{"from": "{settings.run_dir}"}}', "a folder"),
        ('{"by": "hanako-pc"}', "this machine"),
    ):
        monkeypatch.setattr(platform, "node", lambda: "hanako-pc")
        with open_stage(settings, "03_bake") as stage:
            stage.read_file("base/config.json", base / "config.json")
            files.write_text(stage.directory / "model/config.json", text)
            files.write_json(stage.directory / "model" / origin.FILE, origin.of_bake(settings, stage))
        for later in ("04_gguf", "05_ollama_eval"):
            manifest_path(settings, later).unlink(missing_ok=True)
        with pytest.raises(files.StageError, match=rf"config\.json names {what}"):
            plan(settings, "me/small")


def test_what_is_stale_broken_or_of_another_model_is_refused(tmp_path: Path):
    settings = small_run(tmp_path)
    bake(settings, Path(settings.model.base), value=4)
    with pytest.raises(files.StageError, match=r"04_gguf input 03_bake/model/model\.safetensors changed"):
        plan(settings, "me/small")
    # The same run, but the GGUF files came from another folder that is in order by itself.
    other = tmp_path / "other"
    _weights(other / "model.safetensors", 5)
    with open_stage(settings, "04_gguf") as stage:
        stage.read_file("03_bake/model/model.safetensors", other / "model.safetensors")
        write_gguf(stage.directory / "small-f16.gguf", None)
        files.write_json(stage.directory / "quality.json", QUALITY)
    manifest_path(settings, "05_ollama_eval").unlink()
    with pytest.raises(files.StageError, match=r"04_gguf read another 03_bake/model/model\.safetensors"):
        plan(settings, "me/small")
    manifest_path(settings, "04_gguf").unlink()
    (tmp_path / "records.jsonl").write_text("{}")
    with pytest.raises(files.StageError, match=r"01_dataset input input/records\.jsonl changed"):
        plan(settings, "me/small")
    manifest = json.loads(manifest_path(settings, "01_dataset").read_text())
    manifest["inputs"]["input/records.jsonl"]["sha256"] = hashlib.sha256(b"{}").hexdigest()
    files.write_json(manifest_path(settings, "01_dataset"), manifest)
    with pytest.raises(files.StageError, match=r"so8t verify breaks at records\.jsonl: input lines"):
        plan(settings, "me/small")


def test_without_a_baked_model_or_a_repository_s_name_nothing_is_planned(tmp_path: Path):
    settings = small_run(tmp_path)
    with pytest.raises(SettingsError, match="expected OWNER/NAME"):
        plan(settings, "small")
    manifest_path(settings, "03_bake").unlink()
    with pytest.raises(files.StageError, match="no baked model; carry out 03_bake"):
        plan(settings, "me/small")


def test_the_card_says_scores_with_intervals_policy_files_and_how_to_run_it(tmp_path: Path):
    settings = small_run(tmp_path, dataset={"system_prompt": "短く。"})
    sent = contents(plan(settings, "me/small"))
    card = sent["README.md"].decode()
    facts = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in facts  # a local folder is none of the hub's
    assert "ollama run hf.co/me/small:F16" in card
    row = "| f16 | 90.0% [10.0%, 95.0%] | 50.0% [10.0%, 95.0%] | 25.0% [10.0%, 95.0%] | not measured | "
    assert row in card
    assert "| F16 | 0.0 | 16.00 | 3.50 | not measured | not measured |" in card
    assert "licences allowed: CC0-1.0, MIT; found in training: CC0-1.0 1" in card
    assert "personal data masked: email 2" in card and "set aside: duplicate 3" in card
    carried = json.loads(sent[origin.FILE])
    assert all(digest in card for digest in carried["sha256"].values() if digest)
    assert card.index("## Scores") < card.index("## Provenance")
    # The small file's vocabulary has the marks of a chat alone.
    small = replace(PHI35, stops=tuple(s for s in PHI35.stops if s not in {"<s>", "</s>", "<unk>"}))
    modelfile = Modelfile(small, num_ctx=settings.eval.num_ctx, system="短く。")
    assert sent["template"].decode() == modelfile.template
    assert json.loads(sent["params"]) == modelfile.parameters
    assert sent["system"].decode() == "短く。"
    manifest_path(settings, "05_ollama_eval").unlink()
    assert (
        "Not measured: 05_ollama_eval was not carried out."
        in contents(plan(settings, "me/small"))["README.md"].decode()
    )


def test_a_base_from_the_hub_is_known_by_its_commit_and_a_run_keeps_to_it(hub: Hub, tmp_path: Path):
    repo = {"private": True, "commits": []}
    weights = tmp_path / "w.safetensors"
    _weights(weights, 7)
    large = {**hub.file(weights.read_bytes()), "lfs": True}
    first = hub.commit(repo, "one", {"config.json": hub.file(b"{}"), "model.safetensors": large})
    hub.save("me/base", repo)
    model = {"base": "me/base"}
    cache = {"hf_home": str(tmp_path / "cache")}
    run = {"name": "t", "root": str(tmp_path / "runs"), "reports_root": str(tmp_path / "reports")}
    settings = validate({"run": run, "model": model, "cache": cache}, "test")
    folder = base_folder(settings)
    assert base_commit(folder) == first
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    with open_stage(settings, "02_train") as stage:
        stage.read_file("base/config.json", folder / "config.json")
    second = hub.commit(repo, "two", {"config.json": hub.file(b'{"a": 1}'), "model.safetensors": large})
    hub.save("me/base", repo)
    assert base_commit(base_folder(settings)) == first
    manifest_path(settings, "02_train").unlink()
    assert base_commit(base_folder(settings)) == second
    pinned = validate({"run": run, "model": {**model, "revision": first}, "cache": cache}, "test")
    assert base_commit(base_folder(pinned)) == first
    with open_stage(settings, "03_bake") as stage:
        stage.read_file("base/config.json", folder / "config.json")
        carried = origin.of_bake(settings, stage, base_commit(folder))
    assert carried["base"] == {"id": "me/base", "revision": None, "commit": first}
    write_card(tmp_path, tmp_path / "README.md", carried, "x", CARD, PROOF)
    assert f"from `me/base` at commit `{first}`" in (tmp_path / "README.md").read_text("utf-8")
    assert base_commit(tmp_path) is None


@pytest.mark.slow
def test_the_demo_comes_back_from_the_hub_as_it_went(hub: Hub, demo_run: Settings, tmp_path: Path):
    from peft import PeftConfig
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = plan(demo_run, "me/demo")
    send(found)
    sent = contents(found)
    assert {name: hub.content("me/demo", name) for name in sent} == sent
    template = sent["template"].decode()
    assert f'TEMPLATE """{template}"""' in (demo_run.run_dir / "05_ollama_eval/Modelfile").read_text("utf-8")
    assert {f"reports/{stage}.html" for stage in ("01_dataset", "05_ollama_eval", "index")} < set(sent)
    settings = validate({"model": {"base": "me/demo"}, "cache": {"hf_home": str(tmp_path)}}, "test")
    folder = base_folder(settings)
    assert base_commit(folder) == hub.repo("me/demo")["commits"][-1]["oid"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with safe_open(demo_run.run_dir / "03_bake/model/model.safetensors", "pt") as baked:
        assert model.model.norm.weight.equal(baked.get_tensor("model.norm.weight").to(model.dtype))
    assert AutoTokenizer.from_pretrained(folder)("今日は")["input_ids"]
    assert PeftConfig.from_pretrained(str(folder / "adapter")).r == demo_run.lora.r
