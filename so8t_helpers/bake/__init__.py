"""03_bake: streamed baking onto the 16-bit base, with its proof."""
