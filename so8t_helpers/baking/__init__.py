"""03_bake: streamed baking onto the 16-bit base, with its proof."""

from so8t_helpers.baking.stage import BakeResult, bake

__all__ = ["BakeResult", "bake"]
