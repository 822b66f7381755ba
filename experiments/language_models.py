"""Models of experiments with language models, and how text becomes ids for them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import generation, models, quant
from tmdjax.core.checks import check_choice
from tmdjax.data.text_tasks import vocabulary
from tmdjax.data.weights import find_weights
from tmdjax.rl import TokenRecord
from tmdjax.runtime import Prompt


@dataclasses.dataclass(frozen=True)
class Language:
    """A decoder and how text becomes ids for it.

    Attributes:
        config: of the decoder.
        encode: prompt -> ids; a chat model takes messages too.
        decode: ids of a response -> text, without special tokens.
        stop: ids that end a response.
        pad: id of padding.
        weights: parameters on the host, or None for random ones.
        stop_strings: texts that end a response.
    """

    config: models.DecoderConfig
    encode: Callable[[Any], list[int]]
    decode: Callable[[Sequence[int]], str]
    stop: tuple[int, ...]
    pad: int
    weights: Any = None
    stop_strings: tuple[str, ...] = ()

    def parameters(self, key: Any) -> Any:
        """Those of the weights, or initial ones."""
        if self.weights is not None:
            return jax.tree.map(jnp.asarray, self.weights)
        return models.init_params(
            models.Decoder(self.config), key, jax.ShapeDtypeStruct((1, 8), np.int32)
        )

    def engine(self, sizes: Mapping[str, Any]) -> generation.EngineConfig:
        """Sizes of an engine: 'slots', 'length', 'chunk'; and the 'temperature'."""
        return generation.EngineConfig(
            slots=sizes["slots"],
            length=sizes["length"],
            steps=sizes["chunk"],
            stop=self.stop,
            stop_strings=self.stop_strings,
            sampling=generation.Sampling(temperature=sizes["temperature"]),
        )


def language(given: Mapping[str, Any], when: str = "train") -> Language:
    """The model of a config, computed as its 'precision' says.

    Args:
        given: 'precision' {'rollout', 'train'}; and 'model', by its 'name': a 'decoder'
            of sizes of :class:`tmdjax.models.DecoderConfig`, over the characters of the
            tasks; 'packaged' and 'weights'; or 'folder', with the 'folder' of a
            checkpoint and the 'template' of its chats (None: the checkpoint's own). The
            latter two take a 'system' message, or None.
        when: 'rollout' or 'train'.
    """
    precision = quant.Precision(**given["precision"])
    return models.with_recipe(_language(**given["model"]), getattr(precision, when))


def _language(name: str, **sizes: Any) -> Language:
    check_choice("model.name", name, ("decoder", "packaged", "folder"))
    if name == "packaged":
        return _packaged(**sizes)
    if name == "folder":
        return _from_folder(**sizes)
    tokenizer = generation.CharTokenizer(
        vocabulary.CHARACTERS, eos=vocabulary.END, pad=vocabulary.PAD
    )
    return Language(
        models.DecoderConfig(vocab_size=tokenizer.vocab_size, **sizes),
        tokenizer.encode,
        lambda ids: tokenizer.decode(ids).replace(vocabulary.PAD, ""),
        (tokenizer.eos_id,),
        tokenizer.pad_id,
    )


@functools.lru_cache(maxsize=1)
def _packaged(weights: str, system: str | None = None) -> Language:
    """A chat model; a prompt is a message of the user."""
    path = find_weights(weights)
    render = functools.partial(generation.render_chat, template=weights)
    tokenizer = generation.gguf_tokenizer(path)
    return _chat(*models.load_gguf(path), tokenizer, render, system)


@functools.lru_cache(maxsize=1)
def _from_folder(
    folder: str, template: str | None = None, system: str | None = None
) -> Language:
    """The same from a checkpoint in the layout of Hugging Face."""
    tokenizer = generation.load_tokenizer(folder)
    if template is None:
        render: Callable[..., str] = generation.load_chat_template(folder)
    else:
        render = functools.partial(generation.render_chat, template=template)
    return _chat(*models.load_decoder(folder), tokenizer, render, system)


def _chat(
    config: models.DecoderConfig,
    weights: Any,
    tokenizer: generation.Tokenizer,
    render: Callable[..., str],
    system: str | None,
) -> Language:
    # an embedding is padded to a round number of rows, which are no tokens
    named = min(config.vocab_size, tokenizer.vocab_size)

    def encode(prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str):
            messages = [
                {"role": message["role"], "content": message["content"]}
                for message in prompt
            ]
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return tokenizer.encode(render(messages))

    return Language(
        dataclasses.replace(config, num_tokens=named),
        encode,
        functools.partial(tokenizer.decode, skip_special=True),
        tuple(i for i in tokenizer.stop_ids if i < named),
        tokenizer.pad_id,
        weights,
        tokenizer.stop_strings,
    )


def write(
    engine: generation.Engine,
    prompts: Sequence[Prompt],
    samples: int,
    max_new_tokens: int,
) -> list[TokenRecord]:
    """So many responses to each prompt, prompt after prompt."""
    for i, prompt in enumerate(prompts):
        engine.submit(
            range(i * samples, (i + 1) * samples),
            prompt.tokens,
            group=i,
            max_new_tokens=max_new_tokens,
        )
    return engine.run()


def log_probs_of(
    config: models.DecoderConfig, chunk: int = 256, temperature: float = 1.0
) -> Any:
    """A :data:`tmdjax.runtime.LogProbs` of a decoder; logits a chunk at a time."""
    apply_fn = models.functional(models.Decoder(config))

    def log_probs(params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
        h = apply_fn(params, tokens, positions, segments, method="hidden")
        output = functools.partial(apply_fn, params, method="output")
        return models.token_log_probs_from_hidden(
            output, h, tokens, chunk=chunk, temperature=temperature, entropy=True
        )

    return log_probs
