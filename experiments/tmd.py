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
from tmdjax import models
from tmdjax.core import trees
from tmdjax.core.checks import check_choice, check_count
from tmdjax.domains.sprites.prompts import prompt_words
from tmdjax.harness import Report, Stage, StageResult, Update
from tmdjax.harness.claims import metric_name
from tmdjax.harness.config import to_plain
from tmdjax.harness.pictures import animation, video_strips

Config = Any
REPORT_ARMS = True
RULES = students.RULES


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
    draw = functools.partial(samples.sample, arm=arm)
    settings = {"sample": plain["sample"], "student": student, **judge}
    add("sample", draw, "teacher", last, version=2, **settings)
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


def summary_rows(config: Config, found: Mapping[str, float]) -> list[dict[str, Any]]:
    """The table of students, from the metrics of a record."""
    measures = ("nfe", *measuring.MEASURES, "seconds")

    def row(title: str, arm: str, name: str) -> dict[str, Any]:
        values = {m: found.get(metric_name(arm, f"{name}{m}")) for m in measures}
        return {"student": title} | {k.replace("_", " "): values[k] for k in values}

    rows = [row("real videos", "teacher", samples.REAL)]
    for arm in arms(config):
        for name, title in samples.ways(of_arm(config, arm)).items():
            rows.append(row(f"{arm}, {title}", arm, name))
    return rows


def report(
    config: Config, results: dict[str, StageResult], folder: pathlib.Path
) -> Report:
    """Of one arm: its measures, a contact sheet and an animation of its videos."""
    shown = Report([], [])
    if "sample" not in results:
        return shown
    found = results["sample"].metrics
    table = [{"measure": name, "value": value} for name, value in found.items()]
    shown.tables.append((f"{results['sample'].meta['arm']}: samples", table))
    outputs, arm = results["sample"].outputs, results["sample"].meta["arm"]
    config = of_arm(config, arm)
    scale = tasks.scale_of(config)
    labels = [" ".join(prompt_words(int(p), scale)) for p in outputs["asked"]]
    blocks = samples.pictures(config, outputs["shown"])
    path = video_strips(blocks, folder / f"{arm}-frames.png", row_labels=labels)
    title = f"{arm}: frames from left to right; one prompt a row"
    shown.figures.append((title, path))
    path = animation(blocks, folder / f"{arm}-videos.gif", row_labels=labels)
    shown.figures.append((f"{arm}, moving", path))
    return shown


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds every arm, so that what cannot work is refused."""
    rows: dict[str, Any] = {}
    for group, name in (
        ("sample", "count"),
        ("sample", "per_prompt"),
        ("distill", "cycles"),
    ):
        check_count(f"{group}.{name}", config[group][name])
    # beside the exact teacher its network is only where students start
    check_count("teacher.steps", config.teacher.steps, int(not config.teacher.exact))
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
