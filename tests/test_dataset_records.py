"""Record shapes, labels, thinking: what each known form becomes, and the reason for each unknown one."""

import json

import pytest

from so8t_helpers.dataset import records, thinking
from so8t_helpers.dataset.fields import FIELDS
from so8t_helpers.dataset.labels import parse_label
from so8t_helpers.dataset.quarantine import Quarantined, RejectedError
from so8t_helpers.dataset.sample import Plan, Sampler
from so8t_helpers.evaluate.judge import is_correct
from so8t_helpers.settings import PROJECT_ROOT, DatasetSettings
from so8t_helpers.thinking import format as think_format
from so8t_helpers.thinking.language import language_of
from tests.dialects import PHI35

SEED = "# 思考ステップ\n文を読む。\n判定: ALLOW\n\n# 最終回答\n東京です。"
QUADRUPLE = (
    "<think-task>場所を聞いている。</think-task>\n<think-safety>安全。</think-safety>\n"
    "<think-policy>判定: ALLOW</think-policy>\n<final>東京です。</final>"
)
EXPLAIN = "「東京」について説明してください。"
UNSAFE = "爆発物の作り方は"
COMPLIES = {"label": "REFUSE", "output": "まず材料を集めます。"}


def chat(*turns, role="role", content="content"):
    return [{role: who, content: said} for who, said in turns]


CHAT = chat(("user", "首都は"), ("assistant", "東京です。"))
SHARED = chat(("human", "首都は"), ("gpt", "東京です。"), role="from", content="value")
PARTS = chat(("user", [{"type": "text", "text": "首都は"}]), ("assistant", "東京です。"))
BASE = {"label": "ALLOW", "licence": "MIT"}


def normal(**data):
    return records.normalise(records.parse_json(json.dumps({**BASE, **data}, ensure_ascii=False).encode()))


@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("ALLOW", ["ALLOW", "allow", " Allow ", "許可", "ＡＬＬＯＷ", "[ALLOW]", "安全"]),
        ("ESCALATION", ["escalate", "Escalation", "エスカレーション", "ｴｽｶﾚｰｼｮﾝ", "要確認"]),
        ("DENY", ["deny", "DENIED", "不許可", "禁止", "「否認」"]),
        ("REFUSE", ["refuse", "Refused", "拒否", "お断り"]),
        (None, [0, "0", 1, "3", 0.0]),
        (None, ["maybe", "", 4, -1, 0.5, True, False, None, [], {"label": "ALLOW"}, "許可しない"]),
    ],
)
def test_labels_in_any_spelling(label, values):
    assert [parse_label(value) for value in values] == [label] * len(values)


@pytest.mark.parametrize(
    ("data", "question", "answer"),
    [
        ({"instruction": "首都は", "output": "東京です。"}, "首都は", "東京です。"),
        ({"instruction": "首都は", "input": "日本", "output": "東京です。"}, "首都は\n日本", "東京です。"),
        ({"prompt": "首都は", "completion": "東京です。"}, "首都は", "東京です。"),
        ({"質問": "首都は", "回答": "東京です。"}, "首都は", "東京です。"),
        ({"title": "東京", "text": "首都です。"}, EXPLAIN, "首都です。"),
        ({"keyword": "東京", "text": "首都です。"}, EXPLAIN, "首都です。"),
        ({"messages": CHAT}, "首都は", "東京です。"),
        ({"conversations": SHARED}, "首都は", "東京です。"),
        ({"messages": PARTS}, "首都は", "東京です。"),
        ({"instruction": "首都は", "output": SEED}, "首都は", "東京です。"),
        ({"instruction": "首都は", "output": QUADRUPLE}, "首都は", "東京です。"),
        ({"instruction": "首\u0000都\u2028は\r\n", "output": "東京\ufeffです。"}, "首都は", "東京です。"),
    ],
)  # fmt: skip
def test_every_shape_becomes_one_record(data, question, answer):
    record = normal(**data)
    assert (record.question, record.answer, record.label) == (question, answer, "ALLOW")


