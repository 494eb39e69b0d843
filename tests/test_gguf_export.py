"""04_gguf without llama.cpp's own tools: what is written, what is refused, what is measured."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import gguf
import numpy as np
import phi3_folders
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Phi3ForCausalLM

from so8t_helpers.engines.llama_cpp import open_llama_cpp
from so8t_helpers.gguf import convert, quality, writer
from so8t_helpers.gguf.convert import dequantize_rows, quantize_rows
from so8t_helpers.gguf.metadata import general_name
from so8t_helpers.gguf.parity import check_tokens
from so8t_helpers.gguf.stage import GgufResult, export
from so8t_helpers.gguf.types import FILE_TYPES, byte_size, bytes_per_weight, tensor_type
from so8t_helpers.gguf.weights import gguf_weights
from so8t_helpers.phi3.shape import Phi3Shape, gguf_name
from so8t_helpers.phi3.stream import read_config
from so8t_helpers.run.files import StageError
from so8t_helpers.run.stage import read_manifest, stale_reason
from so8t_helpers.settings import GgufSettings, Settings, load_settings
from so8t_helpers.verbs.needs import PHI35_BYTES

ALL_TYPES = list(FILE_TYPES)


def make_settings(root: Path, model: Path, **section: object) -> Settings:
    """Settings of a run in `root` that exports `model` and has the fixed texts as its held-out set."""
    dataset = root / "dataset"
    dataset.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text}) for text in phi3_folders.TEXTS]
    (dataset / "eval.jsonl").write_text("\n".join(rows), encoding="utf-8")
    overrides = {
        "run": {"root": str(root / "runs")},
        "training": {"dataset_dir": str(dataset)},
        "gguf": {"model_dir": str(model), "types": ["f16", "q8_0", "q4_k_m"], **section},
    }
    return load_settings("demo", overrides)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phi3_folders.small_folder(tmp_path_factory.mktemp("gguf") / "small")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Settings, GgufResult]:
    settings = make_settings(tmp_path_factory.mktemp("exported"), model, types=ALL_TYPES)
    return settings, export(settings)


def copy_model(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_files_load_in_llama_cpp_and_generate(exported: tuple[Settings, GgufResult], kind: str) -> None:
    with open_llama_cpp(exported[1].files[kind], num_ctx=128, timeout=60) as engine:
        pieces = list(engine.complete("<|user|>\n東京<|end|>\n<|assistant|>\n", max_tokens=4))
    assert pieces[-1].tokens and pieces[-1].tokens > 0


def test_f16_file_holds_the_checkpoints_numbers(model: Path, exported: tuple[Settings, GgufResult]) -> None:
    weights = load_file(model / "model.safetensors")
    read = gguf_weights(exported[1].files["f16"])
    assert torch.equal(read("token_embd.weight"), weights["model.embed_tokens.weight"].float())
    assert torch.equal(read("output.weight"), weights["lm_head.weight"].float())
    fused = weights["model.layers.1.mlp.gate_up_proj.weight"].float()
    assert torch.equal(read("blk.1.ffn_up.weight"), fused)
    norm = weights["model.layers.0.post_attention_layernorm.weight"].float()
    assert torch.equal(read("blk.0.ffn_norm.weight"), norm)


@pytest.mark.parametrize(
    ("kind", "largest"),
    # Half a step of each format for weights drawn from N(0, 0.05): Q8_0 has 127 steps to the block's
    # largest, Q6_K 32, Q5_K 16 and Q4_K 8 to about 3 sigma, with a second rounding of the scales.
    [("bf16", 0.0016), ("q8_0", 0.0016), ("q6_k", 0.006), ("q5_k_m", 0.012), ("q4_k_m", 0.022)],
)
def test_quantised_weights_stay_within_half_a_step(
    model: Path, exported: tuple[Settings, GgufResult], kind: str, largest: float
) -> None:
    weights = load_file(model / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].float()
    found = gguf_weights(exported[1].files[kind])("blk.0.attn_output.weight")
    assert 0 < (found - weights).abs().max() < largest


def test_quality_is_ordered_and_f16_is_its_own_reference(exported: tuple[Settings, GgufResult]) -> None:
    files = exported[1].quality["files"]
    assert files["f16"]["kl_mean"] == 0 and files["f16"]["top1_agreement"] == 1
    divergences = [files[kind]["kl_mean"] for kind in ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")]
    assert divergences == sorted(divergences)
    assert files["q8_0"]["bits_per_weight"] == pytest.approx(8.5, abs=0.05)


def test_figures_equal_transformers_in_float64(model: Path, exported: tuple[Settings, GgufResult]) -> None:
    """The layer-streamed float32 figures against whole models in float64."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in phi3_folders.TEXTS]
    reference = Phi3ForCausalLM.from_pretrained(model, dtype=torch.float64)
    changed = Phi3ForCausalLM.from_pretrained(model, dtype=torch.float64)
    read = gguf_weights(exported[1].files["q4_k_m"])
    names = {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    with torch.no_grad():
        changed.model.embed_tokens.weight.copy_(read("token_embd.weight"))
        changed.lm_head.weight.copy_(read("output.weight"))
        for index, layer in enumerate(changed.model.layers):
            for module, name in names.items():
                layer.get_submodule(module).weight.copy_(read(f"blk.{index}.{name}.weight"))
        loss, divergence = [], []
        for ids in texts:
            batch = torch.tensor([ids])
            p = reference(batch).logits[0, :-1].log_softmax(-1)
            q = changed(batch).logits[0, :-1].log_softmax(-1)
            loss.append(-q.gather(1, batch[0, 1:, None])[:, 0])
            divergence.append((p.exp() * (p - q)).sum(-1))
    entry = exported[1].quality["files"]["q4_k_m"]
    # float32 against float64 over two layers: five digits of a mean over 130 positions.
    assert entry["perplexity"] == pytest.approx(torch.cat(loss).mean().exp().item(), rel=1e-5)
    assert entry["kl_mean"] == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-4)


