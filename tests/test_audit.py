import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t_helpers.__main__ import main
from so8t_helpers.thinking import audit
from so8t_helpers.thinking.audit import AuditLog, verify_audit
from so8t_helpers.thinking.audit_checkpoint import EVERY, public_key
from so8t_helpers.thinking.audit_key import AuditError, hmac_code, key_file, load_key
from so8t_helpers.thinking.audit_lines import canonical, published_head

KEY = b"k" * 32
LINES = 6


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", KEY)
    for number in range(1, LINES):
        log.append({"event": "answer", "request_id": f"r{number}", "decision": "ALLOW"})
    return log


def rewrite(log, change):
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(change(lines)))


def test_a_log_as_written_holds(log):
    verdict = verify_audit(log.path, log.head, KEY)
    assert verdict.ok
    assert (verdict.lines, verdict.head, verdict.line, verdict.problem) == (LINES, log.head, None, None)
    lines = [json.loads(line) for line in log.path.read_text("ascii").splitlines()]
    assert [line["seq"] for line in lines] == list(range(LINES))
    assert [line["previous"] for line in lines[1:]] == [line["mac"] for line in lines[:-1]]


def test_an_older_head_holds_too(log):
    old = log.head
    log.append({"event": "answer"})
    assert verify_audit(log.path, old, KEY).ok
    assert verify_audit(log.path, old.partition(":")[2], KEY).ok
    assert published_head(log.path) == log.head
    assert published_head(log.path.with_name("other.jsonl")) is None


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_single_byte_edit_is_found_and_its_line_named(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    log = AuditLog(path, KEY)
    log.append({"event": "answer", "answer_chars": 12, "decision": "DENY"})
    log.append({"event": "answer", "answer_chars": 13, "decision": "ALLOW"})
    raw = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    old = raw[position]
    raw[position] = data.draw(st.integers(0, 255).filter(lambda byte: byte != old))
    path.write_bytes(raw)
    verdict = verify_audit(path, key=KEY)
    assert not verdict.ok
    assert verdict.line == bytes(raw[:position]).count(b"\n") + 1


@pytest.mark.parametrize("number", range(LINES))
def test_deleted_lines_are_found(log, number):
    rewrite(log, lambda lines: lines[:number] + lines[number + 1 :])
    verdict = verify_audit(log.path, key=KEY)
    assert not verdict.ok
    assert verdict.line == number + 1


def test_reordered_doubled_and_foreign_lines_are_found(log, tmp_path):
    other = AuditLog(tmp_path / "other.jsonl", KEY)
    other.append({"event": "answer"})
    foreign = other.path.read_bytes().splitlines(keepends=True)[1]
    good = log.path.read_bytes()
    for change in (
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: [*lines[:2], foreign, *lines[2:]],
        lambda lines: [*lines[:2], b"\n", *lines[2:]],
    ):
        log.path.write_bytes(good)
        rewrite(log, change)
        verdict = verify_audit(log.path, key=KEY)
        assert (verdict.ok, verdict.line, verdict.lines) == (False, 3, 2)


def test_a_cut_tail_is_found_against_the_head_beside_it(log):
    rewrite(log, lambda lines: lines[:-2])
    verdict = verify_audit(log.path, key=KEY)
    assert (verdict.ok, verdict.line) == (False, LINES - 1)
    assert "cut" in verdict.problem
    with pytest.raises(AuditError, match="cut"):
        AuditLog(log.path, KEY)


def test_a_cut_tail_with_an_older_head_file_is_found_against_the_published_head(log, tmp_path):
    older = log.path.with_name("audit.jsonl.head").read_text()
    log.append({"event": "answer"})
    published = log.append({"event": "answer"})
    shorter = AuditLog(tmp_path / "shorter.jsonl", KEY)
    rewrite(log, lambda lines: lines[:-2])
    log.path.with_name("audit.jsonl.head").write_text(older)
    assert verify_audit(log.path, key=KEY).ok  # nothing within the folder can show it
    assert not verify_audit(log.path, published, KEY).ok
    assert not verify_audit(log.path, published.partition(":")[2], KEY).ok
    assert not verify_audit(shorter.path, published, KEY).ok


def test_a_missing_or_forged_head_file_is_a_failure(log):
    head = log.path.with_name("audit.jsonl.head")
    good = head.read_text()
    last = json.loads(log.path.read_text("ascii").splitlines()[-1])
    forged = (
        f"{last['seq']}:{last['mac']}"  # every line tells what would be its head, but not the head's code
    )
    for text in (None, "", forged, f"{forged} {'0' * 64}", good.replace(":", ": ")):
        head.unlink() if text is None else head.write_text(text)
        verdict = verify_audit(log.path, log.head, KEY)
        assert (verdict.ok, verdict.line) == (False, LINES + 1)
        assert "head" in verdict.problem
        with pytest.raises(AuditError, match="head"):
            AuditLog(log.path, KEY)
    head.write_text(good)
    assert verify_audit(log.path, key=KEY).ok


def test_opening_checks_the_last_line_and_names_a_bad_one(log):
    good = log.path.read_bytes()
    for bad in (good.replace(b'"r5"', b'"r6"'), good.rpartition(b"\n{")[0] + b"\nno line\n"):
        log.path.write_bytes(bad)
        with pytest.raises(AuditError, match=f"line {LINES}: "):
            AuditLog(log.path, KEY)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_the_lock_is_private_and_is_waited_for_in_bounded_time(log, monkeypatch):
    lock = log.path.with_name("audit.jsonl.lock")
    assert lock.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(audit, "_PATIENCE", 0.2)
    waiting = AuditLog(log.path, KEY)
    with FileLock(lock), pytest.raises(AuditError, match="held by another"):
        waiting.append({"event": "answer"})
    waiting.append({"event": "answer"})


# --- signatures ---------------------------------------------------------------------------------------------


@pytest.fixture
def signed(tmp_path):
    """Two checkpoints that were due, some lines, the one of a stop, and one line after it."""
    log = AuditLog(tmp_path / "signed.jsonl", KEY)
    for number in range(2 * EVERY + 5):
        log.append({"event": "answer", "number": number, "filling": "x" * 700})
    log.sign()
    log.append({"event": "answer"})
    return log


def chained(lines, key):
    """Lines numbered and coded anew: what a forger with that key can do."""
    previous, made = "0" * 64, []
    for seq, raw in enumerate(lines):
        line = {**json.loads(raw), "seq": seq, "previous": previous}
        line.pop("mac")
        previous = line["mac"] = hmac_code(key, "line", canonical(line))
        made.append(canonical(line).encode() + b"\n")
    return made


def test_the_public_key_verifies_without_the_log_s_key(signed, tmp_path, monkeypatch):
    monkeypatch.delenv("SO8T_AUDIT_KEY", raising=False)
    lines = [json.loads(line) for line in signed.path.read_bytes().splitlines()]
    places = [line["seq"] for line in lines if line["event"] == "checkpoint"]
    assert places == [EVERY, 2 * EVERY, 2 * EVERY + 8]
    assert lines[0]["public_key"] == signed.public_key
    file = tmp_path / "public"
    file.write_text(signed.public_key + "\n")
    for public in (signed.public_key, str(file)):
        verdict = verify_audit(signed.path, signed.head, public=public)
        assert (verdict.ok, verdict.lines, verdict.signed) == (True, 2 * EVERY + 10, 2 * EVERY + 8)
    assert verify_audit(signed.path, key=KEY).signed == 2 * EVERY + 8
    assert "signature" in verify_audit(signed.path, public=public_key(b"x" * 32)).problem
    with pytest.raises(AuditError, match="64 digits"):
        verify_audit(signed.path, public="abc")


def test_the_verb_tells_what_is_signed(signed, capsys):
    assert main(["verify", str(signed.path), "--public-key", signed.public_key]) == 0
    assert f"all {2 * EVERY + 10} lines hold, {2 * EVERY + 8} of them signed" in capsys.readouterr().out
    assert main(["verify", str(signed.path), "--public-key", public_key(b"x" * 32)]) == 1
    assert f"line {EVERY + 1}: its signature does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("forge", "line"),
    [
        (lambda lines: [*lines[:7], lines[7].replace(b"xxx", b"yyy", 1), *lines[8:]], EVERY + 1),
        (lambda lines: [*lines[:7], *lines[8:]], EVERY),
        (
            lambda lines: [
                *lines[: EVERY + 7],
                lines[EVERY + 7].replace(b"xx", b"y", 1),
                *lines[EVERY + 8 :],
            ],
            201,
        ),
        (lambda lines: [*lines[:EVERY], *lines[EVERY + 1 :]], EVERY + 1),
        (lambda lines: [line for line in lines if b'"checkpoint"' not in line], EVERY + 1),
    ],
    ids=["edited", "deleted", "edited later", "a checkpoint out", "all checkpoints out"],
)
def test_who_has_the_chain_s_key_alone_forges_nothing_that_was_signed(signed, forge, line):
    """The forger is the verifier of old, who needed the HMAC key: chain and codes are as they should be."""
    rewrite(signed, lambda lines: chained(forge(lines), KEY))
    verdict = verify_audit(signed.path, public=signed.public_key)
    assert (verdict.ok, verdict.line) == (False, line)