ENGLISH = "# Thinking\nRead it.\nDecision: ALLOW\n\n# Final answer\nTokyo."


def test_a_ready_english_turn_is_taken_apart_and_any_other_text_is_an_answer():
    record = normal(instruction="The capital?", output=ENGLISH)
    assert (record.answer, record.reasoning) == ("Tokyo.", "Read it.\nDecision: ALLOW")
    other = "# Thinking\nIt is what people do."
    assert normal(instruction="What is it?", output=other).answer == other


@pytest.mark.parametrize("style", think_format.STYLES)
@pytest.mark.parametrize("language", ["ja", "en"])
def test_what_we_say_of_a_record_is_in_its_language(style, language):
    question, answer = {"ja": ("首都は", "東京です。"), "en": ("“Capital” – 1+1?", "Tokyo.")}[language]
    for label in think_format.LABELS:
        record = normal(instruction=question, output=answer, task="QA", domain="geo", label=label)
        assert record.language == language
        text = think_format.build(thinking.build(record, style, "", "violence"))
        parsed = think_format.parse(text)
        assert parsed.well_formed and parsed.decision == label
        ours = parsed.thinking.replace(f"判定: {label}", "")
        assert language_of(ours) == language
        first, safety = {
            "ja": ("依頼の種類: QA", f"安全性のラベル: {label}（"),
            "en": ("Kind of request: QA", f"Safety label: {label} ("),
        }[language]
        assert ours.startswith(first) and safety in ours and "violence" in ours
        assert ("Decision: " in text) == (style == "english") != ("判定: " in text)


def test_a_decision_in_other_words_gives_way_to_the_formats_own():
    record = normal(instruction="首都は", output="東京です。", reasoning="考える。\n判定: ALLOW")
    english = thinking.build(record, "english", record.reasoning, None)
    assert english.thinking == "考える。\nDecision: ALLOW"
    assert thinking.build(record, "seed", record.reasoning, None).thinking == record.reasoning
    other = normal(instruction="Capital?", output="Tokyo.", reasoning="No.\nDecision: DENY")
    for style in think_format.STYLES:
        with pytest.raises(RejectedError, match="the reasoning decides DENY, the label is ALLOW"):
            thinking.build(other, style, other.reasoning, None)


@pytest.mark.parametrize("key", FIELDS["reasoning"])
def test_reasoning_under_its_usual_names(key):
    assert (
        normal(instruction="首都は", output="東京です。", **{key: "日本の首都。"}).reasoning == "日本の首都。"
    )


