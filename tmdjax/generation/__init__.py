"""Text from language models: slots, the engine that fills them, tokenizers."""

from tmdjax.generation.byte_pairs import gguf_tokenizer, load_tokenizer
from tmdjax.generation.chat import CHAT_TEMPLATES, render_chat
from tmdjax.generation.engine import Engine, EngineConfig, describe
from tmdjax.generation.sampling import Sampling, sample, sampling_log_probs
from tmdjax.generation.slots import CachedModel, cached_decoder
from tmdjax.generation.tokenizers import CharTokenizer, Tokenizer

__all__ = [
    "CHAT_TEMPLATES",
    "CachedModel",
    "CharTokenizer",
    "Engine",
    "EngineConfig",
    "Sampling",
    "Tokenizer",
    "cached_decoder",
    "describe",
    "gguf_tokenizer",
    "load_tokenizer",
    "render_chat",
    "sample",
    "sampling_log_probs",
]
