"""04_gguf: a Phi3 folder becomes GGUF files in one pass, with their quality measured."""

from so8t_helpers.gguf_export.result import GgufResult
from so8t_helpers.gguf_export.stage import export

__all__ = ["GgufResult", "export"]
