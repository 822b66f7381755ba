"""Text from language models: slots, the engine that fills them, tokenizers."""

from tmdjax.generation.byte_pairs import gguf_tokenizer as gguf_tokenizer
from tmdjax.generation.byte_pairs import load_tokenizer as load_tokenizer
from tmdjax.generation.chat import CHAT_TEMPLATES as CHAT_TEMPLATES
from tmdjax.generation.chat import render_chat as render_chat
from tmdjax.generation.chat_templates import ChatTemplate as ChatTemplate
from tmdjax.generation.chat_templates import load_chat_template as load_chat_template
from tmdjax.generation.engine import Engine as Engine
from tmdjax.generation.engine import EngineConfig as EngineConfig
from tmdjax.generation.engine import describe as describe
from tmdjax.generation.sampling import Sampling as Sampling
from tmdjax.generation.sampling import sample as sample
from tmdjax.generation.sampling import sampling_log_probs as sampling_log_probs
from tmdjax.generation.slots import CachedModel as CachedModel
from tmdjax.generation.slots import cached_decoder as cached_decoder
from tmdjax.generation.tokenizers import CharTokenizer as CharTokenizer
from tmdjax.generation.tokenizers import Tokenizer as Tokenizer
