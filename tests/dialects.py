"""The published chat templates of the Phi-3 family and of SmolLM2, and the tokens that they write."""
# ruff: noqa: E501  (templates as they were published)

from __future__ import annotations

from dataclasses import dataclass

from so8t_helpers.demo.tokenizer import ADDED_TOKENS, CHAT_TEMPLATE
from so8t_helpers.phi3.chat import Dialect
from so8t_helpers.phi3.template import dialect


@dataclass(frozen=True)
class Published:
    """A template with its special tokens; `system` says whether it writes system turns."""

    template: str
    bos: str
    eos: str
    controls: tuple[str, ...]
    end: str
    system: bool = True

    @property
    def dialect(self) -> Dialect:
        tokens = {"bos_token": self.bos, "eos_token": self.eos}
        return dialect(self.template, tokens, self.controls, "test")


_PHI = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")

PUBLISHED = {
    "Phi-3.5": Published(
        CHAT_TEMPLATE, "<s>", "<|endoftext|>", ("<unk>", "<s>", "</s>", *ADDED_TOKENS), "<|end|>"
    ),
    "Phi-3-mini of July 2024": Published(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '"
        "<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif "
        "message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<s>",
        "<|endoftext|>",
        _PHI,
        "<|end|>",
    ),
    "Phi-3-mini of April 2024 and Phi-3-medium": Published(
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + "
        "message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
        "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}",
        "<s>",
        "<|endoftext|>",
        _PHI,
        "<|end|>",
        system=False,
    ),
    "Phi-4-mini": Published(
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] "
        "is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + "
        "'<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}"
        "{% endif %}",
        "<|endoftext|>",
        "<|endoftext|>",
        (*_PHI[1:], "<|tool|>", "<|/tool|>"),
        "<|end|>",
    ),
    "Phi-4": Published(
        "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
        "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|endoftext|>",
        "<|im_end|>",
        _CHATML,
        "<|im_end|>",
    ),
    "SmolLM2": Published(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>",
        "<|im_end|>",
        _CHATML,
        "<|im_end|>",
    ),
    "Llama 3 (strips contents)": Published(
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
        "%}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
}
PHI35 = PUBLISHED["Phi-3.5"].dialect
