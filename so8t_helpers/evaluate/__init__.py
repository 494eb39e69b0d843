"""05_ollama_eval: the base, the baked model and each GGUF answer the same held-out prompts and are judged."""
