"""The files against the real thing: llama.cpp's own converter, quantiser, imatrix and perplexity tools.

`.ci/llama_cpp.sh` builds them and prints the folder that SO8T_LLAMA_CPP names.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import phi3_folders
import pytest
from test_gguf_export import ALL_TYPES, make_settings

from so8t_helpers.gguf import imatrix, quality
from so8t_helpers.gguf.stage import GgufResult, export
from so8t_helpers.gguf.weights import gguf_weights
from so8t_helpers.phi3.stream import read_config

CONVERTED = ("f16", "bf16", "q8_0")
QUANTISED = ("q4_k_m", "q5_k_m", "q6_k")
# What ours says on purpose: the profile's name and no guesses from the folder's, and the model's origin.
OURS = {"general.name", "general.basename", "general.finetune", "general.version", "so8t.provenance"}

pytestmark = pytest.mark.skipif(
    "SO8T_LLAMA_CPP" not in os.environ,
    reason="SO8T_LLAMA_CPP does not name llama.cpp's tools; .ci/llama_cpp.sh builds them",
)


def run_tool(*command: str | Path) -> str:
    """Run one of llama.cpp's programs; a failure shows its output."""
    tools = Path(os.environ["SO8T_LLAMA_CPP"])
    first = Path(command[0])
    program = (
        [tools / "bin" / first] if first.suffix != ".py" else [sys.executable, tools / "converter" / first]
    )
    # The converter wants its own gguf module, which must not stand in the environment.
    environment = {**os.environ, "PYTHONPATH": str(tools / "converter")}
    done = subprocess.run(
        [*program, *command[1:]], capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def make_reference(folder: Path, target: Path) -> dict[str, Path]:
    """Convert a Phi3 folder with llama.cpp's own programs to every file type."""
    files = {kind: target / f"reference-{kind}.gguf" for kind in (*CONVERTED, *QUANTISED)}
    for kind in CONVERTED:
        run_tool("convert_hf_to_gguf.py", folder, "--outtype", kind, "--outfile", files[kind])
    for kind in QUANTISED:
        run_tool("llama-quantize", files["f16"], files[kind], kind, "2")
    return files


def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def assert_same(ours: Path, theirs: Path, share_of_other_bytes: float) -> None:
    """Same keys, values, tensors, shapes, types; bytes equal but for a share of each tensor's."""
    mine, reference = metadata(ours), metadata(theirs)
    assert {k: v for k, v in mine.items() if k not in OURS} == {
        k: v for k, v in reference.items() if k not in OURS
    }
    own = {t.name: t for t in gguf.GGUFReader(ours).tensors}
    other = {t.name: t for t in gguf.GGUFReader(theirs).tensors}
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert tensor.tensor_type == other[name].tensor_type, name
        assert tensor.shape.tolist() == other[name].shape.tolist(), name
        a, b = (np.asarray(t.data).reshape(-1).view(np.uint8) for t in (tensor, other[name]))
        assert (a != b).mean() <= share_of_other_bytes, name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GgufResult, dict[str, Path]]:
    root = tmp_path_factory.mktemp("parity")
    folder = phi3_folders.small_folder(root / "small", layers=3)
    return folder, export(make_settings(root, folder, types=ALL_TYPES)), make_reference(folder, root)


# The k-quants search their scales with float32 sums, which AVX2 and AVX-512 add up in different orders: now
# and then a scale or a level comes out one step away. On a machine where both are compiled alike: no byte.
@pytest.mark.parametrize(("kind", "share"), [*((k, 0.0) for k in CONVERTED), *((k, 1e-3) for k in QUANTISED)])
def test_small_model(small: tuple[Path, GgufResult, dict[str, Path]], kind: str, share: float) -> None:
    _, result, reference = small
    assert_same(result.files[kind], reference[kind], share)
    assert "phi3" in metadata(result.files[kind])["general.name"]


def test_rows_that_256_does_not_divide(tmp_path: Path) -> None:
    """Fallback types: hidden size 224 gives Q5_0 and Q8_0, a feed-forward of 200 gives F16."""
    folder = phi3_folders.small_folder(
        tmp_path / "odd", hidden_size=224, intermediate_size=200, num_attention_heads=7, num_key_value_heads=7
    )
    result = export(make_settings(tmp_path, folder, types=ALL_TYPES))
    reference = make_reference(folder, tmp_path)
    for kind in ALL_TYPES:
        assert_same(result.files[kind], reference[kind], 1e-3)


