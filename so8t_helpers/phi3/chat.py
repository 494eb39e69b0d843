"""The chat dialect of Phi-3.5: roles, turns, and the tokens at which writing stops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

ROLES = ("system", "user", "assistant")
END_OF_TEXT = "<|endoftext|>"


def render(messages: Iterable[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
    """Return the text that Phi-3.5's own chat template makes of the messages, `<|endoftext|>` at its end
    unless a generation prompt is asked for.

    Raises:
        ValueError: a role other than system, user, assistant (the template would drop it in silence).
    """
    parts = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"message role {role!r}: expected one of {', '.join(ROLES)}")
        if role != "system" or content:
            parts.append(f"<|{role}|>\n{content}<|end|>\n")
    parts.append("<|assistant|>\n" if add_generation_prompt else END_OF_TEXT)
    return "".join(parts)


def user_turn(question: str, think_command: str) -> str:
    """Return the user's turn: the think command before the question, or the question alone."""
    return f"{think_command} {question}" if think_command else question


# The ends of a turn in the Phi-3.5 template; a model that writes one of them has finished.
STOPS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")
