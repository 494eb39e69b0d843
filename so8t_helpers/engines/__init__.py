"""Engines that write and score text behind one interface: transformers, embedded llama.cpp, Ollama."""

from so8t_helpers.engines.base import (
    STOPS,
    Completion,
    Engine,
    EngineError,
    EngineTimeoutError,
    Piece,
    collect,
)

__all__ = ["STOPS", "Completion", "Engine", "EngineError", "EngineTimeoutError", "Piece", "collect"]
