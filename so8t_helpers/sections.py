"""What a profile's sections are made of, and the section of the /think service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class SettingsError(ValueError):
    """A profile or an override that cannot be used; the message names file, key, expectation and remedy."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors; types are never converted (YAML's `1e-4` is a text)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ServeSettings(Section):
    """The /think service (`so8t serve`). `audit_log: null` is serve/audit.jsonl in this run's folder."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8808
    model: str = "q4_k_m"
    max_query_chars: Count = 8000
    max_new_tokens: Count = 512
    queue_length: Count = 16
    requests_per_minute: Count = 60
    timeout_seconds: Positive = 120.0
    log_queries: bool = False
    audit_log: str | None = None
    connections: Annotated[int, Field(ge=16)] = 512  # open at once
    receive_seconds: Positive = 10.0  # for the head of a request, and again for its body
    client_system_turns: bool = False  # take those of /v1/chat/completions, after dataset.system_prompt
    # What leaves where the model itself states DENY: its answer, or `deny_text`. A model's word is no gate.
    on_deny: Literal["answer", "refuse", "escalate"] = "answer"
    deny_text: Annotated[str, Field(min_length=1)] = "この質問にはお答えできません。担当者にご確認ください。"
