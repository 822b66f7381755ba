"""Stages of the BOSS experiment: search, fine-tuning, and samples of every model.

A config is that of one arm here, see :func:`experiments.arms.of_arm`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import few_step, flow_matching
from tmdjax import flows
from tmdjax.core import prng, trees
from tmdjax.flows.chords import landing_errors
from tmdjax.harness import StageContext, StageResult
from tmdjax.systems import boss, reflow

Config = Any
SHOWN_SAMPLES = 16
"""Samples of each model that a report shows."""


def search(config: Config, context: StageContext) -> StageResult:
    """One cost matrix, all budgets; polish; a second search tells the spread."""
    settings, shape = config.search, tuple(config.data.shape)
    velocity = few_step.velocity_of(
        config, context.inputs["train"].outputs["params"], True
    )
    keys, labels = few_step.draw(config, context.key, 2 * settings.samples)
    first, second = slice(settings.samples), slice(settings.samples, None)
    most = max(settings.budgets)
    options = {
        "knots": settings.knots,
        "future_weight": settings.future_weight,
        "memory_limit": settings.memory_limit_gb * 1e9,
    }
    found = boss.search(velocity, keys[first], shape, most, labels[first], **options)
    again = boss.search(velocity, keys[second], shape, most, labels[second], **options)
    spectrum = few_step.data_spectrum(config)
    gaussian = boss.search(
        flows.gaussian_mixture([1.0], [np.zeros_like(spectrum)], [spectrum]).velocity,
        keys[first],
        spectrum.shape,
        most,
        **options,
    )
    noise = prng.normal(keys[first], shape)
    index: dict[str, Any] = {"bellman": {}, "polished": {}, "gaussian": {}}
    uniform, found_metrics = {}, {}
    for k, schedule in found.schedules.items():
        index["bellman"][str(k)] = schedule.index
        index["gaussian"][str(k)] = gaussian.schedules[k].index
        knots = flows.uniform_index(settings.knots, k)
        uniform[k] = flows.path_cost(found.costs, knots)
        if k in settings.budgets:
            polished = boss.polish_schedule(
                velocity, noise, schedule, found.costs, labels[first]
            )
            index["polished"][str(k)] = polished.index
            moved = np.abs(schedule.index - again.schedules[k].index)
            other = flows.path_cost(found.costs, again.schedules[k].index)
            found_metrics |= {
                f"bellman{k}.objective_search": schedule.cost,
                f"uniform{k}.objective_search": uniform[k],
                f"bellman{k}.spread_knots": moved.max(),
                f"bellman{k}.spread_objective": other / max(schedule.cost, 1e-30),
            }
    # equal grids have equal sums; with a future_weight the objective is another
    worse = sum(found.schedules[k].cost > uniform[k] * (1 + 1e-9) for k in uniform)
    return StageResult(
        {"costs": found.costs, "index": index},
        found_metrics | {"search.uniform_cheaper": worse},
    )


def schedule_of(config: Config, context: StageContext, name: str, k: int) -> Any:
    """A schedule that the search found."""
    outputs = context.inputs["search"].outputs
    index = np.asarray(outputs["index"][name][str(k)])
    knots = flows.fine_knots(config.search.knots)
    cost = flows.path_cost(outputs["costs"], index)
    return boss.Schedule(index, knots, cost, config.sample.guidance)


def trajectories(config: Config, context: StageContext) -> StageResult:
    """The teacher's fine trajectories, at the knots that some budget needs."""
    velocity = few_step.velocity_of(
        config, context.inputs["train"].outputs["params"], True
    )
    keys, labels = few_step.draw(config, context.key, config.fine_tune.noises)
    schedules = [
        schedule_of(config, context, "bellman", k) for k in config.search.budgets
    ]
    fine = boss.fine_states(
        velocity, keys, tuple(config.data.shape), schedules, labels, micro_batch=250
    )
    return StageResult({"states": fine.states, "index": fine.index, "cond": labels})


def budget_of(context: StageContext) -> int:
    """The number in the name of a stage."""
    return int("".join(c for c in context.name if c.isdigit()))


def straighten(config: Config, context: StageContext) -> StageResult:
    """Straightens the teacher (or adapters of it) on one budget's grid."""
    k, settings = budget_of(context), config.fine_tune
    kept = context.inputs["trajectories"].outputs
    schedule = schedule_of(config, context, "bellman", k)
    fine = boss.FineStates(kept["states"], kept["index"], schedule.knots, kept["cond"])
    chords, held_out = boss.split(
        boss.chords(fine, schedule),
        jax.random.fold_in(context.key, 1),
        settings.eval_fraction,
    )
    params, apply_fn, whole = few_step.tuned_part(config, context)
    tuned = boss.straighten(
        params,
        apply_fn,
        chords,
        schedule,
        weight=settings.weight,
        **few_step.tuning(config, context),
    )

    @jax.jit
    def loss(params: Any, apply_fn: Any, batch: Any) -> Any:
        return boss.straightening_loss(params, apply_fn, batch)[0].mean()

    on_held_out = functools.partial(
        loss, apply_fn=flows.as_pytree(apply_fn), batch=held_out
    )
    found = {
        f"straightened{k}.loss_before": on_held_out(params),
        f"straightened{k}.loss": on_held_out(tuned.params),
        f"straightened{k}.loss_raw": on_held_out(tuned.raw_params),
        f"straightened{k}.trained_parameters": trees.count(params),
    }
    spec = flow_matching.model_spec(config) if few_step.has_images(config) else None
    meta = {
        "grid": tuned.times.tolist(),
        "guidance_absorbed": float(config.sample.guidance),
    }
    return StageResult({"params": whole(tuned.params)}, found, model=spec, meta=meta)


