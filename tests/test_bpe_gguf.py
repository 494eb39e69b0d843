"""GGUF files of byte-level BPE: their vocabulary, against llama.cpp's own programs, and in its engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bpe_folders
import gguf
import phi3_folders
import pytest
from test_gguf_export import make_settings
from test_gguf_parity import CONVERTED, QUANTISED, assert_same, metadata, run_tool
from tokenizers import Tokenizer

from so8t_helpers.engines.base import EngineError
from so8t_helpers.engines.llama_cpp import open_llama_cpp
from so8t_helpers.engines.transformers_engine import open_transformers
from so8t_helpers.gguf import vocabulary
from so8t_helpers.gguf.parity import check_tokens
from so8t_helpers.gguf.stage import GgufResult, check, export
from so8t_helpers.gguf.weights import gguf_weights
from so8t_helpers.phi3.tokenizer_files import tokenizer_kind
from so8t_helpers.run.files import StageError

ALL_TYPES = [*CONVERTED, *QUANTISED]
FOLDERS = {"gpt-4o": bpe_folders.small_phi4_mini, "smollm": bpe_folders.small_smollm2}
real_smollm2 = pytest.mark.skipif(
    "SO8T_SMOLLM2" not in os.environ, reason="SO8T_SMOLLM2 does not name SmolLM2's GGUF file"
)


@pytest.fixture(scope="module", params=FOLDERS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, GgufResult]:
    """The name of a pre-tokenizer, a small folder that has it, and the files made of the folder."""
    root = tmp_path_factory.mktemp("bpe")
    folder = make(request.param, root / "small")
    return request.param, folder, export(make_settings(root, folder, types=ALL_TYPES, name="small-phi3"))


def make(pre: str, folder: Path) -> Path:
    """Make the small folder of a pre-tokenizer, whose marks strip no white space."""
    return FOLDERS[pre](folder, **({"rstrip": False} if pre == "gpt-4o" else {}))


def convert(folder: Path, kind: str, target: Path, pre: str) -> None:
    """Run llama.cpp's converter; a small tokenizer's ids have no name for it, so it is told one."""
    told = (
        "import sys; from conversion.base import TextModel; "
        f"TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}; "
        "import convert_hf_to_gguf; convert_hf_to_gguf.main()"
    )
    tools = Path(os.environ["SO8T_LLAMA_CPP"])
    done = subprocess.run(
        [sys.executable, "-c", told, folder, "--outtype", kind, "--outfile", target],
        env={**os.environ, "PYTHONPATH": str(tools / "converter")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.skipif("SO8T_LLAMA_CPP" not in os.environ, reason="needs llama.cpp's tools (.ci/llama_cpp.sh)")
def test_files_equal_the_converters_and_the_quantisers(
    exported: tuple[str, Path, GgufResult], tmp_path: Path
) -> None:
    """All metadata, all tensors' types and bytes: tied, GQA, partial rotary, padded or not, rows of 576."""
    pre, folder, result = exported
    for kind in CONVERTED:
        convert(folder, kind, tmp_path / f"{kind}.gguf", pre)
        assert_same(result.files[kind], tmp_path / f"{kind}.gguf", 0.0)
    for kind in QUANTISED:  # for the share of other bytes see test_gguf_parity
        run_tool("llama-quantize", tmp_path / "f16.gguf", tmp_path / f"{kind}.gguf", kind, "2")
        assert_same(result.files[kind], tmp_path / f"{kind}.gguf", 1e-3)


def test_a_tied_embedding_stands_once_and_the_vocabulary_is_as_long(
    exported: tuple[str, Path, GgufResult],
) -> None:
    pre, folder, result = exported
    said = metadata(result.files["f16"])
    tokens = said["tokenizer.ggml.tokens"]
    known = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    names = {tensor.name for tensor in gguf.GGUFReader(result.files["f16"]).tensors}
    assert "output.weight" not in names and ("rope_factors_long.weight" in names) == (pre == "gpt-4o")
    assert len(gguf_weights(result.files["f16"])("token_embd.weight")) == len(tokens)
    assert said["tokenizer.ggml.pre"] == pre and said["tokenizer.ggml.model"] == "gpt2"
    padding = sum(kind == gguf.TokenType.UNUSED for kind in said["tokenizer.ggml.token_type"])
    # As in the real Phi-4-mini: 18 ids without a token among its special ones, 35 rows behind the last.
    assert padding == len(tokens) - known == (18 + 35 if pre == "gpt-4o" else 0)
    assert said["general.name"] == "small-phi_3"


def test_rows_of_576_get_the_types_of_the_fallback(exported: tuple[str, Path, GgufResult]) -> None:
    pre, _, result = exported
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(result.files["q4_k_m"]).tensors}
    odd = pre == "smollm"
    assert types["token_embd.weight"] == ("Q8_0" if odd else "Q6_K")
    assert types["blk.0.attn_output.weight"] == ("Q5_0" if odd else "Q4_K")
    assert types["blk.0.ffn_down.weight"] in {"Q4_K", "Q6_K"}  # its rows are 768 or 512