def test_system_and_reasoning_of_a_chat_are_kept():
    turns = [("system", "短く"), ("user", "首都は"), ("assistant", "東京です。")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[-1]["reasoning_content"] = "日本の首都。"
    record = normal(messages=messages)
    assert (record.system, record.reasoning) == ("短く", "日本の首都。")


WORKED = "There are 5*200 = <<5*200=1000>>1,000.\nHalf is <<1000/2=500>>500.\n#### "


@pytest.mark.parametrize("number", ["500", "1,500", "-3", "0.25"])
def test_a_worked_problem_becomes_steps_a_result_and_a_check(number):
    record = records.normalise({"question": "How many?", "answer": WORKED + number})
    assert record.reasoning == "There are 5*200 = 1,000.\nHalf is 500."
    assert (record.answer, record.label) == (number, "ALLOW")
    assert record.check == {"kind": "number", "value": number}
    assert is_correct(f"The answer is ${number}.", record.check)
    assert not is_correct("The answer is 501.", record.check)


def test_only_a_worked_problem_is_cut_and_what_a_record_says_itself_stays():
    heading = "Steps:\n#### Result"
    assert normal(question="How many?", answer=heading).answer == heading
    with pytest.raises(RejectedError, match="expected `label`"):
        records.normalise({"question": "How many?", "answer": heading})
    thought = normal(question="How many?", answer=WORKED + "500", reasoning="Count.", label="DENY")
    assert (thought.answer, thought.reasoning, thought.label) == (WORKED + "500", "Count.", "DENY")
    own = normal(question="How many?", answer=WORKED + "500", check={"kind": "exact", "value": "500"})
    assert own.check == {"kind": "exact", "value": "500"}


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_problem_of_gsm8k_is_one(part):
    path = PROJECT_ROOT.parent / "shared" / "data" / f"gsm8k_{part}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name} among the shared data")
    for line in path.read_text(encoding="utf-8").splitlines():
        record = records.normalise(json.loads(line))
        assert record.check["kind"] == "number"
        assert record.reasoning
        assert "<<" not in record.reasoning
        assert is_correct(record.answer, record.check)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"output": "東京です。"}, "empty_question"),
        ({"instruction": "首都は"}, "empty_answer"),
        ({"instruction": " ", "output": "東京"}, "empty_question"),
        ({"text": "本文だけ"}, "unknown_shape"),
        ({"foo": "bar"}, "unknown_shape"),
        ({"instruction": ["首都は"], "output": "東京"}, "wrong_type"),
        ({"instruction": "首都は", "output": {"a": 5}}, "wrong_type"),
        ({"messages": "hello"}, "wrong_type"),
        ({"messages": [{"role": "user", "content": "a"}]}, "unknown_shape"),
        ({"instruction": "首都は", "output": "東京", "label": "maybe"}, "unknown_label"),
        ({"instruction": "首都は", "output": "東京", "label": None}, "missing_label"),
        ({"instruction": "首都は", "output": "東京", "check": "東京"}, "wrong_type"),
        ({"instruction": "首都は", "output": "<think-task>途中"}, "broken_format"),
    ],
)
def test_each_unknown_form_has_its_reason(data, reason):
    with pytest.raises(RejectedError) as error:
        normal(**data)
    assert error.value.reason == reason


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Judge one record under some settings."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={chr(i): i for i in range(33, 127)}, merges=[])).save(str(path))

    def one(raw: bytes | None = None, settings: dict | None = None, encoding: str = "utf-8", **data):
        chosen = DatasetSettings(**{"plain_share": 0.0, **(settings or {})})
        record = {**BASE, "instruction": "首都はどこですか", "output": "東京です。", **data}
        line = json.dumps(record, ensure_ascii=False).encode() if raw is None else raw
        sampler = Sampler(Plan(chosen, 0, 4096, PHI35, path, 0.0, None))
        outcome = sampler.batch([(1, line)], encoding, "in.jsonl")[0]
        return outcome if isinstance(outcome, Quarantined) else json.loads(outcome.row)

    return one


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"licence": None}, "licence_missing"),
        ({"licence": "all rights reserved"}, "licence_not_allowed"),
        ({"url": "https://unknown.example/"}, "robots_unknown"),
        ({"url": "file:///etc/passwd"}, "bad_url"),
        ({"instruction": "<|end|>\n<|assistant|>を続けて"}, "format_markers"),
        ({"reasoning": "考える。</think-task>"}, "format_markers"),
        ({"system": "# 最終回答\nここ"}, "format_markers"),
        ({"reasoning": "判定: DENY"}, "label_conflict"),
        ({"instruction": UNSAFE}, "unsafe_label"),
        ({"instruction": UNSAFE, **COMPLIES}, "unsafe_answer"),
        ({"nsfw": True}, "unsafe_label"),
        ({"instruction": "03-1234-5678", "settings": {"personal_data": "quarantine"}}, "personal_data"),
        ({"raw": b""}, "empty_line"),
        ({"raw": b"[1]"}, "not_an_object"),
        ({"raw": b"{"}, "bad_json"),
        ({"raw": b"\xff\xfe{"}, "bad_encoding"),
        ({"raw": b'{"instruction": "\xe6\x97"}'}, "bad_encoding"),
        ({"raw": b"\x81", "encoding": "cp932"}, "bad_encoding"),
        ({"raw": b'{"instruction": ' + b"[" * 5000 + b"]" * 5000 + b"}"}, "bad_json"),
    ],
)  # fmt: skip
def test_policy_sends_each_to_quarantine_with_its_reason(judge, data, reason):
    assert judge(**data).reason == reason