def test_streamed_forward_honours_a_sliding_window(tmp_path: Path, model: Path) -> None:
    folder = copy_model(model, tmp_path / "window")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 8}), encoding="utf-8")
    settings = make_settings(tmp_path, folder, types=["f16"])
    read = gguf_weights(export(settings).files["f16"])
    ids = list(range(300, 340))
    states = quality.run_texts(read_config(folder), read, [ids], lambda: None)
    whole = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = whole.model(torch.tensor([ids])).last_hidden_state[0]
    assert torch.allclose(states.hidden, expected, atol=1e-4)  # float32, another order of sums


def test_a_second_export_writes_nothing(exported: tuple[Settings, GgufResult]) -> None:
    settings, result = exported
    assert stale_reason(settings, "04_gguf") is None
    before = {path: path.stat().st_mtime_ns for path in result.files.values()}
    export(settings)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_new_type_leaves_the_other_files_alone(tmp_path: Path, model: Path) -> None:
    first = export(make_settings(tmp_path, model, types=["q8_0"])).files["q8_0"]
    stamp = first.stat().st_mtime_ns
    result = export(make_settings(tmp_path, model, types=["q8_0", "q6_k"]))
    assert first.stat().st_mtime_ns == stamp
    assert result.files["q6_k"].is_file()
    assert result.quality["reference"] == "the model folder"  # without an F16 file
    export(make_settings(tmp_path, model, types=["q6_k"]))
    assert not first.exists()


