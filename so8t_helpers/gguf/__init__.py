"""04_gguf: a Phi3 folder becomes GGUF files in one pass, with their quality measured."""
