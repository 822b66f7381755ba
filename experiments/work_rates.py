"""What work takes on a device: generating, training and new weights, of a decoder.

Measured ('calibrate') in a short run in which nothing overlaps, so that each step has
the machine for itself.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments import language_tasks as tasks
from tmdjax import generation, models, quant, runtime, train
from tmdjax.core import trees
from tmdjax.core.checks import check_range
from tmdjax.harness import StageContext, StageResult
from tmdjax.harness.environment import device_name
from tmdjax.runtime.events import Event
from tmdjax.runtime.executors import Costs
from tmdjax.runtime.executors import calibrate as calibrated
from tmdjax.systems import grpo

MEANINGS = {
    "step": "measured seconds of a step of decoding, a text in every slot",
    "occupancy": "measured share of a step that goes with texts in slots, in [0, 1]",
    "prefill": "measured seconds of reading a token",
    "learn": "measured seconds of training on a token",
    "swap": "measured seconds of taking new weights",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What work takes on one device; all but ``occupancy`` in seconds.

    Attributes:
        step: a step of decoding in which every slot has a text, > 0.
        occupancy: the share of that which goes with texts in slots, in [0, 1]; the rest
            is there however few of the slots have one.
        prefill: reading a token, >= 0.
        learn: training on a token, >= 0.
        swap: taking new weights, >= 0.

    Raises:
        ValueError: a number out of range.
    """

    step: float
    occupancy: float
    prefill: float
    learn: float
    swap: float

    def __post_init__(self) -> None:
        check_range("occupancy", self.occupancy, 0, 1)
        check_range("step", self.step, 0, math.inf, open_low=True, open_high=True)
        for name in ("prefill", "learn", "swap"):
            check_range(name, getattr(self, name), 0, math.inf, open_high=True)

    def with_rollout_share(
        self, share: float, *, slots: int, prompt: int, response: int
    ) -> "Rates":
        """The same, but for training, which takes what a synchronous update leaves.

        Args:
            share: of the seconds of an update in which the roles take turns and all
                responses are equally long, those of generation; in (0, 1).
            slots: of a generator's engine, all of them with texts.
            prompt: tokens of a prompt.
            response: tokens of a response.

        Raises:
            ValueError: a share out of range.
        """
        check_range("rollout_share", share, 0, 1, open_low=True, open_high=True)
        generate = response * self.step / slots + prompt * self.prefill
        learn = generate * (1 / share - 1) / (prompt + response)
        return dataclasses.replace(self, learn=learn)

    def costs(self, slots: int, trainers: int) -> Costs:
        """Costs of the workers of a run; scoring is free.

        Args:
            slots: of a generator's engine, >= 1.
            trainers: devices that share the work of an update evenly, >= 1.
        """
        a_slot = self.step / slots
        return Costs(
            {
                "decode": {
                    "slot_steps": (1 - self.occupancy) * a_slot,
                    "drawn": self.occupancy * a_slot,
                    "prefilled": self.prefill,
                },
                "weights": {"swaps": self.swap, "prefilled": self.prefill},
                "learn": {"tokens": self.learn / trainers},
                "judge": {},
            }
        )


def measured_rates(
    events: Iterable[Event], slots: int, source: str
) -> tuple[Rates, Costs]:
    """Rates that explain the steps of a run on the clock of a machine.

    Args:
        events: of a run of one generator and one trainer, without steps that compiled.
        slots: of its engine, >= 1.
        source: of the rates, such as the name of the device.

    Returns:
        The rates, and the costs that they were read from.

    Raises:
        ValueError: no step of decoding, of training or of new weights, or decoding
            that took no time.
    """
    explain = {
        "decode": ("slot_steps", "drawn", "prefilled"),
        "weights": ("swaps",),
        "learn": ("tokens",),  # what an update takes grows with its tokens
    }
    kept = [
        dataclasses.replace(
            event, amounts={name: event.amounts[name] for name in explain[event.what]}
        )
        for event in events
        if event.what in explain and event.amounts
    ]
    if missing := explain.keys() - {event.what for event in kept}:
        raise ValueError(
            f"no step of {', '.join(sorted(missing))} is left to measure; let the run "
            f"have more updates after those in which programs compile."
        )
    costs = calibrated(kept, source)
    decode = {name: costs.rates["decode"].get(name, 0.0) for name in explain["decode"]}
    a_slot = decode["slot_steps"] + decode["drawn"]
    if not a_slot:
        raise ValueError(
            "decoding took no time that goes with slots or tokens; let the run write "
            "more responses."
        )
    rates = Rates(
        step=slots * a_slot,
        occupancy=decode["drawn"] / a_slot,
        prefill=decode["prefilled"],
        learn=costs.rates["learn"].get("tokens", 0.0),
        swap=costs.rates["weights"].get("swaps", 0.0),
    )
    return rates, costs