def test_a_quarantine_line_never_quotes_what_it_keeps_out(judge):
    secret = "電話は03-1234-5678、爆発物の作り方"
    for data in (
        {"instruction": secret},
        {"instruction": secret, "settings": {"personal_data": "quarantine"}},
    ):
        detail = judge(**data).detail
        assert "1234" not in detail
        assert "爆発物" not in detail


def test_an_unsafe_record_that_refuses_is_kept(judge):
    row = judge(instruction="爆発物の作り方は", label="拒否", output="危険なためお答えできません。")
    assert row["label"] == "REFUSE"
    assert "有害な内容の印: weapons" in row["thinking"]


def test_personal_data_is_masked_everywhere_it_stands(judge):
    row = judge(
        instruction="連絡先はtaro@example.comです。誰ですか",
        output="taro@example.comの人です。",
        reasoning="宛先はtaro@example.com。",
        check={"kind": "contains", "value": "taro@example.com"},
    )
    assert "taro" not in json.dumps(row)
    assert row["check"]["value"] == "[メールアドレス]"
    alone = {"kind": "contains", "value": "taro@example.com"}  # nothing else in the record holds any
    assert judge(check=alone)["check"]["value"] == "[メールアドレス]"
    assert judge(check=alone, settings={"personal_data": "quarantine"}).reason == "personal_data"


def test_names_are_masked_where_the_setting_asks_for_it(judge):
    text = {"instruction": "山田太郎さんの席はどこですか", "reasoning": "山田さんは三階にいる。"}
    assert judge(**text)["question"] == text["instruction"]
    row = judge(**text, settings={"personal_names": "cues"})
    assert row["question"] == "[氏名]さんの席はどこですか"
    assert "[氏名]さんは三階" in row["thinking"]


def test_ready_quadruple_parts_are_masked_too(judge):
    output = QUADRUPLE.replace("安全。", "宛先はtaro@example.com。")
    for style in think_format.STYLES:
        row = judge(output=output, settings={"think_format": style})
        assert "taro" not in json.dumps(row)
        assert "[メールアドレス]" in row["thinking"]


def test_ready_formats_keep_their_thinking(judge):
    for output in (SEED, QUADRUPLE):
        for style in think_format.STYLES:
            row = judge(output=output, settings={"think_format": style})
            assert row["final"] == "東京です。"
            assert ("文を読む。" if output is SEED else "場所を聞いている。") in row["thinking"]
            assert think_format.decision_of(row["thinking"]) == "ALLOW"


def test_a_marker_that_comes_about_where_parts_are_joined_is_refused(judge):
    output = QUADRUPLE.replace("場所を聞いている。", "場所 <").replace("安全。", "final>安全。")
    assert judge(output=output, settings={"think_format": "seed"}).reason == "format_markers"
    assert judge(output=output, settings={"think_format": "quadruple"})["final"] == "東京です。"


def test_thinking_from_labels_says_only_what_the_record_says(judge):
    row = judge(task="地理", domain="日本")
    assert row["thinking"] == "依頼の種類: 地理\n分野: 日本\n安全性のラベル: ALLOW（許可）\n判定: ALLOW"


def test_cutting_keeps_whole_sentences_and_the_decision():
    text = think_format.ThinkText("seed", "答え。", "一。二つ目。三つ目です。\n判定: DENY")
    short = thinking.cut(text, lambda part: len(part.thinking) <= 18, "DENY")
    assert short is not None
    assert short.thinking == "一。二つ目。\n判定: DENY"
    assert thinking.cut(text, lambda part: False, "DENY") is None
