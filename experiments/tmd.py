"""TMD beside DMD2-v, MeanFlow and k-step distillation, on videos of moving sprites.

An arm is a student (or the teacher itself). Stages: a teacher learns the videos, once
for all seeds; where the method asks for it, its head is pretrained (TM-MF) or pairs of
noise and its samples are made; the student is distilled; its samples are checked
against their prompts and compared with held-out videos.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from experiments import video_measures as measuring
from experiments import video_memory as memory
from experiments import video_samples as samples
from experiments import video_students as students
from experiments import video_tasks as tasks
from experiments.arms import arms, of_arm
from experiments.figures import side_by_side
from tmdjax import flows, models
from tmdjax.core import trees
from tmdjax.core.checks import check_choice, check_count
from tmdjax.domains.sprites.prompts import prompt_words
from tmdjax.harness import Report, Stage, StageResult, Update
from tmdjax.harness.claims import metric_name
from tmdjax.harness.config import to_plain
from tmdjax.harness.pictures import animation, video_strips

Config = Any
RULES = students.RULES
MEANINGS = measuring.MEASURES | {
    "nfe": "network evaluations a video, a whole network counted as one",
    "seconds": "seconds of a batch of 'sample.count' videos, compiled before",
    "cost": "operations of a video over those of one evaluation of the whole network",
    "cost_over_nfe": "those operations over what nfe counts; 1 has no overhead",
    "gate": "how far the student's head reads its own state, from 0",
}


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm.

    Raises:
        ValueError: an arm in which no student is trained.
    """
    config = of_arm(config, arm)
    plain, kind = to_plain(config), config.student.kind
    judge = {
        "exact": plain["teacher"]["exact"],
        "guidance": plain["distill"]["guidance"],
        "recipe": plain["precision"]["rollout"],
    }
    student = plain["student"]
    # what a rollout changes comes after pretraining
    network = {k: student[k] for k in student if k not in ("rollout", "warm_up")}
    teacher = {k: plain[k] for k in ("data", "model", "teacher")}
    teacher["teacher"] = {**teacher["teacher"], "exact": None}
    teacher["recipe"] = plain["precision"]["train"]
    found = [
        Stage(
            name="teacher",
            run=functools.partial(tasks.train_teacher, config),
            config=teacher,
            seeded=False,
        )
    ]

    def add(name: str, run: Any, *parents: str, version: int = 1, **of: Any) -> str:
        given = {"name": name, "run": functools.partial(run, config), "config": of}
        parents = tuple(dict.fromkeys(parents))
        found.append(Stage(**given, parents=parents, version=version))
        return name

    last, pairs = "teacher", {"pairs": plain["pairs"]}
    first = {"pretrain": plain["pretrain"], "student": network}
    if kind == "kstep" or (kind == "dmd2" and config.student.warm_up):
        add("pairs", students.make_pairs, last, **pairs, **judge)
        last = add("fit", students.fit_pairs, last, "pairs", **pairs, student=student)
    if kind == "meanflow":
        last = add("fit", students.fit_meanflow, last, **first)
    if kind == "tmd" and config.pretrain.steps:
        last = add("pretrain", students.pretrain, last, **first)
    if kind in ("tmd", "dmd2") and config.distill.cycles:
        settings = {"distill": plain["distill"], "student": student, **judge}
        last = add("distill", students.distill, "teacher", last, **settings)
    if last == "teacher" and kind != "teacher":
        raise ValueError(
            f"arm {arm!r} trains no student; give it pretrain.steps or distill.cycles."
        )
    settings = {"sample": plain["sample"], "student": student, **judge}
    add("sample", samples.sample, "teacher", last, version=2, **settings)
    return found


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    config, found = of_arm(config, arm), set()
    if config.student.kind == "teacher":
        found |= {f"{samples.REAL}{measure}" for measure in measuring.MEASURES}
    if config.student.kind == "tmd":
        found |= {"cost", "cost_over_nfe"}
    what = (*measuring.MEASURES, "seconds", "nfe")
    return found | {f"{n}{measure}" for n in samples.ways(config) for measure in what}


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of students, each way that they are sampled."""
    measures = ("nfe", *measuring.MEASURES, "seconds")

    def row(title: str, arm: str, name: str) -> dict[str, Any]:
        values = {m: found.get(metric_name(arm, f"{name}{m}")) for m in measures}
        names = {k: k.replace("_", " ") for k in measures} | {"nfe": "NFE"}
        return {"student": title} | {names[k]: values[k] for k in values}

    rows = [row("real videos", "teacher", samples.REAL)]
    for arm in arms(config):
        for name, title in samples.ways(of_arm(config, arm)).items():
            rows.append(row(f"{arm}, {title}", arm, name))
    return rows


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """Adherence and distance of every arm, each way that it is sampled."""
    labels = {
        "adherence": "share that shows all the prompt asked for",
        "frechet": "Frechet distance to real videos",
    }
    ways = {
        f"{arm}, {title}": metric_name(arm, name)
        for arm in arms(config)
        for name, title in samples.ways(of_arm(config, arm)).items()
    }
    ways = {"real videos": metric_name("teacher", samples.REAL), **ways}
    figures = []
    for what, label in labels.items():
        rows = {title: {what: f"{name}{what}"} for title, name in ways.items()}
        figures += side_by_side(found, rows, folder / f"{what}.png", "Videos", label)
    return figures


def report(
    config: Config,
    arm: str,
    results: Mapping[str, StageResult],
    folder: pathlib.Path,
) -> Report:
    """A contact sheet and an animation of an arm's videos."""
    if "sample" not in results:
        return Report()
    outputs, config = results["sample"].outputs, of_arm(config, arm)
    scale = tasks.scale_of(config)
    labels = [" ".join(prompt_words(int(p), scale)) for p in outputs["asked"]]
    blocks = samples.pictures(config, outputs["shown"])
    sheet = video_strips(blocks, folder / "frames.png", row_labels=labels)
    title = "Frames from left to right; one prompt a row"
    film = animation(blocks, folder / "videos.gif", row_labels=labels)
    return Report([], [(title, sheet), ("The same videos, moving", film)])


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds every arm, so that what cannot work is refused."""
    rows: dict[str, Any] = {}
    # beside the exact teacher its network is only where students start
    check_count("teacher.steps", config.teacher.steps, int(not config.teacher.exact))
    check_choice("sample.teacher_solver", config.sample.teacher_solver, flows.SOLVERS)
    key = jax.eval_shape(lambda: jax.random.key(0))
    counted: dict[str, int] = {}  # many arms share a network
    for arm in arms(config):
        settings = of_arm(config, arm)
        spec = students.student_spec(settings)
        network = json.dumps(spec, sort_keys=True)
        if network not in counted:
            times = 2 if settings.student.kind == "meanflow" else 1
            initial = functools.partial(
                tasks.initial_params, settings, models.build(spec), times=times
            )
            counted[network] = trees.count(jax.eval_shape(initial, key))
        rows[f"{arm}: parameters"] = counted[network]
        students.check_settings(settings)
        if settings.student.kind == "tmd":
            rows[f"{arm}: effective NFE"] = round(students.plan_of(settings).nfe, 3)
        if settings.student.kind == "dmd2":
            rows[f"{arm}: NFE"] = settings.student.outer
    if config.mesh:
        rows |= memory.check_memory(config, updates(config))
    return rows


def updates(config: Config) -> dict[str, Update]:
    """The updates of the arms that the config has planned.

    Raises:
        ValueError: an arm without a critic.
    """
    found = {}
    for arm in config.planned:
        settings = of_arm(config, arm)
        kind = settings.student.kind
        check_choice(f"arms.{arm}.student.kind", kind, ("tmd", "dmd2"))
        for name, step in memory.updates(settings).items():
            found[f"{arm}, {name}"] = step
    return found
