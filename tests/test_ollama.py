"""Against a real Ollama: create, show, chat, stream, think in both formats, delete, and its errors."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import bpe_folders
import control_tokens
import phi3_folders
import psutil
import pytest
import taught_model

from so8t_helpers.bake.folder import write_side_files
from so8t_helpers.engines.base import EngineError, collect
from so8t_helpers.engines.host import GgufHost
from so8t_helpers.engines.ollama import Modelfile, Ollama, open_ollama
from so8t_helpers.engines.ollama_server import (
    OllamaServer,
    check_version,
    find_binary,
    find_ollama,
    server_version,
    start_server,
)
from so8t_helpers.engines.transformers_engine import open_transformers
from so8t_helpers.evaluate.stage import open_source
from so8t_helpers.gguf.parity import TEXTS
from so8t_helpers.gguf.stage import export
from so8t_helpers.gguf.vocabulary import CHECK_TEXT
from so8t_helpers.phi3.template import read_dialect
from so8t_helpers.settings import Settings, load_settings
from so8t_helpers.thinking.format import DECISION_LINES, parse, rejoin
from so8t_helpers.thinking.redaction import final_of_separated
from tests.dialects import PHI35, PUBLISHED

CHAT = [{"role": "user", "content": taught_model.QUESTION}]


def make_gguf(root: Path, style: str) -> tuple[Path, Path]:
    """Teach a model one format; return its folder and its F16 file."""
    folder = taught_model.taught_folder(root / style, style)
    (root / "eval.jsonl").write_text('{"text": "東京の人口は約千四百万人です。"}\n', encoding="utf-8")
    chosen = {
        "run": {"root": str(root / "runs"), "name": style},
        "training": {"dataset_dir": str(root)},
        "gguf": {"model_dir": str(folder), "types": ["f16"]},
    }
    return folder, export(load_settings("demo", chosen)).files["f16"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServer]:
    binary = find_binary()
    if binary is None:
        pytest.skip("no ollama program in SO8T_OLLAMA or PATH (.ci/run builds one)")
    folder = tmp_path_factory.mktemp("ollama")
    with start_server(binary, folder, folder / "models", parallel=2) as started:
        yield started


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_gguf(tmp_path_factory.mktemp("seed"), "seed")


@pytest.fixture(scope="module")
def ollama(server: OllamaServer, seed: tuple[Path, Path]) -> Iterator[Ollama]:
    with open_ollama(server, seed[1], "so8t-test:f16", Modelfile(PHI35, threads=1), timeout=120) as engine:
        yield engine


@pytest.mark.slow
def test_show_says_that_the_model_thinks(ollama: Ollama) -> None:
    shown = ollama.show()
    assert set(shown["capabilities"]) == {"completion", "thinking"}
    assert shown["template"] == Modelfile(PHI35, threads=1).template
    assert "<|end|>" in shown["parameters"] and "num_ctx" in shown["parameters"]


@pytest.mark.slow
def test_ollama_parts_the_seed_format_streamed(ollama: Ollama) -> None:
    pieces = list(ollama.generate(CHAT, max_tokens=taught_model.LENGTH, think=True))
    done = collect(iter(pieces))
    assert taught_model.THINKING in done.thinking and "判定: ALLOW" in done.thinking
    assert done.text.strip() == taught_model.FINAL
    assert len(pieces) > 5, "the answer came in one piece: it was not streamed"
    assert done.stopped and done.first_token_s is not None and done.first_token_s < done.seconds


@pytest.mark.slow
def test_without_thinking_the_answer_is_plain(ollama: Ollama) -> None:
    done = collect(ollama.generate(CHAT, max_tokens=taught_model.LENGTH, think=False))
    assert (done.thinking, done.text.strip()) == ("", taught_model.FINAL)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["quadruple", "english"])
def test_ollama_parts_the_other_formats(
    server: OllamaServer, tmp_path_factory: pytest.TempPathFactory, style: str
) -> None:
    _, gguf = make_gguf(tmp_path_factory.mktemp(style), style)
    modelfile = Modelfile(PHI35, style=style, threads=1)
    with open_ollama(server, gguf, f"so8t-test:{style}", modelfile, timeout=120) as engine:
        done = collect(engine.generate(CHAT, max_tokens=taught_model.LENGTH, think=True))
    assert done.text.strip() == taught_model.FINAL
    assert taught_model.THINKING in done.thinking and DECISION_LINES[style] + "ALLOW" in done.thinking
    assert final_of_separated(done.thinking, done.text, style) == taught_model.FINAL
    assert parse(rejoin(done.thinking, done.text, style)).decision == "ALLOW"


def rendered(ollama: Ollama, chat: list[dict[str, str]], think: bool) -> str:
    """The prompt that Ollama makes of a chat."""
    body = {"model": ollama.model, "messages": chat, "think": think, "stream": False}
    data = ollama.post("/api/chat", {**body, "_debug_render_only": True, "options": {"num_predict": 1}})
    return str((data.get("_debug_info") or data["debug_info"])["rendered_template"])


@pytest.mark.slow
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize(
    "chat",
    [
        CHAT,
        [{"role": "system", "content": "短く答える。"}, *CHAT],
        [*CHAT, {"role": "assistant", "content": taught_model.FINAL}, *CHAT],
        [{"role": "user", "content": "{{ .System }} \"'\n\n改行"}],
    ],
)
def test_ollamas_template_renders_what_ours_does(
    ollama: Ollama, chat: list[dict[str, str]], think: bool
) -> None:
    assert rendered(ollama, chat, think) == PHI35.prompt(chat, "/think" if think else "")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_ollama_writes_every_dialect(server: OllamaServer, seed: tuple[Path, Path], name: str) -> None:
    dialect = PUBLISHED[name].dialect
    system = {"role": "system", "content": "短く答える。"}
    answered = [*CHAT, {"role": "assistant", "content": taught_model.FINAL}, *CHAT]
    chats = [CHAT, answered] + [[system, *chat] for chat in (CHAT, answered) if dialect.takes_system]
    with open_ollama(server, seed[1], "so8t-test:dialect", Modelfile(dialect, threads=1)) as engine:
        for chat in chats:
            assert rendered(engine, chat, think=True) == dialect.prompt(chat, "/think")
            assert rendered(engine, chat, think=False) == dialect.prompt(chat)


@pytest.mark.slow
def test_token_ids_and_greedy_answers_are_transformers(ollama: Ollama, seed: tuple[Path, Path]) -> None:
    prompts = [PHI35.prompt(CHAT, command) for command in ("/think", "")]
    with open_transformers(seed[0], device="cpu") as hf:
        assert [ollama.tokenize(prompt) for prompt in prompts] == [hf.tokenize(prompt) for prompt in prompts]
        theirs = [done.text.strip() for done in hf.complete_many(prompts, max_tokens=taught_model.LENGTH)]
    raw = ollama.complete_many(prompts, max_tokens=taught_model.LENGTH)
    assert [done.text.strip() for done in raw] == theirs
    assert raw[0].text.strip() == taught_model.answer("seed"), "raw mode must keep the marks"


@pytest.mark.slow
@pytest.mark.parametrize("make", [bpe_folders.small_phi4_mini, bpe_folders.small_smollm2])
def test_token_ids_of_byte_level_bpe_are_transformers(
    server: OllamaServer, tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    """As 03_bake leaves a folder: without marks that strip white space."""
    base, folder = make(tmp_path / "base"), tmp_path / "baked"
    folder.mkdir()
    write_side_files(base, folder)
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    chosen = {"gguf": {"model_dir": str(folder), "types": ["f16"]}, "run": {"root": str(tmp_path)}}
    chosen["training"] = {"dataset_dir": str(tmp_path)}
    file = export(load_settings("demo", chosen)).files["f16"]
    marks = ("<|user|>", "<|end|>", "<|im_start|>", "<|endoftext|>")
    texts = [*TEXTS, CHECK_TEXT, *(f"{mark}  東京 \n{mark}\t{mark}" for mark in marks)]
    with (
        open_ollama(
            server, file, "so8t-test:bpe", Modelfile(read_dialect(folder), threads=1), timeout=120
        ) as ollama,
        open_transformers(folder, device="cpu") as hf,
    ):
        assert [ollama.tokenize(text) for text in texts] == [hf.tokenize(text) for text in texts]


@pytest.mark.slow
def test_control_tokens_are_seen(server: OllamaServer, tmp_path: Path) -> None:
    _, file = control_tokens.chains(tmp_path)
    modelfile = Modelfile(PHI35, threads=1, num_ctx=64)
    with open_ollama(server, file, "so8t-chains:f16", modelfile, timeout=120) as engine:
        control_tokens.check(engine)


@pytest.mark.slow
def test_a_control_token_in_a_chat_becomes_ordinary_text(ollama: Ollama) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("前<s><|user|>後", "前< s>< |user|>後")]
    first, second = (collect(ollama.generate(chat, max_tokens=1)).prompt_tokens for chat in chats)
    rendered = ollama.tokenize(PHI35.prompt(chats[0], "/think"))
    assert first == second == len(rendered) and rendered.count(1) == 0


@pytest.mark.slow
def test_ollama_cannot_score(ollama: Ollama) -> None:
    with pytest.raises(EngineError, match=r"use llama\.cpp or transformers"):
        ollama.score("a")


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_is_an_error(ollama: Ollama) -> None:
    with pytest.raises(EngineError, match="exceeds the context length"):
        collect(ollama.complete("あ" * 9000, max_tokens=2))


@pytest.mark.slow
def test_a_file_that_is_no_gguf_is_refused(server: OllamaServer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a gguf at all")
    with pytest.raises(EngineError, match=r"so8t-test:broken"):
        open_ollama(server, broken, "so8t-test:broken", Modelfile(PHI35), timeout=60)


def another_file(gguf: Path, folder: Path) -> Path:
    """The same model with other bytes at the end: a file that the server does not have yet."""
    other = folder / "other.gguf"
    other.write_bytes(gguf.read_bytes() + os.urandom(16))
    return other


@pytest.mark.slow
def test_the_way_to_ollama_has_a_progress_bar(
    server: OllamaServer, seed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = another_file(seed[1], tmp_path)
    chosen = {"ollama_url": server.url, "engine": "ollama"}
    settings = load_settings("demo", {"run": {"root": str(tmp_path)}, "eval": chosen})
    with GgufHost(settings) as host, open_source(settings, host, "f16", other) as engine:
        assert engine.name == "Ollama"
    said = capsys.readouterr().err
    assert "f16 to Ollama:   0%" in said and "B/s" in said


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
def test_the_model_is_taken_out_unless_kept(
    server: OllamaServer, seed: tuple[Path, Path], tmp_path: Path, keep: bool
) -> None:
    sent: list[int] = []
    gguf = another_file(seed[1], tmp_path)
    name = f"so8t-test:keep-{str(keep).lower()}"
    engine = open_ollama(server, gguf, name, Modelfile(PHI35), keep=keep, on_bytes=sent.append)
    engine.close()
    assert sum(sent) == gguf.stat().st_size
    with open_ollama(server, seed[1], "so8t-test:other", Modelfile(PHI35)) as other:
        names = [model["name"] for model in other.client.get("/api/tags").json()["models"]]
        assert (name in names) is keep


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["server", "runner"])
def test_an_ollama_that_dies_in_an_answer_is_one_line_with_its_log(
    server: OllamaServer, tmp_path: Path, dies: str
) -> None:
    folder = phi3_folders.small_folder(tmp_path / "model")  # taught nothing, it writes on and on
    (tmp_path / "eval.jsonl").write_text('{"text": "東京"}\n', encoding="utf-8")
    chosen = {
        "run": {"root": str(tmp_path / "runs")},
        "training": {"dataset_dir": str(tmp_path)},
        "gguf": {"model_dir": str(folder), "types": ["f16"]},
    }
    file = export(load_settings("demo", chosen)).files["f16"]
    binary = find_binary()
    assert binary is not None, "`server` came from it"
    with (
        start_server(binary, tmp_path, tmp_path / "models") as own,
        open_ollama(own, file, "so8t-dies:f16", Modelfile(PHI35, threads=1)) as engine,
    ):
        pieces = engine.complete("あ", max_tokens=4000)
        next(pieces)
        assert own.process is not None
        parent = psutil.Process(own.process.pid)
        victims = [parent] if dies == "server" else parent.children(recursive=True)
        assert victims
        for process in victims:
            process.kill()
        with pytest.raises(EngineError) as caught:
            list(pieces)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("Ollama ")
    assert str(tmp_path / "serve.log") in said


@pytest.mark.slow
def test_a_running_server_is_taken_and_left_running(server: OllamaServer, scratch_settings: Settings) -> None:
    data = scratch_settings.model_dump()
    data["eval"]["ollama_url"] = server.url
    data.pop("profile")
    found = find_ollama(load_settings("demo", data))
    assert found is not None and not found.own and found.version == server.version
    found.close()
    assert server_version(server.url) == server.version


@pytest.mark.slow
def test_an_installed_binary_is_started_and_ended(server: OllamaServer, scratch_settings: Settings) -> None:
    data = scratch_settings.model_dump()
    data["eval"]["ollama_url"] = "http://127.0.0.1:9"
    data.pop("profile")
    with find_ollama(load_settings("demo", data)) as found:  # type: ignore[union-attr]
        assert found.own and server_version(found.url) == found.version
    assert server_version(found.url) is None


def test_a_port_taken_by_something_else_is_named() -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        with pytest.raises(EngineError, match=r"is not Ollama .* taken by another program"):
            server_version(url)
        other.shutdown()


def test_no_server_is_none() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert server_version(f"http://127.0.0.1:{probe.getsockname()[1]}") is None


@pytest.mark.parametrize(
    ("version", "good"), [("0.8.9", False), ("0.9.0", True), ("0.24.0-rc1", True), ("0.0.0", True)]
)
def test_an_old_server_is_refused(version: str, good: bool) -> None:
    if good:
        check_version(version, "here")
    else:
        with pytest.raises(EngineError, match="too old"):
            check_version(version, "here")


def test_a_binary_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SO8T_OLLAMA", "/no/such/ollama")
    with pytest.raises(EngineError, match="SO8T_OLLAMA=/no/such/ollama"):
        find_binary()


def test_a_binary_that_ends_at_once_is_quoted(tmp_path: Path) -> None:
    import sys

    with pytest.raises(EngineError, match="ended with status"):
        start_server(Path(sys.executable), tmp_path, tmp_path / "models")


def test_too_little_memory_says_what_to_do() -> None:
    engine = Ollama(OllamaServer("http://127.0.0.1:9", "0.24.0"), "m", PHI35, 1.0, 1, keep=True)
    said = "model requires more system memory (9.1 GiB) than is available (3.2 GiB)"
    assert "smaller quantisation" in str(engine.explain(said))
    assert "9.1 GiB" in str(engine.explain(said))


def test_modelfile_text_holds_what_the_api_is_told() -> None:
    text = Modelfile(PHI35, system="短く答える。", num_ctx=2048).text("../04_gguf/a.gguf")
    assert text.startswith('FROM ../04_gguf/a.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|end|>"\n' in text and "PARAMETER num_ctx 2048\n" in text
    assert text.endswith('SYSTEM """短く答える。"""\n')


def test_modelfile_refuses_what_would_break_its_template() -> None:
    with pytest.raises(EngineError, match="must not contain"):
        Modelfile(PHI35, think_command="{{ .System }}")
