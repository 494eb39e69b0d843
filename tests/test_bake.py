"""Baking against dense float64 and against transformers, on a small Phi3 with random rotations."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from so8t_helpers.bake import proof, proof_model
from so8t_helpers.bake.stage import bake
from so8t_helpers.phi3 import shape
from so8t_helpers.phi3 import weights as phi3_weights
from so8t_helpers.phi3.stream import read_config
from so8t_helpers.run import origin
from so8t_helpers.run.files import StageError
from so8t_helpers.run.stage import read_manifest
from so8t_helpers.settings import Settings, validate
from so8t_helpers.so8 import rotation

HIDDEN, LAYERS, RANK = 64, 3, 4
SHAPES = {
    "self_attn.qkv_proj": (3 * HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_up_proj": (2 * 96, HIDDEN),
    "mlp.down_proj": (HIDDEN, 96),
}
TEXTS = ["東京は日本の首都です。", "水は零度で凍る。", "猫が庭で寝ている。"]


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(set("".join(TEXTS)))
    vocabulary = {token: i for i, token in enumerate(["<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "tokenizer.model").write_bytes(b"\x00 any bytes \xff")
    (folder / "added_tokens.json").write_text("{}")


def make_base(folder: Path, dtype: torch.dtype, shard_size: str = "1GB", window: int | None = None) -> Path:
    torch.manual_seed(0)
    half = HIDDEN // 4 // 2
    config = Phi3Config(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        sliding_window=window,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 10 for i in range(half)],
            "long_factor": [2.0 + i for i in range(half)],
        },
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.15,
    )
    Phi3ForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# base\n", encoding="utf-8")
    return folder


def make_adapter(folder: Path, gates: list[int] | None, seed: int = 1, **config: object) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.1
            weights[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    data = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(data))
    if gates is not None:
        # init_scale 1: rotations far from the identity and far from symmetric, so W R and W R^T differ.
        free = rotation.initial_free(len(gates), HIDDEN, 1.0, generator)
        rotation.save_gates(folder / rotation.GATES_FILE, rotation.Gates(free, gates))
    return folder


def make_settings(tmp_path: Path, base: Path, adapter: Path, **bake_settings: object) -> Settings:
    dataset = tmp_path / "dataset"
    dataset.mkdir(exist_ok=True)
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    (dataset / "eval.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    data = {
        "run": {"name": "t", "root": str(tmp_path / "runs")},
        "model": {"base": str(base)},
        "training": {"dataset_dir": str(dataset)},
        "so8t": {"enabled": (adapter / rotation.GATES_FILE).is_file()},
        "bake": {"adapter_dir": str(adapter), **bake_settings},
    }
    return validate(data, "test")


def expected_weights(base: Path, adapter: Path, scale: float) -> dict[str, torch.Tensor]:
    """W' = (W + s B A) R, densely in float64, from PEFT's and our own files."""
    weights = {name: place.read().double() for name, place in phi3_weights.read_checkpoint(base).items()}
    lora = load((adapter / "adapter_model.safetensors").read_bytes())
    for key in [k for k in lora if ".lora_A." in k]:
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[name] += scale * lora[key.replace("lora_A", "lora_B")].double() @ lora[key].double()
    if (adapter / rotation.GATES_FILE).is_file():
        gates = rotation.load_gates(adapter / rotation.GATES_FILE)
        for free, layer in zip(gates.free, gates.layers, strict=True):
            dense = torch.block_diag(*torch.matrix_exp(rotation.skew(free.double())))
            weights[shape.o_proj_name(layer)] @= dense
    return weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_baked_folder_is_the_dense_product(tmp_path: Path, dtype: torch.dtype, shard_size: str) -> None:
    base = make_base(tmp_path / "base", dtype, shard_size)
    assert (base / phi3_weights.INDEX_FILE).is_file() == (shard_size == "100KB")
    adapter = make_adapter(tmp_path / "adapter", gates=[0, 2])
    result = bake(make_settings(tmp_path, base, adapter, max_shard_gib=100e3 / 2**30))
    assert (result.model_dir / phi3_weights.INDEX_FILE).is_file()
    expected = expected_weights(base, adapter, scale=8 / RANK)
    model = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype="auto")
    assert model.dtype == dtype
    # Half a unit in the last place for the one rounding; float32 sums of 64 products add far less.
    unit = torch.finfo(dtype).eps / 2 + 1e-6
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name].double(), value, rtol=unit, atol=2e-6, msg=name)
    assert result.proof["holds"] and result.proof["gated_layers"] == [0, 2]


def test_what_nothing_changes_passes_byte_for_byte(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", gates=[1])
    lora = load((adapter / "adapter_model.safetensors").read_bytes())
    kept = {key: value for key, value in lora.items() if ".layers.1." in key}
    save_file(kept, adapter / "adapter_model.safetensors")
    result = bake(make_settings(tmp_path, base, adapter))
    before, after = phi3_weights.read_checkpoint(base), phi3_weights.read_checkpoint(result.model_dir)
    assert list(before) == list(after)
    for name in before:
        same = torch.equal(_bits(before[name]), _bits(after[name]))
        assert same == (".layers.1." not in name or "norm" in name), name
    for name in ("tokenizer.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        assert (result.model_dir / name).read_bytes() == (base / name).read_bytes()


def _bits(place: phi3_weights.TensorPlace) -> torch.Tensor:
    return place.read().view(torch.int16)


def test_without_gates_lora_alone_is_merged(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", gates=None, use_rslora=True)
    result = bake(make_settings(tmp_path, base, adapter))
    expected = expected_weights(base, adapter, scale=8 / RANK**0.5)
    for name, place in phi3_weights.read_checkpoint(result.model_dir).items():
        torch.testing.assert_close(place.read().double(), expected[name], rtol=1e-6, atol=2e-6)


def test_rank_and_alpha_patterns_follow_peft(tmp_path: Path) -> None:
    """The update PEFT itself merges, for an adapter whose o_proj has a rank and alpha of its own."""
    from peft import LoraConfig, get_peft_model

    base = make_base(tmp_path / "base", torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["qkv_proj", "o_proj"],
        rank_pattern={"o_proj": 2},
        alpha_pattern={"layers.1.self_attn.o_proj": 32},
        init_lora_weights=False,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    result = bake(make_settings(tmp_path, base, tmp_path / "adapter"))
    for name, place in phi3_weights.read_checkpoint(result.model_dir).items():
        torch.testing.assert_close(place.read(), merged[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_layerwise_forward_is_transformers_own(tmp_path: Path) -> None:
    """Two texts, one padded, with a sliding window, on the float32 weights that both read."""
    base = make_base(tmp_path / "base", torch.float32, window=5)
    texts = [torch.randint(0, 128, (n,)).tolist() for n in (40, 23)]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        config, weights = read_config(base), phi3_weights.read_checkpoint(base)
        layer, hidden = proof_model.ExactLayer(config), proof_model.embed(texts, weights)
        for index in range(LAYERS):
            layer.set_norms(index, weights)
            for name, linear in layer.linears.items():
                linear.plain(weights[f"model.layers.{index}.{name}.weight"])
            layer.run(hidden)
        for ids, states in zip(texts, hidden, strict=True):
            logits = proof_model.head(config, weights)(states[: len(ids)])
            # transformers' norms and softmax go through float32.
            expected = model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_proofs_noise_is_far_below_what_it_measures(tmp_path: Path) -> None:
    """Nothing but LoRA of zeros: gated, baked and rounded are one model, and the figures must say so."""
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", gates=None)
    weights = load((adapter / "adapter_model.safetensors").read_bytes())
    save_file({k: w * ("lora_A" in k) for k, w in weights.items()}, adapter / "adapter_model.safetensors")
    logits = bake(make_settings(tmp_path, base, adapter)).proof["logits"]
    assert logits["baking"]["largest"] < 1e-12 and logits["rounding"]["largest"] < 1e-12


def test_proof_sees_a_transposed_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", gates=[0, 1, 2])
    settings = make_settings(tmp_path, base, adapter)
    bake(settings)
    original = rotation.bake_rotation
    monkeypatch.setattr(rotation, "bake_rotation", lambda w, r: original(w, r.transpose(-1, -2)))
    with pytest.raises(StageError, match="proof does not hold: logits"):
        bake(settings)
    directory = settings.run_dir / "03_bake"
    assert sorted(p.name for p in directory.iterdir()) == ["proof.json"]
    assert not json.loads((directory / "proof.json").read_text(encoding="utf-8"))["holds"]


def test_a_difference_that_is_no_number_breaks_its_bound() -> None:
    zeros, spoilt = torch.zeros(2, 4), torch.zeros(2, 4)
    spoilt[0, 1] = float("nan")
    difference = proof._Difference()
    for x in (zeros, spoilt, zeros):
        difference.add(x, zeros)
    assert math.isnan(difference.facts()["largest"])


def test_bound_that_float32_cannot_meet_fails_the_stage(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", gates=[0])
    settings = make_settings(tmp_path, base, adapter, logit_bound=1e-12)
    with pytest.raises(StageError, match=r"bake\.logit_bound 1e-12"):
        bake(settings)
    assert not (settings.run_dir / "03_bake" / "model").exists()
    assert read_manifest(settings, "03_bake") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("module", "has no such module"),
        ("shape", "does not fit the base's weight"),
        ("half", "expected lora_A and lora_B"),
        ("magnitude", "is not a LoRA weight"),
        ("dora", "only plain LoRA"),
        ("rank", "files of two trainings"),
        ("gates_width", "gates: width"),
        ("gates_layer", "gates: layer 7"),
        ("gates_lost", "is missing, but so8t.enabled is True"),
        ("no_texts", "missing input 01_dataset/eval.jsonl"),
        ("cut_base", "ends inside tensor"),
        ("nan", "no number or too large"),
    ],
)
def test_wrong_inputs_are_named(tmp_path: Path, change: str, message: str) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", gates=[0])
    settings = make_settings(tmp_path, base, adapter)
    weights = load((adapter / "adapter_model.safetensors").read_bytes())
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    free = torch.zeros(1, HIDDEN // 8, 28)
    if change == "module":
        weights = {k.replace("down_proj", "gate_proj"): value for k, value in weights.items()}
    elif change == "shape":
        weights[key] = torch.zeros(RANK, HIDDEN)
    elif change == "half":
        del weights[key]
    elif change == "magnitude":
        weights[key.replace("lora_A", "lora_magnitude_vector")] = torch.zeros(3)
    elif change == "nan":
        weights[key][0, 0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"dora": {"use_dora": True}, "rank": {"r": 8}}.get(change, {})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if change == "gates_width":
        rotation.save_gates(adapter / rotation.GATES_FILE, rotation.Gates(free[:, :4], [0]))
    elif change == "gates_layer":
        rotation.save_gates(adapter / rotation.GATES_FILE, rotation.Gates(free, [7]))
    elif change == "gates_lost":
        (adapter / rotation.GATES_FILE).unlink()
    elif change == "no_texts":
        (tmp_path / "dataset" / "eval.jsonl").unlink()
    elif change == "cut_base":
        path = base / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StageError, match=message):
        bake(settings)
    assert not list((settings.run_dir / "03_bake").glob("*model*"))


def _bake_slowly(settings: Settings, flag: Path) -> None:
    def slow(*_: object) -> None:
        flag.touch()
        time.sleep(60)

    proof_model.StreamedLayer.run = slow  # type: ignore[assignment]
    bake(settings)


@pytest.mark.slow
def test_a_killed_bake_leaves_no_model_and_the_next_one_works(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    settings = make_settings(tmp_path, base, make_adapter(tmp_path / "adapter", gates=[0]))
    flag = tmp_path / "proof_began"
    process = multiprocessing.get_context("spawn").Process(target=_bake_slowly, args=(settings, flag))
    process.start()
    for _ in range(3000):
        if flag.exists():
            break
        time.sleep(0.1)
    process.kill()
    process.join()
    directory = settings.run_dir / "03_bake"
    assert flag.exists() and not (directory / "model").exists()
    assert not (directory / "manifest.json").exists()
    bake(settings)
    assert sorted(p.name for p in directory.iterdir()) == ["manifest.json", "model", "proof.json"]


def test_config_serves_old_readers_and_new_ones(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    result = bake(make_settings(tmp_path, base, make_adapter(tmp_path / "adapter", gates=[0])))
    config = json.loads((result.model_dir / "config.json").read_text(encoding="utf-8"))
    # transformers 4.4x: Phi3Config._rope_scaling_validation wants exactly these three keys.
    assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert config["rope_scaling"]["type"] == "longrope"
    assert (config["rope_theta"], config["original_max_position_embeddings"]) == (10000.0, 64)
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    before, after = Phi3Config.from_pretrained(base), Phi3Config.from_pretrained(result.model_dir)
    differing = {k for k, v in before.to_dict().items() if after.to_dict().get(k) != v}
    assert differing <= {"rope_parameters", "transformers_version"}
    for length in (10, 100):  # short factors, long factors
        tables = [Phi3RotaryEmbedding(c)(torch.zeros(1), torch.arange(length)[None]) for c in (before, after)]
        torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=0)


def test_card_and_provenance_carry_the_hashes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    settings = make_settings(tmp_path, base, make_adapter(tmp_path / "adapter", gates=[0]))
    dataset_card = {
        "purpose": "For detection and refusal.",
        "lines": {"read": 1841, "train": 1633, "eval": 181, "quarantine": 27},
        "train": {"labels": {"ALLOW": 904, "DENY": 729}, "languages": {"en": 1600, "ja": 33}},
        "not_covered": "names of people",
        "inputs": [{"name": "records.jsonl", "sha256": "ab" * 32}],
        "settings": {"inputs": ["/home/somebody/records.jsonl"]},
    }
    (tmp_path / "dataset" / "card.json").write_text(json.dumps(dataset_card))
    result = bake(settings)
    carried = json.loads((result.model_dir / origin.FILE).read_text(encoding="utf-8"))
    card = (result.model_dir / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "license: mit" in card
    assert "\nlanguage:\n- en\nlibrary_name" in card, "33 of 1,633 samples are too few for a second language"
    for text in (
        "For detection and refusal.",
        "Of 1,841 input lines 1,633",
        "ALLOW 904, DENY 729",
        "ab" * 32,
    ):
        assert text in card
    assert str(tmp_path) not in card and "somebody" not in card
    for key in ("base", "adapter", "gates"):
        assert len(carried["sha256"][key]) == 64 and carried["sha256"][key] in card