def test_an_interrupted_pass_goes_on_where_it_stopped(
    tmp_path: Path, model: Path, exported: tuple[Settings, GgufResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after a few tensors; the second try skips them, and its files are the same bytes."""
    monkeypatch.setattr(writer, "_SYNC_BYTES", 1)  # a journal entry for every tensor
    settings = make_settings(tmp_path, model)
    finish = writer._finish
    finished: list[str] = []

    def interrupt(job: writer._Job, *arguments: object) -> None:
        if len(finished) == 6:
            raise KeyboardInterrupt
        finished.append(job.tensor.name)
        finish(job, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "_finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(settings)
    assert not list((settings.run_dir / "04_gguf").glob("*.gguf"))
    assert read_manifest(settings, "04_gguf") is None
    again: list[str] = []
    monkeypatch.setattr(
        writer, "_finish", lambda job, *rest: (again.append(job.tensor.name), finish(job, *rest))
    )
    result = export(settings)
    assert set(finished).isdisjoint(again) and again
    for kind, path in result.files.items():
        whole = exported[1].files[kind]
        sizes = {t.name: t.data.tobytes() for t in gguf.GGUFReader(whole).tensors}
        assert {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} == sizes
    assert not list(path.parent.glob(".*.part"))


def test_shards_give_the_same_tensors_as_one_file(
    tmp_path: Path, model: Path, exported: tuple[Settings, GgufResult]
) -> None:
    folder = copy_model(model, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    Phi3ForCausalLM.from_pretrained(model, dtype="auto").save_pretrained(
        tmp_path / "saved", max_shard_size="1MB"
    )
    for path in (tmp_path / "saved").glob("model*"):
        shutil.copy(path, folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    result = export(make_settings(tmp_path, folder))
    for kind, path in result.files.items():
        expected = {t.name: t.data.tobytes() for t in gguf.GGUFReader(exported[1].files[kind]).tensors}
        assert {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} == expected


def test_provenance_names_the_models_files(model: Path, exported: tuple[Settings, GgufResult]) -> None:
    field = gguf.GGUFReader(exported[1].files["q8_0"]).get_field("so8t.provenance")
    assert field is not None
    carried = json.loads(field.contents())
    assert carried["run"] == "demo"
    assert set(carried["model"]) >= {"config.json", "model.safetensors", "tokenizer.model"}


@pytest.mark.parametrize(
    ("name", "sentencepiece", "bpe"),
    [
        ("phi3-so8t", "phi3-so8t", "phi_3-so8t"),
        ("Borea-Phi-3.5-so8t", "Borea-Phi-3.5-so8t", "Borea-Phi_3.5-so8t"),
        ("borea", "phi3-borea", "borea"),
    ],
)
def test_general_name_is_one_that_llama_cpp_strips_for_or_not(
    name: str, sentencepiece: str, bpe: str
) -> None:
    assert general_name(name, "sentencepiece") == sentencepiece
    assert general_name(name, "bpe") == bpe


def test_other_token_ids_are_an_error(
    tmp_path: Path, model: Path, exported: tuple[Settings, GgufResult]
) -> None:
    """A tokenizer that keeps the white space behind <|end|> is not the GGUF's."""
    folder = copy_model(model, tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert '"rstrip": true' in text
        (folder / name).write_text(text.replace('"rstrip": true', '"rstrip": false'), encoding="utf-8")
    with pytest.raises(StageError, match="other tokens than it was trained on"):
        check_tokens(exported[1].files["q8_0"], folder, [], timeout=60)


@pytest.mark.skipif(not phi3_folders.REAL.is_dir(), reason="needs the published tokenizer")
def test_the_real_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    folder = phi3_folders.small_folder(tmp_path / "real-tokenizer", layers=1, vocab_size=32064)
    for path in (*phi3_folders.REAL.glob("*token*"), phi3_folders.REAL / "chat_template.jinja"):
        (folder / path.name).unlink(missing_ok=True)
        shutil.copyfile(path, folder / path.name)
    result = export(make_settings(tmp_path, folder, types=["q8_0"]))
    assert result.quality["token_parity"]["texts"] > 5 * 14  # 14 added tokens, five samples each


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _set(name: str, value: float) -> Callable[[Path], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name][3, 5] = value

    return lambda folder: change_weights(folder, change)


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda w: w.update({new: w.pop(old)}))


def _config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")

    return change


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove("tokenizer.model"), "tokenizer.model"),
        (_remove("config.json"), "run 03_bake, or set gguf.model_dir"),
        (_remove("model.safetensors"), "model.safetensors"),
        (_set(DOWN, float("nan")), r"down_proj.weight, row 3, column 5: the weight is nan"),
        (_set(DOWN, float("-inf")), r"row 3, column 5: the weight is -inf"),
        (_rename(DOWN, "model.layers.1.mlp.down_proj.lora_A.weight"), "lora_A.weight has no place"),
        (_rename(DOWN, "model.layers.7.mlp.down_proj.weight"), "layers.7.* has no place in a GGUF"),
        (_config(intermediate_size=512), "config.json says"),
        (_config(num_hidden_layers=3), "tensors are missing, the first is blk.2"),
        (_config(rope_scaling=None), "longrope factors are missing"),
        (_config(vocab_size=1440), "config.json says"),
    ],
)
def test_a_spoilt_model_is_one_clear_error(
    tmp_path: Path, model: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = copy_model(model, tmp_path / "spoilt")
    spoil(folder)
    settings = make_settings(tmp_path, folder, types=["f16", "q4_k_m"])
    with pytest.raises(StageError, match=message):
        export(settings)
    assert not list((settings.run_dir / "04_gguf").glob("*.gguf"))


def test_bfloat16_beyond_float16_needs_bf16(tmp_path: Path) -> None:
    folder = phi3_folders.small_folder(tmp_path / "bf16", layers=1, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"
    change_weights(folder, lambda weights: weights[name].__setitem__((2, 1), 70000.0))
    with pytest.raises(StageError, match=r"down_proj.weight, row 2, column 1: 70144 does not fit float16"):
        export(make_settings(tmp_path, folder, types=["f16", "bf16"]))
    result = export(make_settings(tmp_path, folder, types=["bf16", "q8_0"]))
    found = gguf_weights(result.files["bf16"])("blk.0.ffn_down.weight")
    assert torch.equal(found, load_file(folder / "model.safetensors")[name].float())


def test_too_little_disk_is_said_before_writing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    settings = make_settings(tmp_path, model)
    with pytest.raises(StageError, match=r"3 GGUF files needs \d\.\d MiB"):
        export(settings)
    assert not [p for p in (settings.run_dir / "04_gguf").iterdir() if p.stat().st_size > 2**20]


@pytest.mark.parametrize("doubled", [False, True])
def test_tied_embeddings_take_the_outputs_type(tmp_path: Path, doubled: bool) -> None:
    """Whether or not the checkpoint holds the head as well, which is a copy then."""
    folder = phi3_folders.small_folder(tmp_path / "tied", layers=1, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    if doubled:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = export(make_settings(tmp_path, folder, types=["q4_k_m"]))
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(result.files["q4_k_m"]).tensors}
    assert "output.weight" not in types and types["token_embd.weight"] == Q.Q6_K


@pytest.mark.parametrize(
    ("name", "row", "layers", "expected"),
    [
        ("output.weight", 3072, 32, Q.Q6_K),
        ("token_embd.weight", 3072, 32, Q.Q4_K),
        ("blk.3.ffn_down.weight", 8192, 32, Q.Q6_K),  # 3 < 32 / 8
        ("blk.4.ffn_down.weight", 8192, 32, Q.Q4_K),
        ("blk.6.attn_qkv.weight", 3072, 32, Q.Q6_K),  # (6 - 4) % 3 == 2
        ("blk.28.attn_qkv.weight", 3072, 32, Q.Q6_K),  # 28 >= 7 * 32 / 8
        ("blk.31.attn_output.weight", 3072, 32, Q.Q4_K),
        ("blk.0.ffn_up.weight", 96, 32, Q.Q5_0),  # 256 does not divide 96, 32 does
        ("blk.0.attn_qkv.weight", 96, 32, Q.Q8_0),
        ("output.weight", 96, 32, Q.Q8_0),
        ("blk.0.ffn_up.weight", 40, 32, Q.F16),
        ("blk.0.attn_norm.weight", 3072, 32, Q.F32),
    ],
)
def test_q4_k_m_mixes_as_llama_quantize_does(name: str, row: int, layers: int, expected: Q) -> None:
    shape = (row,) if name.endswith("norm.weight") else (16, row)
    assert tensor_type(FILE_TYPES["q4_k_m"], name, shape, layers, tied=False) == expected


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0])
def test_16_and_8_bit_bytes_are_those_of_ggufs_own_code(kind: Q) -> None:
    rows = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    rows[0, :4] = [0.0, -0.0, 6e-8, 1e-7]  # zeros and float16's subnormals
    expected = gguf.quants.quantize(rows, kind).view(np.uint8)
    assert np.array_equal(quantize_rows(rows, kind), expected)
    assert np.array_equal(dequantize_rows(expected, kind), gguf.quants.dequantize(expected, kind))


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.Q5_0, Q.Q5_1])
@pytest.mark.parametrize("weighed", [False, True])
def test_both_builds_of_ggml_give_the_same_bytes(kind: Q, weighed: bool) -> None:
    fast = convert.exported()
    if fast is None:
        pytest.skip("this platform's xllamacpp exports no symbols")
    generator = np.random.default_rng(3)
    rows = generator.standard_normal((96, 512)).astype(np.float32) * 0.05
    rows[:4, :256] = [[0.0], [1.0], [-3e-8], [1e4]]  # blocks of one value
    importance = generator.random(512, dtype=np.float32) if weighed else None
    assert np.array_equal(fast(rows, kind, importance), convert.packaged(rows, kind, importance))


