"""Thinking for records without any: the teacher, what it may not write, and what the card says of it all."""

import json

import pytest
from dataset_inputs import character_tokenizer, many, outputs, profile, record, write

from so8t_helpers.dataset import figures, teacher
from so8t_helpers.dataset import stage as dataset_stage
from so8t_helpers.dataset.records import normalise
from so8t_helpers.dataset.sample import FORMATS, Plan, Sampler
from so8t_helpers.settings import DatasetSettings, SettingsError
from tests.dialects import PHI35


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return character_tokenizer(tmp_path_factory.mktemp("teacher-base"))


def test_a_teacher_thinks_once_for_records_without_reasoning(tmp_path, monkeypatch):
    from phi3_folders import small_folder

    model = small_folder(tmp_path / "teacher")
    bare = [{k: v for k, v in record(n).items() if k != "reasoning"} for n in range(6)]
    source = write(
        tmp_path / "in.jsonl",
        [*bare, {**bare[0], "task": "計算", "instruction": "別の問いに答えて"}, record(9)],
    )
    wanted = {"teacher": str(model), "teacher_max_tokens": 12, "plain_share": 0.0, "eval_share": 0.0}
    # What random weights write passes no check; this test is about who is asked, and how often.
    monkeypatch.setattr(teacher, "fault", lambda text, record: "" if text else "empty")
    settings = profile(tmp_path, model, [source], **wanted)
    first = dataset_stage.build(settings)
    counted = first.card["counted"]["thinking"]
    assert counted == {"a teacher's": 7, "the record's own": 1}

    def ask_again(_settings):
        raise AssertionError("the teacher was asked again for what it had answered")

    monkeypatch.setattr(teacher, "open_teacher", ask_again)
    again = dataset_stage.build(profile(tmp_path, model, [source], "again", **wanted))
    assert outputs(first.directory) == outputs(again.directory)
    with pytest.raises(AssertionError, match="asked again"):
        dataset_stage.build(
            profile(tmp_path, model, [source], "longer", **{**wanted, "teacher_max_tokens": 13})
        )
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for language in ("ja", "en"):
        (prompts / f"{language}.txt").write_text("Think: {question} {answer}", encoding="utf-8")
    with pytest.raises(AssertionError, match="asked again"):
        dataset_stage.build(
            profile(tmp_path, model, [source], "other", **{**wanted, "teacher_prompts": str(prompts)})
        )
    (prompts / "ja.txt").write_text("{question}だけ", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"ja\.txt: expected the place \{answer\}"):
        dataset_stage.build(
            profile(tmp_path, model, [source], "bad", **{**wanted, "teacher_prompts": str(prompts)})
        )


def test_a_teacher_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    from phi3_folders import small_folder

    model = small_folder(tmp_path / "teacher")
    bare = [{k: v for k, v in record(n).items() if k != "reasoning"} for n in range(10)]
    source = write(tmp_path / "in.jsonl", bare)
    wanted = {"teacher": str(model), "teacher_max_tokens": 8}
    opened = teacher.open_teacher
    asked: list[int] = []
    fail_after = [2]

    def watched(settings):
        engine = opened(settings)
        complete_many = engine.complete_many

        def counted(prompts, **more):
            if len(asked) == fail_after[0]:
                raise KeyboardInterrupt
            asked.append(len(prompts))
            return complete_many(prompts, **more)

        engine.complete_many = counted
        return engine

    monkeypatch.setattr(teacher, "open_teacher", watched)
    with pytest.raises(KeyboardInterrupt):
        dataset_stage.build(profile(tmp_path, model, [source], **wanted))
    fail_after[0] = -1
    built = dataset_stage.build(profile(tmp_path, model, [source], **wanted))
    assert asked == [1] * 10  # the two answers before the stop are not asked for again
    whole = dataset_stage.build(profile(tmp_path, model, [source], "again", **wanted))
    assert outputs(built.directory) == outputs(whole.directory)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("佐藤さんが3個、妹が1,200円分を買った。合わせる。", ""),
        ("", "empty"),
        ("考える。<final>", "a mark of the formats, or a decision"),
        ("考える。\n判定: ALLOW", "a mark of the formats, or a decision"),
        ("Add them up.", "another language"),
        ("妹は４個を買った。", "a number"),
        ("1200円を足す。", ""),
        ("危険なので、これはDENYになる。", "a label"),
        ("拒否すべきだ。", "a label"),
        ("許可できる。", ""),
        ("田中さんに聞く。", "a name"),
        ("アリスに聞く。", "a name"),
        ("Tokyoで買った。", "a name"),
    ],
)
def test_what_a_teacher_may_not_write(text, fault):
    data = {
        "instruction": "佐藤さんは3個、妹は1,200円分を買いました。合計は?",
        "output": "足し算です。",
        "label": "ALLOW",
    }
    assert teacher.fault(text, normalise(data)) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Anna has 3 apples. She gives one away. Subtract.", ""),
        ("Anna gives one to Bob.", "a name"),
        ("Anna has 3 apples, so 2 are left.", "a number"),
        ("This should be refused.", "a label"),
        ("引き算をする。", "another language"),
    ],
)
def test_what_a_teacher_may_not_write_in_english(text, fault):
    # The answer is Japanese: the thinking is in the asking person's language.
    data = {
        "instruction": "Anna has 3 apples and gives one away. How many are left?",
        "output": "ふたつ",
        "label": "ALLOW",
    }
    assert teacher.fault(text, normalise(data)) == fault


