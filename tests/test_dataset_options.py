"""The dataset stage's options: a trained classifier, a local model, robots.txt, Ray."""

import json
import random
import shutil

import numpy as np
import pytest
from dataset_inputs import character_tokenizer, many, outputs, profile, record, write

from so8t_helpers.dataset import reading
from so8t_helpers.dataset import stage as dataset_stage
from so8t_helpers.dataset.policy import ngrams
from so8t_helpers.run.files import read_jsonl
from so8t_helpers.settings import SettingsError


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return character_tokenizer(tmp_path_factory.mktemp("options-base"))


def labelled(path, count: int = 120):
    """Write labelled records; the unsafe ones speak of a made-up substance that no word list has."""
    rows = [
        {
            "text": f"{n}番の{'ゾルタックを混ぜる' if n % 3 == 0 else '野菜を切って煮る'}話をして",
            "nsfw": n % 3 == 0,
        }
        for n in range(count)
    ]
    return write(path, rows)


def test_a_classifier_learns_from_the_users_own_records(tmp_path, base):
    training = labelled(tmp_path / "labelled.jsonl")
    rows = [
        *many(20),
        record(50, instruction="ゾルタックを混ぜる話を詳しく教えて"),
        record(51, instruction="野菜を切って煮る話をして"),
    ]
    source = write(tmp_path / "in.jsonl", rows)
    built = dataset_stage.build(profile(tmp_path, base, [source], nsfw_training=[str(training)]))
    figures = built.card["classifier"]
    assert figures["precision"] >= 0.95
    assert figures["recall"] >= 0.95
    assert figures["measured on"] == 24
    refused = read_jsonl(built.directory / "quarantine.jsonl")
    assert [(row["line"], row["reason"]) for row in refused] == [(21, "unsafe_label")]
    assert "ゾルタック".encode() not in (built.directory / "nsfw_classifier.safetensors").read_bytes()


def test_the_users_threshold_is_used(tmp_path):
    texts = [f"{'悪い' if n % 2 else '良い'}話{n}" for n in range(100)]
    figures = ngrams.train(texts, [bool(n % 2) for n in range(100)], tmp_path / "c.safetensors", 0, 0.9)
    assert figures["threshold"] == 0.9
    assert ngrams.NgramClassifier(tmp_path / "c.safetensors").threshold == pytest.approx(0.9)


def test_the_threshold_is_chosen_on_one_part_and_reported_on_another(tmp_path, monkeypatch):
    """Labels that no text tells: chosen where it is measured, a threshold would look better than chance."""
    rng = random.Random(4)
    texts = ["".join(rng.choices("あいうえおかきくけこ", k=12)) for _ in range(1000)]
    unsafe = [rng.random() < 0.3 for _ in texts]
    chosen_on = []
    choose = ngrams._best_threshold
    monkeypatch.setattr(
        ngrams, "_best_threshold", lambda scores, own: chosen_on.append(scores) or choose(scores, own)
    )
    found = ngrams.train(texts, unsafe, tmp_path / "c.safetensors", 0, None)
    scores = ngrams.NgramClassifier(tmp_path / "c.safetensors").scores(texts)
    assert found["trained on"] + found["threshold chosen on"] + found["measured on"] == len(texts)
    assert len(chosen_on[0]) == found["threshold chosen on"]
    fifth = ngrams._fifths(np.array(unsafe), 0)
    said = scores[fifth == 4] >= found["threshold"]
    truth = np.array(unsafe)[fifth == 4]
    counted = {
        f"{side}, {what}": int((flag & (truth == is_unsafe)).sum())
        for side, is_unsafe in (("unsafe", True), ("harmless", False))
        for what, flag in (("flagged", said), ("passed", ~said))
    }
    assert counted == {key: found[key] for key in counted}
    assert found["precision"] < 0.45  # three in ten are unsafe, and nothing can be learned


