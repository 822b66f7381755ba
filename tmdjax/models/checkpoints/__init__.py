"""Checkpoints of other codebases: Hugging Face folders, safetensors, GGUF, Wan."""
