"""The demo's records, tokenizer and base: sound, the same every time, in the form of the published files."""

import json
import threading
from collections import Counter
from random import Random

import pytest
import sentencepiece as spm
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM

from so8t_helpers import demo
from so8t_helpers.demo import base_model, records, tokenizer
from so8t_helpers.demo.broken import BROKEN
from so8t_helpers.demo.copying_init import start_copying
from so8t_helpers.settings import load_settings
from so8t_helpers.thinking import format as think_format
from tests.dialects import PHI35

TEXTS = (
    "佐藤さんは昨日、駅前でりんごを340円で買いました。\n買ったのは誰ですか。",
    " 前の空白と  二つの空白　全角の空白",
    "ＡＢＣ１２３ abc 123 鬱蒼 😀 é\t終わり",
    "# 思考ステップ\n文には佐藤さんとある。\n判定: ALLOW\n\n# 最終回答\n佐藤さんです。",
)


@pytest.fixture(scope="module")
def good():
    return records.good_records()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(folder, base_model.tokenizer_texts(talks=1500))
    # Without a model's config beside it, transformers takes another road from the same files.
    (folder / "config.json").write_text(json.dumps(base_model.CONFIG), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def talks():
    return records.pretraining_talks(1000)


def settings_in(tmp_path):
    return load_settings("demo", {"run": {"root": str(tmp_path)}})


def test_records_cover_all_labels_and_are_sound(good):
    assert len(good) >= 1500
    labels = Counter(record["label"] for record in good)
    assert set(labels) == set(think_format.LABELS)
    assert min(labels.values()) >= 250
    assert len({record["id"] for record in good}) == len(good)
    for record in good:
        assert not think_format.contains_markers(record["instruction"] + record["input"] + record["output"])
        assert record["output"] and record["reasoning"].endswith("。")
        value = record["check"]["value"]
        said = record["output"].removesuffix("。")
        assert value == said if record["check"]["kind"] == "exact" else value in said


def test_answers_follow_from_the_given_text(good):
    """Whatever is copied into the answer stands in the question; what is computed is computed again."""
    copying = ("extract", "timetable", "comparison", "ordering")
    for record in good:
        question = record["instruction"] + record["input"]
        value = record["check"]["value"]
        if record["task"].startswith(copying):
            assert value in question, record
        if record["task"] == "counting":
            assert record["reasoning"].count("で") >= int(value) and f"で{value}。" in record["reasoning"]


def test_no_two_questions_are_near_duplicates(good):
    """Every pair, by sets of 5-grams in a plain double loop over one task's questions."""
    grams = []
    for record in [r for r in good if r["label"] == "REFUSE"]:
        text = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        grams.append({text[i : i + 5] for i in range(len(text) - 4)})
    assert all(
        len(a & b) / len(a | b) < records.MAX_SIMILARITY for i, a in enumerate(grams) for b in grams[:i]
    )


def test_every_broken_line_is_there_once_and_the_file_is_the_same_every_time(good):
    lines = records.lines()
    assert lines == records.lines()
    assert len(lines) == len(good) + len(BROKEN) and len(BROKEN) >= 20
    made = {broken.make(good) for broken in BROKEN}
    assert len(made) == len(BROKEN)
    assert not any(b"\n" in line for line in lines)
    assert lines[0].startswith(b"\xef\xbb\xbf")


def test_pretraining_text_holds_no_question_of_a_record(good, talks):
    questions = {record["instruction"] + record["input"] for record in good}
    assert not any(d.instruction + d.input in questions for talk in talks for d in talk)


def test_every_task_draws_questions_about_one_text():
    assert set(records.RECORDS) == set(records.PRETRAINING)
    for task in records.RECORDS:
        drafts = task(Random(1))
        assert {draft.label for draft in drafts} <= set(think_format.LABELS)
        assert len({(draft.lead, draft.text) for draft in drafts}) == 1
        assert len({draft.asked for draft in drafts}) == len(drafts)


def test_ids_are_those_of_sentencepiece(tokenizer_folder, talks):
    """llama.cpp tokenises as SentencePiece does, so this is the parity of the GGUF in small."""
    fast = AutoTokenizer.from_pretrained(tokenizer_folder)
    slow = spm.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    for text in (*TEXTS, *(talk[0].question for talk in talks)):
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert ids == slow.encode(text)
        assert fast.decode(ids) == text


def test_special_tokens_stand_and_strip_as_published(tokenizer_folder):
    fast = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = json.loads((tokenizer_folder / "added_tokens.json").read_text(encoding="utf-8"))
    assert added["<|endoftext|>"] == tokenizer.PIECES == fast.eos_token_id == fast.pad_token_id
    assert list(added) == sorted(added)
    first = tokenizer.PIECES
    assert [fast.convert_tokens_to_ids(t) for t in tokenizer.ADDED_TOKENS] == list(range(first, first + 11))
    assert config["added_tokens_decoder"][str(added["<|end|>"])]["rstrip"]
    ids = fast("<|user|>\n質問<|end|>\n<|assistant|>\n", add_special_tokens=False)["input_ids"]
    assert ids[0] == added["<|user|>"] and ids[-2:] == [added["<|end|>"], added["<|assistant|>"]]


def test_chat_template_is_the_one_that_render_writes(tokenizer_folder):
    fast = AutoTokenizer.from_pretrained(tokenizer_folder)
    messages = [{"role": "user", "content": "質問"}, {"role": "assistant", "content": "答え"}]
    assert fast.apply_chat_template(messages, tokenize=False) == PHI35.render(messages)
    prompt = fast.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == PHI35.render(messages[:1], add_generation_prompt=True)


def test_tokenizer_files_are_the_same_every_time(tokenizer_folder, tmp_path):
    tokenizer.write_tokenizer(tmp_path, base_model.tokenizer_texts(talks=1500))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (tokenizer_folder / path.name).read_bytes(), path.name


def test_only_what_the_assistant_says_is_learnt(tokenizer_folder, talks):
    fast = AutoTokenizer.from_pretrained(tokenizer_folder)
    several = [talk for talk in talks if len(talk) > 1][:40]
    drafts = [draft for talk in several for draft in talk]
    reasons = {think_format.with_decision(draft.reasoning, draft.label) for draft in drafts}
    said = {f"{text}<|end|>" for text in reasons | {draft.output for draft in drafts}}
    for _, labels in base_model.batches(tokenizer_folder, several):
        for row in labels.tolist():
            text = fast.decode([i for i in row if i != base_model.IGNORED])
            assert {part.strip() + "<|end|>" for part in text.split("<|end|>") if part} <= said


def test_the_first_layer_looks_at_the_token_before():
    """The start weights' circuit: six heads of layer 0 give most of their attention to the previous token."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**base_model.CONFIG, attn_implementation="eager")
    model = Phi3ForCausalLM(config).float()
    start_copying(model)
    ids = torch.randint(300, 1000, (1, 40))
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions[0][0]
    before = weights.diagonal(offset=-1, dim1=1, dim2=2).mean(dim=1)
    assert (before[:6] > 0.8).all() and (before[6:] < 0.3).all()


def test_a_few_steps_make_the_same_loadable_folder_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "THREADS", 1)
    settings = settings_in(tmp_path)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        base_model.write_base(settings, folder, steps=4)
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    assert model.dtype == torch.float16
    assert 3.5e6 < model.num_parameters() < 5e6
    assert model.config.original_max_position_embeddings == 4096
    assert model.config.rope_parameters["rope_type"] == "longrope"
    assert set(weights[0]) == {name for name, _ in model.named_parameters()}
    config = json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))
    assert {"rope_scaling", "rope_theta", "sliding_window"} <= config.keys()


def test_processes_that_start_at_once_make_the_records_once(tmp_path, monkeypatch):
    settings, made = settings_in(tmp_path), []
    write = records.write_records
    monkeypatch.setattr(records, "write_records", lambda folder: (made.append(folder), write(folder)))
    threads = [threading.Thread(target=demo.ensure_records, args=(settings,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = demo.ensure_records(settings)
    assert len(made) == 1
    assert path.read_bytes().count(b"\n") == len(records.lines())
    assert (path.parent / "robots" / "closed.example.txt").is_file()


@pytest.mark.slow
def test_the_base_answers_and_does_not_think(good):
    """At least half of 200 questions with the think command right, none in a think format."""
    folder = demo.ensure_base(load_settings("demo"))
    fast = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right = 0
    for record in good[:200]:
        question = "\n".join(filter(None, (record["instruction"], record["input"])))
        prompt = PHI35.render([{"role": "user", "content": f"/think {question}"}], True)
        ids = fast(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        answer = fast.decode(out, skip_special_tokens=True)
        assert not think_format.contains_markers(answer)
        right += record["check"]["value"] in answer
    assert right >= 100
