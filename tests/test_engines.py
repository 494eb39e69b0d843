"""Engines on a small random model: transformers against its own `generate`, llama.cpp against both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import bpe_folders
import control_tokens
import phi3_folders
import pytest
import torch
from transformers import AutoTokenizer, Phi3ForCausalLM

from so8t_helpers.engines.base import EngineError, EngineTimeoutError, collect, threads_for
from so8t_helpers.engines.host import GgufHost
from so8t_helpers.engines.llama_cpp import LlamaCpp, open_llama_cpp
from so8t_helpers.engines.transformers_engine import Transformers, open_transformers
from so8t_helpers.gguf.stage import export
from so8t_helpers.settings import load_settings
from tests.dialects import PHI35

PROMPTS = [
    PHI35.prompt([{"role": "user", "content": text}])
    for text in ("東京", "東京都の人口は約1,400万人です。", "The quick brown fox", "12345 + 67890 は？", "あ")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phi3_folders.small_folder(tmp_path_factory.mktemp("engines") / "small")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    root = tmp_path_factory.mktemp("engines_gguf")
    (root / "eval.jsonl").write_text('{"text": "東京都の人口は約1,400万人です。"}\n', encoding="utf-8")
    section = {"model_dir": str(folder), "types": ["f16"]}
    chosen = {"run": {"root": str(root)}, "training": {"dataset_dir": str(root)}, "gguf": section}
    return export(load_settings("demo", chosen)).files["f16"]


@pytest.fixture(scope="module")
def hf(folder: Path) -> Iterator[Transformers]:
    with open_transformers(folder, parallel=3, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def llama(gguf: Path) -> Iterator[LlamaCpp]:
    with open_llama_cpp(gguf, num_ctx=256, timeout=60) as engine:
        yield engine


def test_batches_write_what_transformers_own_generate_writes(folder: Path, hf: Transformers) -> None:
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, done in zip(PROMPTS, hf.complete_many(PROMPTS, max_tokens=12), strict=True):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        stops = hf.stop_ids.tolist()
        alone = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=stops, pad_token_id=0)
        assert done.token_ids == alone[0, ids.shape[1] :].tolist()


def test_a_row_that_ends_leaves_the_batch_and_changes_no_other(hf: Transformers) -> None:
    whole = [done.token_ids for done in hf.complete_many(PROMPTS[:3], max_tokens=8)]
    before = hf.stop_ids
    try:
        hf.stop_ids = torch.tensor([whole[0][2]])
        cut = [done.token_ids for done in hf.complete_many(PROMPTS[:3], max_tokens=8)]
    finally:
        hf.stop_ids = before
    stop = whole[0][2]
    assert cut == [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in whole]


def test_streamed_and_batched_answers_agree(hf: Transformers) -> None:
    batched = hf.complete_many(PROMPTS, max_tokens=12)
    streamed = [collect(hf.complete(prompt, max_tokens=12)) for prompt in PROMPTS]
    assert [done.text for done in streamed] == [done.text for done in batched]
    assert [done.tokens for done in streamed] == [done.tokens for done in batched]


def test_no_character_of_byte_level_bpe_is_cut_in_two(tmp_path: Path) -> None:
    """A random model writes bytes at random: what may still become a character is held back until the end."""
    folder = bpe_folders.small_phi4_mini(tmp_path / "small")
    ends = []
    with open_transformers(folder, device="cpu") as engine:
        for seed in range(12):
            pieces = list(engine.complete(PROMPTS[0], max_tokens=24, temperature=1.0, seed=seed))
            batched = engine.complete_many(PROMPTS[:1], max_tokens=24, temperature=1.0, seed=seed)[0]
            assert "".join(piece.text for piece in pieces) == batched.text
            assert not any(piece.text.endswith("\ufffd") for piece in pieces[:-1])
            ends.append(batched.text[-1])
    assert "\ufffd" in ends, "no answer ended inside a character: the last piece was not put to the test"


def test_sampling_repeats_with_its_seed(hf: Transformers) -> None:
    first, again, other = (
        collect(hf.complete(PROMPTS[0], max_tokens=12, temperature=1.0, seed=seed)).text for seed in (1, 1, 2)
    )
    assert first == again != other


def test_token_ids_agree(hf: Transformers, llama: LlamaCpp) -> None:
    texts = [*PROMPTS, *phi3_folders.TEXTS, "<|user|>\n\n  二つの空白  <|end|>\n<|assistant|>\n# 見出し\n"]
    assert [llama.tokenize(text) for text in texts] == [hf.tokenize(text) for text in texts]


def test_log_probabilities_agree(hf: Transformers, llama: LlamaCpp) -> None:
    ours, theirs = hf.score(PROMPTS[1]), llama.score(PROMPTS[1])
    assert len(ours) == len(hf.tokenize(PROMPTS[1])) - 1
    # llama.cpp keeps keys and values in float16: 3e-3 nats were seen at most, a wrong token differs by nats.
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-2


def test_log_probabilities_are_told_inside_a_character_too(hf: Transformers, llama: LlamaCpp) -> None:
    text = "<|user|>\n鬱陶しい𠮷野家<|end|>"  # written byte by byte
    ids = hf.tokenize(text)
    pieces = hf.tokenizer.convert_ids_to_tokens(ids)
    assert sum(piece.startswith("<0x") for piece in pieces) > 4
    assert max(abs(a - b) for a, b in zip(hf.score(text), llama.score(text), strict=True)) < 1e-2
    assert llama.score(text, start=len(ids) - 2) == llama.score(text)[-2:]


def test_llama_cpp_answers_in_the_prompts_order(llama: LlamaCpp) -> None:
    seen: list[int] = []
    many = llama.complete_many(PROMPTS, max_tokens=6, on_done=lambda done: seen.append(done.tokens))
    assert [done.prompt_tokens for done in many] == [len(llama.tokenize(prompt)) for prompt in PROMPTS]
    assert len(seen) == len(PROMPTS)
    assert all(done.first_token_s is not None and done.first_token_s <= done.seconds for done in many)


def test_llama_cpp_refuses_a_prompt_that_does_not_fit(llama: LlamaCpp) -> None:
    with pytest.raises(EngineError, match="exceeds the available context"):
        collect(llama.complete("あ" * 2000, max_tokens=2))


def test_only_the_key_opens_the_server(llama: LlamaCpp) -> None:
    import httpx

    answer = httpx.post(f"{llama.url}/completion", json={"prompt": "a", "n_predict": 1}, trust_env=False)
    assert answer.status_code == httpx.codes.UNAUTHORIZED


def test_close_ends_the_subprocess(gguf: Path) -> None:
    engine = open_llama_cpp(gguf, num_ctx=64, timeout=60)
    engine.close()
    engine.close()
    assert engine.process.process.returncode is not None


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a gguf")
    with pytest.raises(EngineError, match=r"could not load .*broken\.gguf"):
        open_llama_cpp(broken, timeout=60)
    with pytest.raises(EngineError, match="04_gguf makes it"):
        open_llama_cpp(tmp_path / "none.gguf")


def test_loading_that_takes_too_long_is_ended(gguf: Path) -> None:
    with pytest.raises(EngineTimeoutError, match=r"did not load .* within 0\.01 s"):
        open_llama_cpp(gguf, timeout=0.01)


def test_a_crash_is_an_error_and_not_a_hang(gguf: Path) -> None:
    with open_llama_cpp(gguf, num_ctx=256, timeout=20) as engine:
        engine.process.process.kill()
        with pytest.raises(EngineError, match=r"llama\.cpp"):
            collect(engine.complete(PROMPTS[0], max_tokens=4))


def test_a_server_that_dies_in_an_answer_is_one_line_with_its_log(gguf: Path) -> None:
    with open_llama_cpp(gguf, num_ctx=4096, timeout=20) as engine:
        pieces = engine.complete(PROMPTS[0], max_tokens=4000)
        next(pieces)
        engine.process.process.kill()
        with pytest.raises(EngineError, match=r"llama\.cpp at .* broke off .* the same command .* its log: "):
            list(pieces)


def test_transformers_names_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot load"):
        open_transformers(tmp_path)


def test_think_command_stands_before_the_last_question_only() -> None:
    chat = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    assert PHI35.prompt(chat, "/think") == (
        "<|user|>\n一<|end|>\n<|assistant|>\n二<|end|>\n<|user|>\n/think 三<|end|>\n<|assistant|>\n"
    )
    assert "/think" not in PHI35.prompt(chat)
    assert chat[2]["content"] == "三"


def test_control_tokens_are_seen(tmp_path: Path) -> None:
    folder, file = control_tokens.chains(tmp_path)
    with open_transformers(folder, device="cpu") as engine:
        control_tokens.check(engine)
    with open_llama_cpp(file, num_ctx=64, timeout=60) as served:
        control_tokens.check(served)


def test_a_small_file_gets_one_thread(gguf: Path) -> None:
    assert threads_for(gguf) == 1


def test_without_ollama_the_embedded_engine_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SO8T_OLLAMA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    chosen = {"ollama_url": "http://127.0.0.1:9", "engine": "auto"}  # port 9: nothing answers
    run = {"root": str(tmp_path)}
    with GgufHost(load_settings("demo", {"run": run, "eval": chosen})) as host:
        assert host.name == "llama.cpp"
    with pytest.raises(EngineError, match="start `ollama serve`, install Ollama"):
        GgufHost(load_settings("demo", {"run": run, "eval": {**chosen, "engine": "ollama"}}))
