"""Inputs that are wrong, one a line: what is set or done to a good folder, and what must be said of it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zstandard

from so8t_helpers.phi3.shape import read_shape
from so8t_helpers.run.files import write_jsonl
from so8t_helpers.settings import load_settings
from so8t_helpers.train.adapters import Adapters
from tests.phi3_folders import small_folder
from tests.small_notebooks import write_notebook

Break = Callable[[Path], None]
LINE = json.dumps({"instruction": "1+1は？", "output": "2です。"}, ensure_ascii=False) + "\n"
ROW = {
    "id": "1",
    "label": "ALLOW",
    "messages": [{"role": "user", "content": "1+1は？"}, {"role": "assistant", "content": "2です。"}],
    "text": "2です。" * 20,
}
FOLDERS = {
    "dataset.inputs": ["HERE/records.jsonl"],
    "model.base": "HERE/base",
    "training.dataset_dir": "HERE/data",
    "bake.adapter_dir": "HERE/adapter",
    "gguf.model_dir": "HERE/model",
    "eval.models": ["base"],
}


@dataclass(frozen=True)
class Bad:
    """One bad input: the stage that it would stop, what is set, what is broken, and what must be said."""

    stage: str
    says: str  # a regular expression
    chosen: dict[str, Any]
    broken: Break | None = None
    status: int = 2

    @property
    def name(self) -> str:
        values = ",".join(f"{key}={str(value)[:24]}" for key, value in self.chosen.items())
        return f"{self.stage}-{values or 'file'}-{self.says[:28]}"


def make_good(here: Path) -> Path:
    """Make a folder in which nothing is wrong: a base, records, a data set, an adapter, a baked model."""
    small_folder(here / "base")
    shutil.copytree(here / "base", here / "model", copy_function=os.link)
    (here / "records.jsonl").write_text(LINE * 3000, encoding="utf-8")
    (here / "data").mkdir()
    for name in ("train", "eval"):
        write_jsonl(here / "data" / f"{name}.jsonl", [ROW])
    (here / "adapter").mkdir()
    settings = load_settings("demo", {"lora": {"r": 4}})
    Adapters(read_shape(here / "base"), settings, torch.device("cpu")).save(here / "adapter")
    for stage in ("01_dataset", "02_train", "03_bake", "04_gguf", "05_ollama_eval"):
        write_notebook(here / "notebooks", stage)
    return here


def text(name: str, content: str) -> Break:
    """Put other text into a file."""
    return lambda here: _put(here / name, content.encode())


def cut(name: str, share: float = 0.5) -> Break:
    """Cut a file."""
    return lambda here: _put(here / name, (data := (here / name).read_bytes())[: int(len(data) * share)])


def edit(name: str, **changes: Any) -> Break:
    """Change keys of a JSON object; None removes one."""

    def change(here: Path) -> None:
        data = json.loads((here / name).read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in data.items() if value is not None}
        _put(here / name, json.dumps(kept).encode())

    return change


def gone(name: str) -> Break:
    """Remove a file."""
    return lambda here: (here / name).unlink()


def packed(name: str, how: Callable[[bytes], bytes], share: float) -> Break:
    """Leave a share of the records, compressed, under another name."""

    def pack(here: Path) -> None:
        data = how((here / "records.jsonl").read_bytes())
        _put(here / name, data[: int(len(data) * share)])

    return pack


def sharded(shard: str) -> Break:
    """Have an index name a shard, which is there, for every tensor of the base."""

    def split(here: Path) -> None:
        from so8t_helpers.phi3.weights import read_header

        names = read_header(here / "base/model.safetensors")
        target = here / "base" / shard
        target.parent.mkdir(parents=True, exist_ok=True)
        (here / "base/model.safetensors").rename(target)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        _put(here / "base/model.safetensors.index.json", json.dumps(index).encode())

    return split


def header(name: str, change: Callable[[dict[str, Any]], object]) -> Break:
    """Change the header of a safetensors file, its data as they were."""

    def rewrite(here: Path) -> None:
        data = (here / name).read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        content = json.loads(data[8:size])
        change(content)
        head = json.dumps(content).encode()
        _put(here / name, len(head).to_bytes(8, "little") + head + data[size:])

    return rewrite


def _put(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # the good folder's files are hard links
    path.write_bytes(data)


def _set(stage: str, key: str, value: Any, says: str, status: int = 2) -> Bad:
    return Bad(stage, says, {key: value}, status=status)


def _file(stage: str, broken: Break, says: str, **chosen: Any) -> Bad:
    return Bad(stage, says, {key.replace("__", "."): value for key, value in chosen.items()}, broken)


def _damaged(records: bytes) -> bytes:
    data = gzip.compress(records)
    return data[:-20] + bytes([data[-20] ^ 16]) + data[-19:]


def _wrong_shape(content: dict[str, Any]) -> None:
    content["model.layers.0.self_attn.o_proj.weight"]["shape"].reverse()
    content["model.layers.0.mlp.down_proj.weight"]["shape"].reverse()


def _outside(content: dict[str, Any]) -> None:
    content["model.norm.weight"]["data_offsets"] = [-8, 0]


_CONFIG, _FAST = "base/config.json", "base/tokenizer.json"
_ADAPTER = "adapter/adapter_config.json"
_WEIGHTS, _GATES = "adapter/adapter_model.safetensors", "adapter/so8t_gates.safetensors"
BAD = [
    # Names that would lead out of the run folder, or to nothing.
    _set("04", "gguf.name", "../../elsewhere", "`gguf.name`"),
    _set("04", "gguf.name", "/elsewhere", "`gguf.name`"),
    _set("04", "gguf.name", "*", "`gguf.name`"),
    _set("04", "gguf.name", "", "`gguf.name`"),
    _set("01", "run.name", "../x", "`run.name`"),
    _set("05", "eval.models", ["../x"], r"`eval.models\.0`"),
    _set("05", "eval.models", ["*"], r"`eval.models\.0`"),
    _set("05", "serve.model", "../x", "`serve.model`"),
    # Lists with nothing in them.
    _set("01", "dataset.inputs", [], r"dataset\.inputs"),
    _set("01", "dataset.inputs", [""], r"dataset\.inputs"),
    _set("04", "gguf.types", [], r"`gguf\.types`"),
    _set("05", "eval.models", [], r"`eval\.models`"),
    _set("02", "lora.target_modules", [], r"lora\.target_modules"),
    # Numbers that no machine has, or no model.
    _set("05", "eval.num_ctx", 1, r"`eval\.num_ctx`"),
    _set("04", "gguf.threads", 10000, r"`gguf\.threads`"),
    _set("01", "dataset.workers", 10000, r"`dataset\.workers`"),
    _set("05", "eval.parallel", 10000, r"`eval\.parallel`"),
    _set("02", "lora.r", 1000000000, r"`lora\.r`"),
    _set("02", "lora.r", 300, r"lora\.r: 300 .*down_proj has, 256"),
    _set("02", "training.sequence_length", 10**9, r"`training\.sequence_length`"),
    _set("02", "training.learning_rate", float("inf"), r"`training\.learning_rate`"),
    _set("02", "training.learning_rate", float("nan"), r"`training\.learning_rate`"),
    # Addresses and places.
    _set("05", "eval.ollama_url", "nonsense", r"`eval\.ollama_url`"),
    _set("05", "eval.ollama_url", "ftp://localhost", r"`eval\.ollama_url`"),
    _set("05", "eval.ollama_url", "http://127.0.0.1:port", r"`eval\.ollama_url`"),
    _set("01", "run.root", "", r"`run\.root`"),
    _set("01", "run.root", "HERE/records.jsonl", r"run\.root: .*records\.jsonl", 3),
    _set("01", "run.reports_root", "HERE/records.jsonl/x", r"run\.reports_root: .*records\.jsonl", 3),
    _set("01", "run.root", "/proc/runs", r"run\.root: .*/proc", 3),
    _set("01", "run.reports_root", "/proc/reports", r"run\.reports_root: .*/proc", 3),
    _set("01", "cache.temp_dir", "/proc/temp", r"cache\.temp_dir: .*/proc", 3),
    # The base: configuration.
    _file("02", text(_CONFIG, "{"), r"base.config\.json: .*JSON"),
    _file("03", text(_CONFIG, "[]"), r"base.config\.json: .*JSON object"),
    _file("02", text(_CONFIG, "\ufeff{}"), r"base.config\.json"),
    _file("02", edit(_CONFIG, hidden_size=None), r"base.config\.json: .*hidden_size"),
    _file("02", edit(_CONFIG, num_attention_heads="4"), r"base.config\.json: .*num_attention_heads"),
    _file("02", edit(_CONFIG, num_attention_heads=0), r"base.config\.json: .*num_attention_heads"),
    _file("03", edit(_CONFIG, max_position_embeddings=None), r"config\.json: .*max_position_embeddings"),
    _file("02", edit(_CONFIG, intermediate_size=64), r"gate_up_proj.*config\.json"),
    _file("02", edit(_CONFIG, num_hidden_layers=9), r"model\.layers\.2.*config\.json"),
    _file("02", edit(_CONFIG, vocab_size=100), r"base.*vocab_size"),
    _file("03", edit(_CONFIG, vocab_size=99999), r"embed_tokens.*config\.json"),
    # The base: tokenizer.
    _file("01", gone(_FAST), "has no tokenizer.json"),
    _file("01", text(_FAST, "{"), r"base.tokenizer\.json: .*JSON"),
    _file("02", cut(_FAST), r"base.tokenizer\.json: .*JSON"),
    _file("02", text(_FAST, "{}"), r"base.tokenizer\.json"),
    _file("02", edit(_FAST, model={"type": "BPE"}), r"base.tokenizer\.json"),
    _file("01", text("base/tokenizer_config.json", "no"), r"tokenizer_config\.json: .*JSON"),
    _file("03", text("base/tokenizer_config.json", "no"), r"tokenizer_config\.json: .*JSON"),
    _file("01", gone("base/tokenizer_config.json"), "no chat template|no tokenizer_config"),
    _file("04", cut("model/tokenizer.model", 0.3), r"tokenizer\.model"),
    _file("04", text("model/tokenizer.json", "{"), r"tokenizer\.json: .*JSON"),
    # The base: weights.
    _file("02", cut("base/model.safetensors"), r"model\.safetensors: ends inside tensor"),
    _file("03", cut("base/model.safetensors", 0.0), r"model\.safetensors: not a safetensors file"),
    _file(
        "03",
        text("base/model.safetensors", "\x10\0\0\0\0\0\0\0{{{{{{{{{{{{{{{{"),
        "model.safetensors: .*header",
    ),
    _file("02", gone("base/model.safetensors"), r"expected model\.safetensors"),
    _file("02", sharded("../shard.safetensors"), r"index\.json: .*shard .*\.\./shard"),
    _file("03", sharded("sub/shard.safetensors"), r"index\.json: .*shard .*sub/shard"),
    _file("03", header("base/model.safetensors", _wrong_shape), r"down_proj.*config\.json"),
    _file("03", header("base/model.safetensors", _outside), r"model\.norm\.weight"),
    _file("04", header("model/model.safetensors", _outside), r"model\.norm\.weight"),
    _file("04", text("model/so8t_provenance.json", "{"), r"so8t_provenance\.json: .*JSON"),
    _file("04", text("model/so8t_provenance.json", "[]"), r"so8t_provenance\.json: .*JSON object"),
    # The adapter.
    _file("03", text(_ADAPTER, "{"), r"adapter_config\.json: .*JSON"),
    _file("03", edit(_ADAPTER, r=None), r"adapter_config\.json: .*`?r`?"),
    _file("03", edit(_ADAPTER, lora_alpha="x"), r"adapter_config\.json: .*lora_alpha"),
    _file("03", edit(_ADAPTER, r=9), "rank 4 in the weights, 9 in"),
    _file("03", cut(_WEIGHTS), r"adapter_model\.safetensors: ends inside"),
    _file("03", gone(_WEIGHTS), r"no file .*adapter_model\.safetensors"),
    _file("03", cut(_GATES), r"so8t_gates\.safetensors"),
    _file("03", text(_GATES, "rubbish"), r"so8t_gates\.safetensors"),
    _file("02", cut(_GATES), r"so8t_gates\.safetensors", lora__r=4, training__continue_from="HERE/adapter"),
    _file("02", gone(_GATES), r"so8t_gates\.safetensors", lora__r=4, training__continue_from="HERE/adapter"),
    # The data set.
    _file("02", text("data/train.jsonl", ""), r"train\.jsonl: .*no row"),
    _file("02", text("data/train.jsonl", json.dumps(ROW) + "\n{\n"), r"train\.jsonl, line 2"),
    _file("02", text("data/train.jsonl", '{"id": 1}\n'), r"train\.jsonl, line 1.*messages"),
    _file("03", text("data/eval.jsonl", ""), r"eval\.jsonl: .*no row"),
    _file("03", text("data/eval.jsonl", '{"id": 1}\n'), r"eval\.jsonl, line 1.*text"),
    _file("02", gone("data/train.jsonl"), r"no file .*train\.jsonl"),
    # Records.
    _file(
        "01", packed("r.jsonl.gz", gzip.compress, 0.5), r"r\.jsonl\.gz", dataset__inputs=["HERE/r.jsonl.gz"]
    ),
    _file(
        "01",
        packed("r.jsonl.zst", zstandard.ZstdCompressor().compress, 0.5),
        r"r\.jsonl\.zst",
        dataset__inputs=["HERE/r.jsonl.zst"],
    ),
    _file(
        "01",
        text("r.csv", "x,y\n1,2\n"),
        r"r\.csv: none of its columns is known",
        dataset__inputs=["HERE/r.csv"],
    ),
    _file("01", text("r.pdf", "%PDF-1.7"), r"r\.pdf: a PDF document", dataset__inputs=["HERE/r.pdf"]),
    _set("01", "dataset.inputs", [{"path": "HERE/records.jsonl", "formt": "csv"}], r"inputs\.0\.format`\?"),
    _set(
        "01",
        "dataset.inputs",
        [{"path": "HERE/records.jsonl", "labels": {"0": "maybe"}}],
        r"records\.jsonl: 'maybe' is none of ALLOW",
    ),
    _file("01", packed("r.jsonl.gz", _damaged, 1.0), r"r\.jsonl\.gz", dataset__inputs=["HERE/r.jsonl.gz"]),
]
