"""Whether a GGUF file cuts text into the same tokens as the model folder's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from so8t_helpers.engines.llama_cpp import open_llama_cpp
from so8t_helpers.phi3.chat import render
from so8t_helpers.run.files import StageError
from so8t_helpers.thinking.language import language_of

# Kana, kanji, full-width forms, half-width kana, combining marks, emoji, rare kanji that need byte fallback,
# white space in places where tokenizers differ, and text that looks like markup.
TEXTS = (
    "吾輩は猫である。名前はまだ無い。",
    "東京都の人口は約1,400万人（2024年）です。\n\n- カタカナ\n- ひらがな",
    "ﾊﾝｶｸ ＡＢＣ１２３　全角空白",
    "が゛は゜ 👩‍👩‍👧 𠮷野家 鬱蒼 ①㍿",
    "  leading, double  and trailing spaces  ",
    "\ttab\r\nnew line\n\n\n",
    "# 思考ステップ\n1. 読む\n# 最終回答\nはい",
    "# Thinking\n1. Don't panic.\nDecision: ALLOW\n\n# Final answer\nIt's 72, isn't it?",
    "<think-task>抽出</think-task><final>答え</final>",
    "def f(x): return x**2  # コメント",
)


def check_tokens(gguf: Path, folder: Path, texts: Sequence[str], timeout: float) -> int:
    """Compare the token ids of all special tokens, Japanese texts, whole chats and `texts`; return how many.

    Raises:
        StageError: the first text that is cut differently.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    # Alone, and between texts with and without white space around it.
    special = [sample for t in tokens for sample in (t, f"前{t}後", f"前 {t} 後", f"前\n{t}\n後", f"{t}{t}")]
    samples = [*special, *TEXTS, *(_chat(text) for text in TEXTS), *texts]
    with open_llama_cpp(gguf, num_ctx=256, timeout=timeout) as engine:
        for text in samples:
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            found = engine.tokenize(text)
            if found != expected:
                raise StageError(
                    f"{gguf}: cuts {text!r} into {found}, the tokenizer of {folder} into {expected}; the "
                    "model would read other tokens than it was trained on. Check tokenizer.model and the "
                    "added tokens in that folder"
                )
    return len(samples)


def _chat(text: str) -> str:
    system = {"ja": "日本語で答えてください。", "en": "Answer in English."}[language_of(text)]
    turns = {"system": system, "user": text, "assistant": text}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    return render(messages, add_generation_prompt=True)