def test_a_teacher_is_asked_for_what_shows_its_thinking_alone(base):
    chosen = DatasetSettings(plain_share=0.5, eval_share=0.0, default_licence="self-made")
    sampler = Sampler(Plan(chosen, 0, 2048, PHI35, base / "tokenizer.json", 0.0, None))
    rows = [{**row, "reasoning": None, "group": n // 3 or None} for n, row in enumerate(many(80))]
    lines = [(n, json.dumps(row).encode()) for n, row in enumerate(rows)]
    plain = [sample.format == FORMATS.index("plain") for sample in sampler.batch(lines, "utf-8", "in.jsonl")]
    assert 20 < sum(plain) < 60
    assert [sampler.needs_teacher(raw, "utf-8") is None for _, raw in lines] == plain


def test_a_dialogues_turns_are_told_to_the_teacher_and_may_be_spoken_of(tmp_path):
    thoughts = teacher.Thoughts(tmp_path / "t.sqlite", {"ja": "{question}|{answer}", "en": ""})
    said = ["佐藤さんは3個買いました。", "はい。", "妹は?", "2個です。"]
    roles = ("user", "assistant") * 2
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    record, bare = (normalise({"messages": rows, "label": "ALLOW"}) for rows in (turns, turns[2:]))
    assert thoughts.request(record) == "佐藤さんは3個買いました。\nはい。\n妹は?|2個です。"
    thinking = "佐藤さんの3個のあとに妹の数を聞いている。"
    thoughts.put([(record, thinking), (bare, thinking)])
    assert thoughts.get(record) == (thinking, "")
    assert thoughts.get(bare) == (thinking, "a number")


def test_a_record_that_holds_a_place_of_the_prompt_stays_as_it_is(tmp_path):
    thoughts = teacher.Thoughts(tmp_path / "t.sqlite", {"ja": "{question}|{answer}|{label}", "en": ""})
    record = normalise({"instruction": "{answer}とは", "output": "場所", "label": "ALLOW"})
    assert thoughts.request(record) == "{answer}とは|場所|ALLOW"


def test_the_card_counts_answers_that_comply_and_warns_of_a_template(tmp_path, base):
    bare = [{k: v for k, v in row.items() if k != "reasoning"} for row in many(24)]
    bare[3]["output"] = "まず袋に入れてから混ぜます。"  # labelled REFUSE, flagged by nothing
    assert bare[3]["label"] == "REFUSE"
    source = write(tmp_path / "in.jsonl", bare)
    card = dataset_stage.build(profile(tmp_path, base, [source], plain_share=0.0)).card
    assert (card["refusals"]["judged"], card["refusals"]["comply"]) == (12, 1)
    assert "1 of 12" in card["refusals"]["warning"]
    assert (card["thinkings"]["samples"], card["thinkings"]["distinct"]) == (24, 4)
    assert "16.7%" in card["thinkings"]["warning"]
    assert "**Warning:**" in figures.warnings(card)
    own = write(tmp_path / "own.jsonl", many(24))
    card = dataset_stage.build(profile(tmp_path, base, [own], "own", plain_share=0.0)).card
    assert card["thinkings"]["distinct"] == 24
    assert card["thinkings"]["warning"] is card["refusals"]["warning"] is None


@pytest.mark.slow
def test_a_real_model_teaches_and_is_checked(tmp_path, demo_run):
    """The demo's own model through llama.cpp: what it writes is used, or not, and the card counts both."""
    kept = demo_run.run_dir
    (gguf,) = (kept / "04_gguf").glob("*-f16.gguf")
    bare = [{k: v for k, v in row.items() if k != "reasoning"} for row in many(6)]
    source = write(tmp_path / "in.jsonl", bare)
    wanted = {"teacher": str(gguf), "teacher_max_tokens": 24, "teacher_parallel": 2, "plain_share": 0.0}
    built = dataset_stage.build(profile(tmp_path, kept / "03_bake" / "model", [source], **wanted))
    counted = built.card["counted"]
    used = counted["thinking"].get("a teacher's", 0)
    not_used = sum(counted.get("a teacher's thinking, not used for", {}).values())
    assert used + not_used == 6