def test_a_classifier_that_flags_harmless_text_is_warned_of(tmp_path, base):
    training = labelled(tmp_path / "labelled.jsonl")
    rows = [
        *many(40),
        *(record(50 + n, instruction=f"ゾルタックを混ぜる話{chr(0x4E00 + n) * 9}") for n in range(15)),
    ]
    source = write(tmp_path / "in.jsonl", rows)
    built = dataset_stage.build(profile(tmp_path, base, [source], nsfw_training=[str(training)]))
    unsafe = built.card["unsafe"]
    assert unsafe["judged"]["ALLOW"] == 25
    assert unsafe["flagged"]["classifier"]["ALLOW"] >= 15
    (warning,) = unsafe["warnings"]
    share = unsafe["flagged"]["classifier"]["ALLOW"] / 25
    assert warning.startswith(f"{share:.0%} of the records labelled ALLOW flagged as `classifier`")
    quiet = dataset_stage.build(profile(tmp_path, base, [write(tmp_path / "good.jsonl", many(40))], "quiet"))
    assert quiet.card["unsafe"]["warnings"] == []


def test_too_few_labelled_records_and_a_line_without_a_flag_are_errors(tmp_path, base):
    source = write(tmp_path / "in.jsonl", many(4))
    few = labelled(tmp_path / "few.jsonl", 30)
    with pytest.raises(SettingsError, match="10 unsafe and 20 safe records"):
        dataset_stage.build(profile(tmp_path, base, [source], nsfw_training=[str(few)]))
    unflagged = write(tmp_path / "unflagged.jsonl", [{"text": "a", "nsfw": True}, {"text": "b"}])
    with pytest.raises(SettingsError, match=r"unflagged\.jsonl:2: expected a flag"):
        dataset_stage.build(profile(tmp_path, base, [source], nsfw_training=[str(unflagged)]))


def test_a_local_text_classification_folder(tmp_path, base):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocab = {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", *"ゾルタクを混ぜる"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([-5.0, 5.0]))  # this one finds everything unsafe
    model.save_pretrained(folder)
    source = write(tmp_path / "in.jsonl", many(8))
    built = dataset_stage.build(profile(tmp_path, base, [source], nsfw_model=str(folder)))
    assert built.card["quarantine"]["unsafe_label"]["lines"] == 2
    assert built.card["counted"]["unsafe, refused"] == {"model": 6}
    with pytest.raises(SettingsError, match="which has safe, unsafe"):
        dataset_stage.build(
            profile(tmp_path, base, [source], nsfw_model=str(folder), nsfw_model_labels=["bad"])
        )


def test_robots_files_beside_the_input_decide(tmp_path, base):
    (tmp_path / "robots").mkdir()
    (tmp_path / "robots" / "closed.example.txt").write_text("User-agent: *\nDisallow: /\n", encoding="utf-8")
    (tmp_path / "robots" / "open.example.txt").write_text("", encoding="utf-8")
    urls = ["https://closed.example/a", "https://open.example/a", "https://unknown.example/a"]
    source = write(tmp_path / "in.jsonl", [*many(4), *(record(n, url=url) for n, url in enumerate(urls, 10))])
    built = dataset_stage.build(profile(tmp_path, base, [source]))
    reasons = {row["line"]: row["reason"] for row in read_jsonl(built.directory / "quarantine.jsonl")}
    assert reasons == {5: "robots_disallow", 7: "robots_unknown"}
    manifest = json.loads((built.directory / "manifest.json").read_text(encoding="utf-8"))
    assert "robots/closed.example.txt" in manifest["inputs"]


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path, base, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(reading, "CHUNK_BYTES", 20_000)
    source = write(tmp_path / "in.jsonl", [*many(300), b"{", *many(10)])
    one = dataset_stage.build(profile(tmp_path, base, [source], "one"))
    ray = dataset_stage.build(profile(tmp_path, base, [source], "ray", engine="ray", workers=2))
    assert outputs(one.directory) == outputs(ray.directory)
    shutil.rmtree(ray.directory)