def test_another_key_is_told_apart_from_an_edit(log):
    other = b"x" * 32
    assert "another key" in verify_audit(log.path, key=other).problem
    with pytest.raises(AuditError, match="another key"):
        AuditLog(log.path, other)


@pytest.mark.parametrize("cut", [1, 2, 40, -1])
def test_a_torn_last_line_is_mended_and_told(log, cut):
    good = log.path.read_bytes()
    line = good.splitlines(keepends=True)[-1]
    torn = line[:cut]
    log.path.write_bytes(good + torn)
    assert verify_audit(log.path, key=KEY).ok  # nobody was answered on it: the head is before it
    again = AuditLog(log.path, KEY)
    again.append({"event": "answer"})
    assert verify_audit(log.path, again.head, KEY).ok
    event = json.loads(log.path.read_text("ascii").splitlines()[LINES])
    assert (event["event"], event["bytes"]) == ("recovered", len(torn))


def test_an_acknowledged_line_that_is_torn_later_is_a_cut_tail(log):
    log.path.write_bytes(log.path.read_bytes()[:-5])
    verdict = verify_audit(log.path, key=KEY)
    assert (verdict.ok, verdict.line) == (False, LINES)
    with pytest.raises(AuditError, match="cut"):
        AuditLog(log.path, KEY)


