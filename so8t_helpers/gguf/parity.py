"""Whether a GGUF file cuts text into the same tokens as the model folder's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from so8t_helpers.engines.llama_cpp import open_llama_cpp
from so8t_helpers.phi3.chat import Dialect
from so8t_helpers.phi3.template import of_tokenizer
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
        StageError: the first text that is cut differently, or a token that llama.cpp adds to every prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    # Alone, and between texts with and without white space around it.
    special = [sample for t in tokens for sample in (t, f"前{t}後", f"前 {t} 後", f"前\n{t}\n後", f"{t}{t}")]
    dialect = of_tokenizer(tokenizer)
    samples = [*special, *TEXTS, *(_chat(text, dialect) for text in TEXTS), *texts]
    with open_llama_cpp(gguf, num_ctx=256, timeout=timeout) as engine:
        for text in samples:
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            found = engine.tokenize(text)
            if found != expected:
                raise StageError(
                    f"{gguf}: cuts {text!r} into {found}, the tokenizer of {folder} into {expected}; the "
                    "model would read other tokens than it was trained on. Check that folder's added tokens "
                    "(rstrip and lstrip among them) and, against tokenizer.ggml.pre, its pre-tokenizer"
                )
        chat = _chat(TEXTS[0], dialect)
        served = engine.post("/tokenize", {"content": chat, "add_special": True, "parse_special": True})
        if (found := served["tokens"]) != engine.tokenize(chat):
            raise StageError(
                f"{gguf}: llama.cpp would read a prompt as {found[:2]} … {found[-2:]}, with a token before "
                "or behind it that training does not add; set add_bos_token and add_eos_token to false in "
                f"{folder / 'tokenizer_config.json'}"
            )
    return len(samples)


def _chat(text: str, dialect: Dialect) -> str:
    system = {"ja": "日本語で答えてください。", "en": "Answer in English."}[language_of(text)]
    turns = {"system": system, "user": text, "assistant": text}
    if not dialect.takes_system:
        del turns["system"]
    return dialect.render([{"role": role, "content": content} for role, content in turns.items()])