def test_imatrix_is_llama_cpps(small: tuple[Path, GgufResult, dict[str, Path]], tmp_path: Path) -> None:
    """The sums of squares of `llama-imatrix`, and the same bytes from `llama-quantize --imatrix`."""
    folder, result, reference = small
    text = "\n".join(f"{line} {i}" for i in range(20) for line in phi3_folders.TEXTS)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    run_tool(
        *("llama-imatrix", "-m", reference["f16"], "-f", tmp_path / "text.txt"),
        *("-o", tmp_path / "theirs.gguf", "-c", "128", "-b", "128", "--no-ppl"),
    )
    chunks = chunks_of_128(folder, text)
    mine = imatrix.measure(read_config(folder), gguf_weights(result.files["f16"]), chunks, lambda: None)
    found = {t.name: np.array(t.data).reshape(-1) for t in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors}
    assert {n.removesuffix(".in_sum2") for n in found if n.endswith(".in_sum2")} == set(mine.sums)
    assert mine.tokens == 128 * len(chunks)
    for name, sums in mine.sums.items():
        assert found[f"{name}.counts"][0] == mine.tokens
        # llama.cpp multiplies F16 weights with F16 activations, so activations differ in the third digit.
        np.testing.assert_allclose(sums, found[f"{name}.in_sum2"], rtol=0.02, atol=1e-4 * sums.max())


def test_quantising_with_an_imatrix_is_llama_cpps(
    small: tuple[Path, GgufResult, dict[str, Path]], tmp_path: Path
) -> None:
    folder, _, reference = small
    settings = make_settings(tmp_path, folder, types=["q4_k_m"], imatrix=True)
    rows = [json.dumps({"text": text * 3}) for text in phi3_folders.TEXTS]
    (tmp_path / "dataset" / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    result = export(settings)
    matrix = settings.run_dir / "04_gguf" / imatrix.FILE
    theirs = tmp_path / "theirs.gguf"
    run_tool("llama-quantize", "--imatrix", matrix, reference["f16"], theirs, "q4_k_m", "2")
    own, other = metadata(result.files["q4_k_m"]), metadata(theirs)
    assert own.pop("quantize.imatrix.file") == imatrix.FILE
    assert other.pop("quantize.imatrix.file") == str(matrix)[:127]  # its key holds no more
    assert {k: v for k, v in own.items() if k not in OURS} == {
        k: v for k, v in other.items() if k not in OURS
    }
    a = {t.name: t for t in gguf.GGUFReader(result.files["q4_k_m"]).tensors}
    plain = {t.name: t for t in gguf.GGUFReader(reference["q4_k_m"]).tensors}
    for tensor in gguf.GGUFReader(theirs).tensors:
        differing = (np.asarray(tensor.data) != np.asarray(a[tensor.name].data)).mean()
        assert differing <= 1e-3, tensor.name
        if tensor.name.endswith("attn_output.weight"):
            assert (np.asarray(tensor.data) != np.asarray(plain[tensor.name].data)).mean() > 0.01


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_perplexity_is_llama_perplexitys(
    small: tuple[Path, GgufResult, dict[str, Path]], tmp_path: Path, kind: str
) -> None:
    """Same text, same windows: the second half of every 128 tokens, as llama-perplexity counts."""
    folder, result, _ = small
    text = "\n".join(f"{line} {i}" for i in range(20) for line in phi3_folders.TEXTS)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    command = ("llama-perplexity", "-m", result.files[kind], "-f", tmp_path / "text.txt")
    for _ in range(20):  # on a busy machine it now and then ends before its log's last line is written
        output = run_tool(*command, "-c", "128", "-b", "128", "-t", "2")
        if estimate := re.findall(r"Final estimate: PPL = ([\d.]+)", output):
            break
    theirs = float(estimate[0])
    config, chunks = read_config(folder), chunks_of_128(folder, text)
    states = quality.run_texts(
        config, gguf_weights(result.files[kind]), chunks, lambda: None, first_scored=65
    )
    mine = quality.compare(states, states)["perplexity"]
    # llama.cpp rounds activations to F16, for quantised weights to 8 bits in blocks of 32 or 256.
    assert mine == pytest.approx(theirs, rel={"f16": 1e-3, "q8_0": 5e-3, "q4_k_m": 1e-2}[kind])


def chunks_of_128(folder: Path, text: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    return [ids[i : i + 128] for i in range(0, len(ids) - 127, 128)]


@pytest.mark.slow
@pytest.mark.skipif(not phi3_folders.REAL.is_dir(), reason="needs the published tokenizer and configuration")
def test_real_shapes_with_the_real_tokenizer(tmp_path: Path) -> None:
    folder = phi3_folders.real_folder(tmp_path / "Borea-Phi-3.5-mini-Instruct-Jp", layers=2)
    result = export(make_settings(tmp_path, folder, types=["f16", "q8_0", "q4_k_m"], o_proj_study=False))
    files = {kind: tmp_path / f"reference-{kind}.gguf" for kind in result.files}
    for kind in ("f16", "q8_0"):
        run_tool("convert_hf_to_gguf.py", folder, "--outtype", kind, "--outfile", files[kind])
    run_tool("llama-quantize", files["f16"], files["q4_k_m"], "q4_k_m", "2")
    for kind, path in result.files.items():
        assert_same(path, files[kind], 1e-3 if kind == "q4_k_m" else 0.0)
