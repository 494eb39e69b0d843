"""The importance matrix, and o_proj's error with and without the baked rotation."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import libgguf
import numpy as np
import phi3_folders
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from test_gguf_export import make_settings
from transformers import Phi3ForCausalLM

from so8t_helpers.gguf import imatrix, o_proj, quality
from so8t_helpers.gguf.convert import dequantize_rows, quantize_rows
from so8t_helpers.gguf.layout import collect_tensors
from so8t_helpers.gguf.metadata import read_model
from so8t_helpers.gguf.stage import export
from so8t_helpers.gguf.weights import checkpoint_weights
from so8t_helpers.phi3.stream import Read, read_config
from so8t_helpers.phi3.weights import read_checkpoint
from so8t_helpers.run.files import StageError
from so8t_helpers.run.stage import read_manifest
from so8t_helpers.so8 import rotation

TEXTS = [list(range(5, 45)), list(range(300, 320))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phi3_folders.small_folder(tmp_path_factory.mktemp("measure") / "small")


@pytest.fixture(scope="module")
def read(folder: Path) -> Read:
    places = read_checkpoint(folder)
    return checkpoint_weights(collect_tensors(places, read_model(folder, 0)))


def linear_inputs(folder: Path, name: str) -> torch.Tensor:
    """Inputs of a linear over `TEXTS`, (tokens, in), from transformers in float64."""
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for ids in TEXTS:
            model(torch.tensor([ids]))
    return torch.cat(seen)


def test_imatrix_sums_squares_of_each_linears_input(folder: Path, read: Read) -> None:
    matrix = imatrix.measure(read_config(folder), read, TEXTS, lambda: None)
    assert matrix.tokens == 60 and len(matrix.sums) == 2 * 4
    for module, name in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
        expected = linear_inputs(folder, f"model.layers.1.{module}").square().sum(0)
        found = torch.from_numpy(matrix.sums[f"blk.1.{name}.weight"]).double()
        # float32 activations after two layers, relative to the largest column
        assert (found - expected).abs().max() < 1e-4 * expected.max()


def test_imatrix_file_is_read_by_others_and_by_us(tmp_path: Path, folder: Path, read: Read) -> None:
    matrix = imatrix.measure(read_config(folder), read, TEXTS, lambda: None)
    path = tmp_path / imatrix.FILE
    imatrix.save(path, matrix, "key")
    others = libgguf.load_imatrix(path)
    assert others.keys() == matrix.sums.keys()
    for name, mean in matrix.importance().items():
        np.testing.assert_allclose(others[name], mean, rtol=1e-6)
    again = imatrix.load(path, "key")
    assert again is not None and again.tokens == matrix.tokens and again.texts == matrix.texts
    assert all(np.array_equal(again.sums[name], sums) for name, sums in matrix.sums.items())
    assert imatrix.load(path, "another key") is None


@pytest.mark.parametrize("kind", [Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_importance_lowers_the_error_that_it_weighs(kind: Q) -> None:
    generator = np.random.default_rng(3)
    rows = generator.standard_normal((64, 512)).astype(np.float32)
    importance = np.exp(3 * generator.standard_normal(512)).astype(np.float32)
    error = [
        (importance * (dequantize_rows(quantize_rows(rows, kind, weights), kind) - rows) ** 2).sum()
        for weights in (importance, None)
    ]
    assert error[0] < 0.9 * error[1]


def test_export_with_an_imatrix(tmp_path: Path, folder: Path) -> None:
    settings = make_settings(tmp_path, folder, types=["f16", "q8_0", "q4_k_m"], imatrix=True)
    with pytest.raises(StageError, match=r"gguf\.imatrix: no training texts"):
        export(settings)
    rows = [json.dumps({"text": text}) for text in phi3_folders.TEXTS]
    (tmp_path / "dataset" / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    result = export(settings)
    fields = gguf.GGUFReader(result.files["q4_k_m"]).fields
    assert fields["quantize.imatrix.entries_count"].contents() == 8
    assert "quantize.imatrix.file" not in gguf.GGUFReader(result.files["q8_0"]).fields
    files = result.quality["files"]
    assert files["q4_k_m"]["kl_mean"] != files["q4_k_m"]["kl_mean_without_imatrix"] > 0
    assert "kl_mean_without_imatrix" not in files["q8_0"]
    manifest = read_manifest(settings, "04_gguf")
    assert manifest is not None and "01_dataset/train.jsonl" in manifest["inputs"]
    stamp = result.files["q4_k_m"].stat().st_mtime_ns
    export(settings)
    assert result.files["q4_k_m"].stat().st_mtime_ns == stamp


def random_blocks(scale: float) -> torch.Tensor:
    free = rotation.initial_free(1, 256, scale, torch.Generator().manual_seed(2))
    return rotation.rotation(free[0])


def test_quantising_before_the_rotation_stands_for_the_same_weight() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    blocks = random_blocks(1.0)
    for found in (o_proj.quantised(weight, Q.Q8_0, None, 2), o_proj.quantised(weight, Q.Q8_0, blocks, 2)):
        assert 0 < (found - weight).abs().max() < 0.05  # two half steps of Q8_0 for weights up to 4
    identity = torch.eye(8).expand(32, 8, 8)
    assert torch.equal(
        o_proj.quantised(weight, Q.Q4_K, identity, 2), o_proj.quantised(weight, Q.Q4_K, None, 3)
    )


def test_a_rotation_that_spreads_outliers_helps() -> None:
    """One heavy column in every block of eight: mixed with the others, it costs them fewer levels."""
    plain = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    plain[:, ::8] *= 20
    blocks = random_blocks(1.0)
    baked = rotation.bake_rotation(plain, blocks)
    rotated = (o_proj.quantised(baked, Q.Q4_K, None, 1) - baked).square().mean()
    unrotated = (o_proj.quantised(baked, Q.Q4_K, blocks, 1) - baked).square().mean()
    assert rotated < 0.9 * unrotated


def test_output_errors_are_those_of_the_layers_own_inputs(folder: Path, read: Read) -> None:
    names = [f"blk.{i}.attn_output.weight" for i in range(2)]
    blocks = {1: random_blocks(0.3)}  # layer 0 has no gate
    types = {"q4_k_m": dict.fromkeys(names, Q.Q4_K)}
    study = o_proj.Study(read_config(folder), read, TEXTS, blocks, types, 2, lambda: None)
    rows = o_proj.output_errors(study)
    assert [(row["layer"], row["file"]) for row in rows] == [(0, "q4_k_m"), (1, "q4_k_m")]
    assert rows[0]["unrotated"] is None
    x = linear_inputs(folder, "model.layers.1.self_attn.o_proj")
    exact = read(names[1])
    for key, outside in (("rotated", None), ("unrotated", blocks[1])):
        error = (o_proj.quantised(exact, Q.Q4_K, outside, 1) - exact).double()
        expected = (x @ error.T).norm() / (x @ exact.double().T).norm()
        assert rows[1][key] == pytest.approx(expected.item(), rel=1e-4)  # float32 activations


def test_divergence_of_o_proj_alone_is_a_part_of_the_files(folder: Path, read: Read) -> None:
    config = read_config(folder)
    names = [f"blk.{i}.attn_output.weight" for i in range(2)]
    types = {"q4_k_m": dict.fromkeys(names, Q.Q4_K)}
    reference = quality.run_texts(config, read, TEXTS, lambda: None)
    layers = [0]
    study = o_proj.Study(config, read, TEXTS, {}, types, 1, lambda: layers.append(0))
    found = o_proj.divergences(study, reference)["q4_k_m"]
    assert found.keys() == {"kl_o_proj"} and found["kl_o_proj"] > 0
    o_proj.output_errors(study)
    assert len(layers) - 1 == o_proj.passes(types, {}) * config.num_hidden_layers