def test_rows_and_importance_that_do_not_fit_are_refused() -> None:
    fast = convert.exported()
    if fast is None:
        pytest.skip("this platform's xllamacpp exports no symbols")
    with pytest.raises(ValueError, match="blocks of 256"):
        fast(np.zeros((1, 128), dtype=np.float32), Q.Q4_K, None)
    with pytest.raises(ValueError, match="256 columns"):
        fast(np.zeros((1, 256), dtype=np.float32), Q.Q4_K, np.ones(8, dtype=np.float32))


def test_the_profile_knows_every_file_type() -> None:
    (element,) = get_args(get_type_hints(GgufSettings)["types"])
    assert set(get_args(element)) == set(FILE_TYPES)


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_bytes_a_weight_are_those_of_phi_35(kind: str) -> None:
    shape = Phi3Shape(
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        vocab_size=32064,
        rms_eps=1e-5,
        rope_theta=1e4,
        rotary_dim=96,
        short_factor=None,
        long_factor=None,
        max_positions=131072,
        original_max_positions=4096,
        sliding_window=None,
        tie_embeddings=False,
    )
    sizes, weights = 0, 0
    for name, size in shape.tensor_shapes().items():
        chosen = tensor_type(FILE_TYPES[kind], str(gguf_name(name)), size, shape.num_layers, tied=False)
        sizes, weights = sizes + byte_size(chosen, size), weights + math.prod(size)
    assert weights * 2 == PHI35_BYTES
    assert bytes_per_weight(kind) == pytest.approx(sizes / weights, rel=0.005)
