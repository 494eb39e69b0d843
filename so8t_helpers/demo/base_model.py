"""The demo's base: a Phi-3.5 of 4 M parameters, pre-trained on plain questions and answers until it answers.

It has seen the think command and never a thought, so that what training adds is thinking and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer, Phi3ForCausalLM

from so8t_helpers.demo import words
from so8t_helpers.demo.copying_init import start_copying
from so8t_helpers.demo.records import pretraining_talks
from so8t_helpers.demo.scenes import Draft
from so8t_helpers.demo.tokenizer import ADDED_TOKENS, END_OF_TEXT, VOCAB_SIZE, write_tokenizer
from so8t_helpers.phi3.chat import user_turn
from so8t_helpers.phi3.template import of_tokenizer
from so8t_helpers.run.progress import Progress
from so8t_helpers.settings import Settings
from so8t_helpers.thinking import format as think_format

STEPS = 450
BATCH = 12
LEARNING_RATE = 1e-3
WARMUP = 10
WHY = "なぜですか。判定も教えてください。"
ASKED_WHY = 0.4  # share of the answers
SEED = 7
# A fixed number, since the order of additions, and so the weights' last bits, depends on it.
THREADS = 2
THINK_COMMAND = "/think"
IGNORED = -100

# Every third of Phi-3.5's 48 factors: this model's heads have a third of the rotated pairs.
LONG_FACTOR = [
    1.08,
    1.34,
    1.62,
    3.23,
    7.7,
    17.67,
    30.42,
    32.93,
    50.34,
    57.93,
    62.61,
    63.14,
    63.93,
    64.03,
    64.12,
    64.51,
]
SHORT_FACTOR = [1.0, 1.03, 1.05, 1.07, 1.16, 1.29, 1.79, 1.88, 1.99, 2.02, 2.02, 2.03, 2.03, 2.03, 2.19, 2.73]

# As the published config.json: rope keys by their old names, which llama.cpp and Ollama read.
CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float16",
    "embd_pdrop": 0.0,
    "eos_token_id": END_OF_TEXT,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": END_OF_TEXT,
    "partial_rotary_factor": 1.0,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": LONG_FACTOR, "short_factor": SHORT_FACTOR, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}


def write_base(settings: Settings, folder: Path, steps: int = STEPS) -> None:
    """Write the whole model folder: tokenizer, configuration, weights after `steps` steps."""
    write_tokenizer(folder, tokenizer_texts())
    for name, data in {
        "config.json": CONFIG,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": [END_OF_TEXT + 7, END_OF_TEXT],
            "pad_token_id": END_OF_TEXT,
        },
    }.items():
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8", newline="\n")
    tensors = pretrain(settings, folder, steps)
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})


def tokenizer_texts(talks: int = 6000) -> Iterator[str]:
    """What the tokenizer is trained on: words, characters, questions, and answers in all three forms."""
    # A digit stands alone as a piece, so it parts the words; without it they would take the leading space in.
    for word in words.UNITS_OF_MEANING:
        yield from ["0" + word] * 6000
    for start, end in (("!", "~"), ("！", "～")):
        yield "".join(map(chr, range(ord(start), ord(end) + 1)))
    for draft in (talk[0] for talk in pretraining_talks(talks)):
        thinking = think_format.with_decision(draft.reasoning, draft.label)
        yield from (draft.question, user_turn(draft.question, THINK_COMMAND), draft.output)
        yield think_format.build(think_format.ThinkText("seed", draft.output, thinking))
        yield think_format.build(
            think_format.ThinkText(
                "quadruple",
                draft.output,
                task=draft.reasoning,
                safety=draft.domain,
                policy=f"判定: {draft.label}",
            )
        )


def pretrain(settings: Settings, folder: Path, steps: int) -> dict[str, Tensor]:
    """Train on the answers, `BATCH` new talks a step; return the float32 state dict."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = Phi3ForCausalLM(AutoConfig.from_pretrained(folder)).float()
            start_copying(model)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, steps, pct_start=min(0.5, WARMUP / steps), cycle_momentum=False
        )
        with Progress(settings, "demo", steps, "step", "pre-training the demo's base") as tracker:
            for ids, labels in batches(folder, pretraining_talks(steps * BATCH)):
                # The output matrix is needed where an answer is predicted, a fifth of the places.
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
                answers = labels[:, 1:] != IGNORED
                loss = cross_entropy(model.lm_head(hidden[answers]), labels[:, 1:][answers])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                tracker.update(loss=loss.item())
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}
    finally:
        torch.set_num_threads(threads)


def batches(folder: Path, talks: list[list[Draft]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, labels), both (BATCH, length): half of the talks with the think command, no thoughts.

    Padding stands on the right, where causal attention never looks back to it, so no mask is needed.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dialect = of_tokenizer(tokenizer)
    rng = Random(SEED)
    encoded = []
    for talk in talks:
        command = THINK_COMMAND if rng.random() < 0.5 else ""
        messages: list[dict[str, str]] = []
        for draft in talk:
            question = draft.asked if messages else draft.question
            messages.append({"role": "user", "content": user_turn(question, command)})
            messages.append({"role": "assistant", "content": draft.output})
            # Asked for it afterwards, it can give the reason, as any instructed model can: what tuning then
            # has to teach is to think first and unasked, in a format, not the words themselves.
            if rng.random() < ASKED_WHY:
                reason = think_format.with_decision(draft.reasoning, draft.label)
                messages.append({"role": "user", "content": WHY})
                messages.append({"role": "assistant", "content": reason})
        encoded.append(tokenizer(dialect.render(messages), add_special_tokens=False)["input_ids"])
    # Rows of like length go together, out of eight batches at a time: much less padding to compute.
    for start in range(0, len(encoded), 8 * BATCH):
        pool = sorted(encoded[start : start + 8 * BATCH], key=len)
        groups = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(map(len, group))
            ids = torch.tensor([row + [END_OF_TEXT] * (longest - len(row)) for row in group])
            labels = torch.tensor([answer_labels(row) + [IGNORED] * (longest - len(row)) for row in group])
            yield ids, labels


def answer_labels(ids: list[int]) -> list[int]:
    """Return the ids of what the assistant says, `<|end|>` included, and IGNORED elsewhere."""
    assistant, end = (END_OF_TEXT + ADDED_TOKENS.index(token) for token in ("<|assistant|>", "<|end|>"))
    labels, answering = [], False
    for token in ids:
        labels.append(token if answering else IGNORED)
        answering = token == assistant or (answering and token != end)
    return labels