def calibrate(given: dict[str, Any], context: StageContext) -> StageResult:
    """Measures work in a short run in which nothing overlaps.

    A decoder writes, and is trained, in threads whose steps take turns (eta = 0), on
    prompts of one length, so that programs compile in the first updates alone; these
    are left out. The costs are saved in the stage's folder, too.
    """
    sizes, engine = given["calibrate"], given["engine"]
    language, acting = tasks.language(given), tasks.language(given, "rollout").config
    schedule, learner = learner_of(given, language)
    model, events = generation.cached_decoder(acting), []
    params = language.parameters(context.key)
    count, prepared = trees.count(params), models.prepare_weights(params, acting)

    def make_engine(number: int) -> generation.Engine:
        rules = language.engine(engine)
        return generation.Engine(model, prepared, rules, context.key)

    def draw(number: int, attempt: int) -> list[runtime.Prompt]:
        digits = np.random.default_rng([number, attempt]).integers(
            0, 10, (sizes["prompts"], sizes["prompt"])
        )
        texts = ("".join(map(str, row)) for row in digits)
        return [runtime.Prompt(language.encode(text), None) for text in texts]

    def loop(*, checkpoints: Any, **hooks: Any) -> train.FitResult:
        del checkpoints  # what takes seconds begins anew
        events.clear()
        return runtime.fit_asynchronously(
            learner.init(params),
            learner,
            make_engine,
            draw,
            lambda problem, tokens: float(len(tokens) % 2),
            schedule,
            logs=[events.append],
            **hooks,
        )

    state = context.run_loop(loop, num_steps=sizes["updates"])
    warm = [e for e in events if e.version is not None and e.version >= sizes["warm"]]
    rates, costs = measured_rates(warm, engine["slots"], device_name())
    costs.save(context.directory / "costs.json")
    return StageResult(
        {"rates": {name: np.float64(rate) for name, rate in vars(rates).items()}},
        {"parameters": count, "skipped_updates": state.skipped},
        timings=vars(rates),
    )


def learner_of(
    given: Mapping[str, Any], language: tasks.Language
) -> tuple[runtime.Schedule, runtime.Learner]:
    """What the run that is measured does, and what it learns by.

    Raises:
        ValueError: sizes that do not go together.
    """
    sizes, engine = given["calibrate"], given["engine"]
    acting = tasks.language(given, "rollout").config
    if sizes["warm"] >= sizes["updates"]:
        raise ValueError(
            f"calibrate.warm={sizes['warm']} leaves nothing to measure of "
            f"calibrate.updates={sizes['updates']}; raise updates."
        )
    longest = sizes["prompt"] + sizes["max_new_tokens"]
    if longest > engine["length"]:
        raise ValueError(
            f"calibrate.prompt={sizes['prompt']} and calibrate.max_new_tokens="
            f"{sizes['max_new_tokens']} need engine.length of at least {longest}, not "
            f"{engine['length']}."
        )
    names = ("samples", "updates", "max_new_tokens")
    schedule = runtime.Schedule(
        **{name: sizes[name] for name in names},
        batch=sizes["prompts"],
        slots=engine["slots"],
    )
    learner = runtime.make_learner(
        tasks.log_probs_of(language.config, temperature=engine["temperature"]),
        grpo.preset("grpo"),
        train.make_optimizer(
            train.OptimizerConfig(learning_rate=sizes["learning_rate"])
        ),
        schedule.settings(microbatch=sizes["microbatch"]),
        length=engine["length"],
        pad=language.pad,
        generation_params=functools.partial(models.prepare_weights, config=acting),
        precision=quant.Precision(**given["precision"]),
    )
    return schedule, learner