def test_an_empty_or_missing_log(tmp_path):
    with pytest.raises(AuditError, match="no such"):
        verify_audit(tmp_path / "audit.jsonl", key=KEY)
    (tmp_path / "audit.jsonl").touch()
    assert not verify_audit(tmp_path / "audit.jsonl", key=KEY).ok


def test_a_kill_between_line_and_head_loses_nothing(log):
    head = log.path.with_name("audit.jsonl.head")
    before = head.read_text()
    log.append({"event": "answer"})
    head.write_text(before)
    assert verify_audit(log.path, key=KEY).lines == LINES + 1
    again = AuditLog(log.path, KEY)
    again.append({"event": "answer"})
    assert verify_audit(log.path, again.head, KEY).lines == LINES + 2


WRITER = """
import sys
from pathlib import Path
from so8t_helpers.thinking.audit import AuditLog
log = AuditLog(Path(sys.argv[1]), b"k" * 32)
for number in range(100000):
    log.append({"event": "answer", "request_id": str(number), "filling": "x" * 3000})
    print(number, flush=True)
"""


def test_a_killed_process_loses_no_acknowledged_line(tmp_path):
    path = tmp_path / "audit.jsonl"
    acknowledged = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(20):
            process.stdout.readline()
        process.kill()
        rest = process.communicate()[0]
        acknowledged += 20 + rest.count("\n")
    verdict = verify_audit(path, key=KEY)
    assert verdict.ok, verdict
    events = [json.loads(line)["event"] for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    assert events.count("answer") >= acknowledged
    assert verify_audit(path, AuditLog(path, KEY).head, KEY).ok


def _append(path, count):
    log = AuditLog(path, KEY)
    for number in range(count):
        log.append({"event": "answer", "pid": os.getpid(), "number": number})


def test_threads_and_processes_share_one_log(tmp_path):
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append, args=(path, 15)) for _ in range(3)]
    threads = [threading.Thread(target=_append, args=(path, 15)) for _ in range(3)]
    for worker in [*processes, *threads]:
        worker.start()
    for worker in [*processes, *threads]:
        worker.join()
    verdict = verify_audit(path, key=KEY)
    assert verdict.ok, verdict
    assert verdict.lines == 1 + 6 * 15


@given(
    st.dictionaries(
        st.text(max_size=5), st.one_of(st.text(max_size=20), st.integers(), st.none()), max_size=4
    )
)
@settings(max_examples=50, deadline=None)
def test_any_text_survives(tmp_path_factory, entry):
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    log = AuditLog(path, KEY)
    log.append({"entry": entry, "odd": "\u2028\ud800\x00改行\n"})
    assert verify_audit(path, log.head, KEY).ok
    assert json.loads(path.read_text("ascii").splitlines()[1])["entry"] == entry


def test_the_chains_own_fields_are_refused(log):
    with pytest.raises(AuditError, match="mac, seq"):
        log.append({"seq": 1, "mac": "x"})


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(log, monkeypatch):
    good = log.path.read_bytes()
    real = os.fsync

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AuditError, match="disk full"):
        log.append({"event": "answer"})
    monkeypatch.setattr(os, "fsync", real)
    assert log.path.read_bytes() == good
    log.append({"event": "answer"})
    assert verify_audit(log.path, log.head, KEY).ok


