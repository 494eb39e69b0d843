"""The Modelfile: template, stops and parameters with which Ollama itself parts our thinking from the answer.

Ollama reads the two marks of the thinking off the template: the first and the last text of the list that
holds `.Thinking` inside `range .Messages` (thinking/template.go of v0.24). A template has one such pair, so
it parts one of the two think formats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from so8t_helpers.engines.base import STOPS, EngineError
from so8t_helpers.markers import FINAL_TAG, SEED_FINAL, SEED_THINKING, THINK_TAGS

_MARKS = {
    "seed": (f"{SEED_THINKING}\n", f"\n\n{SEED_FINAL}\n", ""),
    "quadruple": (f"<{THINK_TAGS[0]}>", f"\n<{FINAL_TAG}>", f"</{FINAL_TAG}>"),
}

# Phi-3.5's chat template in Go's template language. `$last` is the turn that is to be answered; a chat that
# ends with the assistant's own turn is gone on with.
_TEMPLATE = """\
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "system" }}<|system|>
{{ .Content }}<|end|>
{{ else if eq .Role "user" }}<|user|>
{{ COMMAND }}{{ .Content }}<|end|>
{{ else if eq .Role "assistant" }}<|assistant|>
{{ if .Thinking }}OPEN{{ .Thinking }}CLOSE{{ end }}{{ .Content }}{{ if not $last }}<|end|>
{{ end }}{{ end }}
{{- if and $last (ne .Role "assistant") }}<|assistant|>
{{ end }}
{{- end }}"""


@dataclass(frozen=True)
class Modelfile:
    """What Ollama is told about a GGUF.

    Attributes:
        style: the think format that Ollama is to part, "seed" or "quadruple".
        think_command: put before the last question unless `think` is false.
        num_ctx: tokens of context; over 4096 llama.cpp takes the long rope factors.
        system: system turn for chats that bring none; null for none.
        temperature: default of the model in Ollama.
        threads: of the CPU; null leaves the choice to Ollama.
    """

    style: str = "seed"
    think_command: str = "/think"
    num_ctx: int = 4096
    system: str | None = None
    temperature: float = 0.0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("think_command", "system"):
            value = getattr(self, name) or ""
            if "{{" in value or '"""' in value:
                raise EngineError(f'Modelfile: {name} {value!r} must not contain {{{{ or """')

    @property
    def template(self) -> str:
        """The chat template in Go's language."""
        opening, closing, _ = _MARKS[self.style]
        command = f"if and $.Think $last }}}}{self.think_command} {{{{ end" if self.think_command else '""'
        return _TEMPLATE.replace("COMMAND", command).replace("OPEN", opening).replace("CLOSE", closing)

    @property
    def parameters(self) -> dict[str, Any]:
        """Stops and sampling; Ollama's own repeat penalty of 1.1 would make greedy answers differ."""
        _, _, end = _MARKS[self.style]
        return {
            "stop": [*STOPS, *filter(None, [end])],
            "num_ctx": self.num_ctx,
            "temperature": self.temperature,
            "repeat_penalty": 1.0,
            **({"num_thread": self.threads} if self.threads else {}),
        }

    def text(self, gguf_name: str) -> str:
        """The same as a Modelfile for `ollama create`, beside a GGUF of that path."""
        lines = [f"FROM {gguf_name}", f'TEMPLATE """{self.template}"""']
        for key, value in self.parameters.items():
            values = value if isinstance(value, list) else [value]
            lines += [f"PARAMETER {key} {json.dumps(v, ensure_ascii=False)}" for v in values]
        if self.system:
            lines.append(f'SYSTEM """{self.system}"""')
        return "\n".join(lines) + "\n"