def test_llama_cpp_computes_what_transformers_does(exported: tuple[str, Path, GgufResult]) -> None:
    """Tied, GQA, partial rotary, with and without longrope: each token's log-probability."""
    _, folder, result = exported
    text = "<|user|>  東京都の人口は約1,400万人です。 it's 𠮷<|end|>\n<|assistant|>"
    with (
        open_llama_cpp(result.files["f16"], num_ctx=256, timeout=60) as llama,
        open_transformers(folder, device="cpu") as hf,
    ):
        assert llama.tokenize(text) == hf.tokenize(text)
        # Keys and values in float16, as in test_engines.
        assert max(abs(a - b) for a, b in zip(llama.score(text), hf.score(text), strict=True)) < 1e-2


def test_a_phi3_name_would_not_load_and_the_engine_says_why(tmp_path: Path) -> None:
    """What `general_name` is for; and that the cause of a failed load reaches the error."""
    folder = make("gpt-4o", tmp_path / "small")
    good = export(make_settings(tmp_path, folder, types=["f16"], name="small")).files["f16"]
    bad = tmp_path / "bad.gguf"
    data = good.read_bytes()
    assert data.count(b"\5\0\0\0\0\0\0\0small") >= 2  # general.name and general.basename
    bad.write_bytes(data.replace(b"\5\0\0\0\0\0\0\0small", b"\5\0\0\0\0\0\0\0phi-3"))
    with pytest.raises(EngineError, match="_Map_base::at"):
        open_llama_cpp(bad, timeout=60)


def test_marks_that_strip_white_space_are_refused_with_the_cause(tmp_path: Path) -> None:
    folder = bpe_folders.small_phi4_mini(tmp_path / "small", rstrip=True)
    settings = make_settings(tmp_path, folder, types=["f16"])
    with pytest.raises(StageError, match=r"<\|assistant\|>, .*rstrip, lstrip.*llama\.cpp cannot"):
        check(settings)
    plain = make("gpt-4o", tmp_path / "plain")
    file = export(make_settings(tmp_path / "plain-run", plain, types=["f16"])).files["f16"]
    with pytest.raises(StageError, match="rstrip and lstrip among them"):
        check_tokens(file, folder, [], 60)


def test_a_token_that_llama_cpp_would_put_before_every_prompt_is_refused(tmp_path: Path) -> None:
    folder = make("smollm", tmp_path / "small")
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**said, "add_bos_token": True}), encoding="utf-8")
    with pytest.raises(StageError, match=r"\[1, .*training does not add; set add_bos_token"):
        export(make_settings(tmp_path, folder, types=["f16"]))


@pytest.mark.parametrize("pre", ["gpt-4o", "smollm"])
def test_a_small_tokenizers_pre_tokenizer_is_found_by_its_definition(tmp_path: Path, pre: str) -> None:
    assert vocabulary.pre_tokenizer(make(pre, tmp_path / "small")) == pre


def test_llama_3s_pre_tokenizer_is_told_from_dbrxs_by_ignore_merges(tmp_path: Path) -> None:
    folder = make("gpt-4o", tmp_path / "small")
    path = folder / "tokenizer.json"
    fast = json.loads(path.read_text(encoding="utf-8"))
    split = fast["pre_tokenizer"]["pretokenizers"][0]
    split |= {"behavior": "Isolated", "invert": False}
    # As in Meta-Llama-3-8B's tokenizer.json.
    split["pattern"]["Regex"] = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for ignore, name in ((False, "dbrx"), (True, "llama-bpe")):
        fast["model"]["ignore_merges"] = ignore
        path.write_text(json.dumps(fast), encoding="utf-8")
        assert vocabulary.pre_tokenizer(folder) == name


def test_an_unknown_pre_tokenizer_is_named(tmp_path: Path) -> None:
    folder = make("gpt-4o", tmp_path / "small")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("{1,3}", "{1,4}"), encoding="utf-8")
    with pytest.raises(
        StageError, match=r"tokenizer\.json: .*not known: .*\{1,4\}.* > bytes; expected.*smollm"
    ):
        check(make_settings(tmp_path, folder))


@pytest.mark.slow
@real_smollm2
def test_the_real_smollm2_is_known_by_the_converters_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bpe_folders.real_smollm2_tokenizer(tmp_path / "smollm2")
    monkeypatch.setattr(vocabulary, "_BY_DEFINITION", {})
    assert vocabulary.pre_tokenizer(folder) == "smollm"
    said = metadata(Path(os.environ["SO8T_SMOLLM2"]))
    entries = vocabulary.read_byte_level(folder, len(said["tokenizer.ggml.tokens"]))
    assert [text for text, _ in entries] == said["tokenizer.ggml.tokens"]
    assert [int(kind) for _, kind in entries] == said["tokenizer.ggml.token_type"]


@pytest.mark.skipif(not phi3_folders.REAL.is_dir(), reason="needs the published tokenizer")
def test_phi35_stays_sentencepiece(tmp_path: Path) -> None:
    assert tokenizer_kind(phi3_folders.REAL) == "sentencepiece"
    shutil.copy(phi3_folders.REAL / "tokenizer.json", tmp_path)
    shutil.copy(phi3_folders.REAL / "tokenizer_config.json", tmp_path)
    with pytest.raises(StageError, match=r"has no tokenizer\.model.*fetch it from where"):
        tokenizer_kind(tmp_path)