def test_a_disk_that_is_full_for_the_head_leaves_no_line_either(log, monkeypatch):
    good, head = log.path.read_bytes(), log.head

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(AuditError, match="disk full"):
        patched.setattr("so8t_helpers.thinking.audit_lines.write_text", full)
        log.append({"event": "answer"})
    assert (log.path.read_bytes(), log.head) == (good, head)
    log.append({"event": "answer"})
    assert verify_audit(log.path, log.head, KEY).lines == LINES + 1


def test_a_log_that_is_moved_away_is_not_begun_anew_in_silence(log):
    log.path.rename(log.path.with_name("old.jsonl"))
    with pytest.raises(AuditError, match=r"moved or removed.*serve\.audit_log"):
        log.append({"event": "answer"})
    log.path.touch()  # what a rotation leaves
    with pytest.raises(AuditError, match="the tail was cut"):
        log.append({"event": "answer"})


def test_a_log_of_version_1_is_left_as_it_is_and_says_what_to_do(tmp_path):
    path = tmp_path / "audit.jsonl"
    line = {"event": "log", "version": 1, "key": "x", "seq": 0, "previous": "0" * 64, "mac": "x"}
    path.write_text(canonical(line) + "\n")
    before = path.read_bytes()
    with pytest.raises(AuditError, match=r"line 1: .*version 1 cannot be gone on with.*serve\.audit_log"):
        AuditLog(path, KEY)
    assert path.read_bytes() == before
    assert not path.with_name("audit.jsonl.head").exists()


@pytest.mark.parametrize(
    "line",
    [b"[" * 200_000, b'{"mac":' * 200_000, b'{"mac":"x","seq":' + b"9" * 5000 + b"}", b'{"mac":"\\u3042"}'],
    ids=["deep", "deep objects", "long number", "no ASCII"],
)
@pytest.mark.parametrize("with_key", [True, False])
def test_no_line_makes_verifying_or_opening_break_off(log, line, with_key):
    rewrite(log, lambda lines: [*lines[:-1], line + b"\n"])
    given = {"key": KEY} if with_key else {"public": public_key(KEY)}
    verdict = verify_audit(log.path, **given)
    assert (verdict.ok, verdict.line) == (False, LINES)
    with pytest.raises(AuditError, match=f"line {LINES}: not a line that this log writes"):
        AuditLog(log.path, KEY)


@pytest.mark.parametrize("head", [b"1:abc \xff\n", b"\xff:\xfe x\n", b"--1:abc x\n", b"1" * 5000 + b":x y\n"])
@pytest.mark.parametrize("with_key", [True, False])
def test_no_head_file_makes_verifying_or_opening_break_off(log, head, with_key):
    log.path.with_name("audit.jsonl.head").write_bytes(head)
    given = {"key": KEY} if with_key else {"public": public_key(KEY)}
    assert not verify_audit(log.path, **given).ok
    with pytest.raises(AuditError):
        AuditLog(log.path, KEY)


def test_codes_have_a_key_and_a_purpose(log, tmp_path):
    other = AuditLog(tmp_path / "other.jsonl", b"x" * 32)
    assert log.code("考え") == log.code("考え") != other.code("考え")
    assert log.code("考え") != log.code("考え ")
    assert len(log.code("考え")) == 64


# --- the key ------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("SO8T_AUDIT_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "config"))
    return tmp_path / "config"


def test_a_key_file_is_made_once(home):
    key = load_key()
    assert key == load_key()
    assert len(key) == 64
    assert key_file().is_relative_to(home)
    if os.name == "posix":
        assert key_file().stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_key_that_others_may_read_is_refused(home):
    load_key()
    key_file().chmod(0o640)
    with pytest.raises(AuditError, match="chmod 600"):
        load_key()


def test_the_environment_goes_before_the_file(home, monkeypatch):
    monkeypatch.setenv("SO8T_AUDIT_KEY", "e" * 40)
    assert load_key() == b"e" * 40
    assert not key_file().exists()
    monkeypatch.setenv("SO8T_AUDIT_KEY", "short")
    with pytest.raises(AuditError, match="at least 32"):
        load_key()


def test_verifying_makes_no_key(home, log):
    with pytest.raises(AuditError, match="no audit key"):
        verify_audit(log.path)
    assert not key_file().exists()


def test_the_same_key_from_the_file_verifies_a_copy_elsewhere(home, tmp_path):
    log = AuditLog(tmp_path / "a" / "audit.jsonl")
    log.append({"event": "answer"})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert verify_audit(tmp_path / "b" / "audit.jsonl", log.head).ok
