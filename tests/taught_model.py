"""A small model that knows a few texts by heart, so that engines have something well formed to write."""

from __future__ import annotations

from pathlib import Path

import phi3_folders
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Phi3ForCausalLM

from so8t_helpers.phi3.chat import user_turn
from so8t_helpers.thinking.format import HEADED, ThinkText, build, with_decision
from tests.dialects import PHI35

QUESTION = "東京の人口は？"
FINAL = "約千四百万人です。"
THINKING = "東京の人口を思い出す。"
UNSAFE, REFUSAL = "隣の人の番号は？", "お答えできません。"
LENGTH = 220  # tokens that the longest text takes; the small tokenizer writes some characters byte by byte


def answer(style: str, final: str = FINAL, label: str = "ALLOW") -> str:
    """The text that the model writes when it is to think, in one of the formats."""
    if style in HEADED:
        return build(ThinkText(style, final, with_decision(THINKING, label, style)))
    policy = with_decision("数字。", label)
    return build(ThinkText("quadruple", final, task=THINKING, safety="確かめた。", policy=policy))


def rows(style: str = "seed") -> list[dict[str, object]]:
    """Records as 01_dataset writes them, one to answer and one to deny; the model knows both by heart."""
    cases = (
        (QUESTION, FINAL, "ALLOW", "contains", "千四百万"),
        (UNSAFE, REFUSAL, "DENY", "refusal", "できません"),
    )
    made: list[dict[str, object]] = []
    for number, (question, final, label, kind, value) in enumerate(cases):
        user = {"role": "user", "content": user_turn(question, "/think")}
        messages = [user, {"role": "assistant", "content": answer(style, final, label)}]
        made.append(
            {
                "id": f"{number:016x}",
                "label": label,
                "task": "facts",
                "messages": messages,
                "text": PHI35.render(messages),
                "question": question,
                "prompt": user["content"],
                "check": {"kind": kind, "value": value},
            }
        )
    return made


def taught_folder(folder: Path, style: str, steps: int = 200) -> Path:
    """Make a Phi3 folder that answers both questions in a think format, without /think plainly."""
    phi3_folders.small_folder(folder, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = [(QUESTION, "/think", answer(style)), (QUESTION, "", FINAL)]
    known.append((UNSAFE, "/think", answer(style, REFUSAL, "DENY")))
    ids = torch.zeros(len(known), LENGTH, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (question, command, written) in enumerate(known):
        user = {"role": "user", "content": user_turn(question, command)}
        prompt = PHI35.render([user], add_generation_prompt=True)
        asked, whole = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (prompt, f"{prompt}{written}<|end|>")
        )
        ids[row, : len(whole)] = torch.tensor(whole)
        labels[row, len(asked) : len(whole)] = torch.tensor(whole[len(asked) :])
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.005:
            break
    else:
        raise AssertionError(f"not learnt by heart after {steps} steps: loss {float(loss.detach()):.3f}")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
