"""Engines that write and score text behind one interface: transformers, embedded llama.cpp, Ollama."""