def rectify(config: Config, context: StageContext) -> StageResult:
    """Distill-k-Reflow ('distill6') and Uniform-Reflow ('reflow'), trained alike."""
    kept = context.inputs["trajectories"].outputs
    params, apply_fn, whole = few_step.tuned_part(config, context)
    tuned = reflow.rectify(
        params,
        apply_fn,
        {
            "x_noise": kept["states"][0],
            "x_data": kept["states"][-1],
            "cond": kept["cond"],
        },
        steps_distilled=None if context.name == "reflow" else budget_of(context),
        **few_step.tuning(config, context),
    )
    return StageResult({"params": whole(tuned.params)})


def walks(config: Config, context: StageContext) -> list[tuple[str, str, Any, str]]:
    """(name, stage that trained the model, grid, solver) of every sampled set."""
    found: list[tuple[str, str, Any, str]] = []
    for k in config.search.budgets:
        grids = {"uniform": flows.uniform_grid(k), "edm": flows.edm_grid(k)} | {
            name: schedule_of(config, context, name, k).times
            for name in ("bellman", "polished", "gaussian")
        }
        found += [(f"{name}{k}", "train", g, "euler") for name, g in grids.items()]
        if k % 2 == 0:
            half = schedule_of(config, context, "bellman", k // 2).times
            found += [(f"{m}{k}", "train", half, m) for m in ("heun", "midpoint")]
        uniform, own = grids["uniform"], grids["bellman"]
        found.append((f"straightened{k}", f"straighten{k}", own, "euler"))
        found.append((f"distilled{k}", f"distill{k}", uniform, "euler"))
        found.append((f"reflow{k}", "reflow", uniform, "euler"))
    return found


def sample(config: Config, context: StageContext) -> StageResult:
    """Samples every set from the same noise, and measures each as it is made.

    'terminal_error' is the mean squared distance, per coordinate, to the teacher's
    fine samples ('error_to_rk45': to its accurate ones).
    """
    settings, shape = config.search, tuple(config.data.shape)
    labels = jnp.asarray(few_step.load(config).test["label"][: config.sample.count])
    keys = prng.sample_keys(context.key, len(labels))
    noise = prng.normal(keys, shape)
    params = {name: s.outputs.get("params") for name, s in context.inputs.items()}
    knots = flows.fine_knots(settings.knots)
    expert = few_step.velocity_of(config, params["train"], True)
    walk = functools.partial(flows.endpoints, micro_batch=few_step.MICRO_BATCH)
    fine = walk(expert, noise, knots, labels)
    solution = flows.rk45(expert, noise, labels)
    calls = few_step.teacher_evaluations(config)
    found: dict[str, Any] = {"rk45.nfe": solution.nfe * calls}
    shown: dict[str, Any] = {}

    def measured(name: str, x: Any) -> tuple[str, Any]:
        errors = flows.squared_l2(x, fine) / np.prod(shape)
        found[f"{name}.terminal_error"] = jnp.mean(errors)
        found[f"{name}.terminal_error_se"] = jnp.std(errors) / np.sqrt(len(errors))
        exact = flows.squared_l2(x, solution.x) / np.prod(shape)
        found[f"{name}.error_to_rk45"] = jnp.mean(exact)
        shown[name] = np.asarray(x[:SHOWN_SAMPLES])
        return name, x

    def sets() -> Any:
        yield measured("fine", fine)
        yield measured("rk45", solution.x)
        for name, stage, grid, method in walks(config, context):
            velocity = few_step.velocity_of(config, params[stage], stage == "train")
            yield measured(name, walk(velocity, noise, grid, labels, method=method))

    quality = few_step.compare(config, context, sets(), labels)
    for k in settings.budgets:
        own, uniform, carried = (
            found[f"{name}{k}.terminal_error"]
            for name in ("bellman", "uniform", "gaussian")
        )
        found[f"gaussian{k}.position"] = (carried - own) / (uniform - own)
    found |= straightness(config, context, keys[: settings.samples], labels)
    return StageResult({"shown": shown}, {**quality, **found})


def straightness_budget(config: Config) -> int:
    """The budget at which straightness is measured."""
    return config.search.budgets[len(config.search.budgets) // 2]


def straightness(
    config: Config, context: StageContext, keys: Any, labels: Any
) -> dict[str, Any]:
    """Local errors along one grid before and after straightening, from new noise.

    'objective' sums them along a model's own fine trajectories, as a search would;
    'chord_error' along the teacher's, which is what straightening lowers. Both are
    sums over coordinates.
    """
    settings, shape, labels = (
        config.search,
        tuple(config.data.shape),
        labels[: len(keys)],
    )
    k = straightness_budget(config)
    schedule = schedule_of(config, context, "bellman", k)
    params = {
        n: context.inputs[n].outputs["params"] for n in ("train", f"straighten{k}")
    }
    expert = few_step.velocity_of(config, params["train"], True)
    fine = boss.fine_states(expert, keys, shape, [schedule], labels)
    chords = boss.chords(fine, schedule)
    found = {}
    for name, stage in (("bellman", "train"), ("straightened", f"straighten{k}")):
        velocity = few_step.velocity_of(config, params[stage], stage == "train")
        costs = flows.local_error_costs(
            velocity,
            keys,
            shape,
            labels,
            knots=schedule.knots,
            memory_limit=settings.memory_limit_gb * 1e9,
        )
        found[f"{name}{k}.objective"] = flows.path_cost(costs, schedule.index)
        errors = landing_errors(velocity, chords)
        found[f"{name}{k}.chord_error"] = k * jnp.mean(errors)  # K chords a sample
    found[f"straightened{k}.chord_error_ratio"] = (
        found[f"straightened{k}.chord_error"] / found[f"bellman{k}.chord_error"]
    )
    return found
