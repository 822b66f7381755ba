"""The TMD experiment: every kind of student, resuming, the model it hands out."""

import functools

import jax
import numpy as np
import pytest
from checks import lowered
from PIL import Image

import tmdjax
from experiments import (
    tmd,
    video_measures,
    video_memory,
    video_samples,
    video_students,
)
from experiments import video_tasks as tasks
from results.tmd.draw_again import cut
from tmdjax import models
from tmdjax.data.videos.files import to_uint8
from tmdjax.domains.sprites.prompts import prompt_words
from tmdjax.harness import StageResult, check_experiment, load_config
from tmdjax.harness.experiment import measured
from tmdjax.harness.pictures import animation, video_strips
from tmdjax.harness.stages import stage_hashes
from tmdjax.systems import tmd as system

CONFIG = "configs/tmd.py"
TINY = (
    "model.depth=3 model.heads=2 data.train_count=128 "
    "teacher.steps=4 teacher.log_every=2 pretrain.steps=4 pretrain.log_every=2 "
    "distill.cycles=2 distill.log_every=1 distill.adversarial_weight=0.03 "
    "pairs.count=32 pairs.steps=4 "
    "pairs.batch_size=16 pairs.log_every=2 pairs.teacher_steps=2"
).split()


def tiny(arms, *changes):
    """The smoke tier with these arms, {name: changes}."""
    config = load_config(f"{CONFIG}:smoke", [*TINY, *changes])
    with config.unlocked():
        config.arms = arms
    return config


ONE = {"tmd": {}}


@pytest.mark.slow
def test_operations_are_those_of_the_effective_evaluations():
    """C7: what NFE leaves out here is a fusion a head, and two embeddings."""
    config = tmd.of_arm(tiny(ONE, "model.depth=12", "student.head_blocks=2"), "tmd")
    module = models.build(video_students.student_spec(config))
    initial = functools.partial(tasks.initial_params, config, module)
    params = jax.eval_shape(initial, jax.eval_shape(lambda: jax.random.key(0)))
    assert 1 < video_samples.cost(config, params)["cost_over_nfe"] < 1.12


TRAINED = ("teacher.exact=False", "distill.features=teacher")


KINDS = {
    "dmd2": {"student": {"kind": "dmd2"}},
    "kstep": {"student": {"kind": "kstep"}},
    "meanflow": {"student": {"kind": "meanflow"}},
    "warm": {"student": {"kind": "dmd2", "outer": 1, "warm_up": True}},
    "concat": {"student": {"fusion": "concat", "average": "ys"}},
    "no_rollout": {"student": {"rollout": False}, "pretrain": {"steps": 0}},
    "stage_one": {"distill": {"cycles": 0}},
}


@pytest.mark.slow
def test_every_kind_of_student(tmp_path, ran):
    """With a trained teacher, whose features the adversary reads, and microbatches."""
    config = tiny(KINDS, *TRAINED, "distill.microbatches=2")
    found = ran(tmd, config)
    assert measured(check_experiment(tmd), config) <= found.keys()
    for arm in KINDS:
        assert np.isfinite(found[f"{arm}/sliced_wasserstein"])
    _, _, meta = tmdjax.load(tmp_path / "run", arm="stage_one")
    assert system.StudentPlan.from_dict(meta["plan"]).nfe > 2
    _, _, meta = tmdjax.load(tmp_path / "run", arm="kstep")
    assert meta["times"][0] == pytest.approx(0.999) and meta["times"][-1] == 0


def test_stages_depend_on_what_they_read():
    """Arms share what is the same, and nothing that is not."""

    def hashes(*changes, **student):
        config = tiny({"arm": {"student": student}}, *changes)
        return stage_hashes(tmd.stages(config, "arm"), 0)

    base = hashes()
    assert list(base) == ["teacher", "pretrain", "distill", "sample"]
    no_rollout = hashes(rollout=False)
    assert no_rollout["pretrain"] == base["pretrain"]
    assert no_rollout["distill"] != base["distill"]
    pairs = hashes(kind="kstep")
    for changed in ("distill.guidance=1.0", "teacher.exact=False"):
        assert hashes(changed, kind="kstep")["pairs"] != pairs["pairs"]
        teacher = hashes(changed, kind="teacher")
        assert teacher["sample"] != hashes(kind="teacher")["sample"]
        assert teacher["teacher"] == base["teacher"]
    assert hashes("model.depth=4")["teacher"] != base["teacher"]


def test_updates_lower_for_accelerators():
    config = tmd.of_arm(tiny(ONE, *TRAINED), "tmd")
    for step, shapes, _ in video_memory.updates(config).values():
        lowered(jax.jit(step), *shapes)


def test_evaluations_of_a_teacher_are_those_of_its_solver(refused):
    for solver, stages in (("euler", 1), ("heun", 2), ("unipc", 1)):
        change = f"sample.teacher_solver={solver}"
        config = tiny({"teacher": {"student": {"kind": "teacher"}}}, change)
        ways = video_samples.samplers(tmd.of_arm(config, "teacher"), None)
        # guidance of 2 costs two evaluations
        assert {name: nfe for name, (_, nfe) in ways.items()} == {
            "": 8 * stages * 2.0,
            "steps2.": 2 * stages * 2.0,
        }
    wrong = tiny(ONE, "sample.teacher_solver=unipcc")
    refused("sample.teacher_solver='unipcc'.*Did you mean 'unipc'", tmd.describe, wrong)


@pytest.mark.parametrize("steps", [(8, 2, 1), (8, 1, 3, 10)])
def test_a_picture_stands_under_the_name_of_what_it_shows(tmp_path, steps):
    """In whatever order metrics and stored videos come back: they come back sorted."""
    arms = {"teacher": {"student": {"kind": "teacher"}}}
    config = tiny(arms)
    with config.unlocked():
        config.sample.teacher_steps = steps
    shape = (2, *tasks.scale_of(config).event_shape)
    names = ["own", *(f"steps{k}" for k in steps[1:]), "real"]
    titles = [f"{k} step{'s' * (k > 1)}" for k in steps] + ["real videos"]
    levels = np.linspace(-1, 1, len(names))
    videos = [np.full(shape, level, np.float32) for level in levels]
    stored = {"shown": dict(sorted(zip(names, videos))), "asked": np.arange(2)}
    found = dict.fromkeys(sorted(tmd.measures(config, "teacher")), 0.0)
    results = {"sample": StageResult(stored, found)}
    shown = tmd.report(config, "teacher", results, tmp_path)
    scale = tasks.scale_of(config)
    rows = [" ".join(prompt_words(p, scale)) for p in range(2)]
    for (_, path), draw in zip(shown.figures, (video_strips, animation)):
        right = draw(dict(zip(titles, videos)), tmp_path / "right", row_labels=rows)
        assert path.read_bytes() == right.read_bytes()


def test_the_recorded_picture_shows_real_videos_as_such():
    """Of its four columns, the one that can be made again is compared."""
    config = load_config(f"{CONFIG}:cpu")
    shape = (8, *tasks.scale_of(config).event_shape)
    with Image.open("results/tmd/cpu-teacher-frames.png") as picture:
        columns = cut(np.asarray(picture), 4, shape)
    asked = tasks.prompts(config)[: shape[0]]  # a video depends on its own number alone
    real = video_measures.real_videos(config, asked, draw=1)
    same = [bool((to_uint8(real) == column).all()) for column in columns]
    titles = video_samples.ways(tmd.of_arm(config, "teacher"))
    assert len(titles) == 3 and same == [False] * 3 + [True]


EIGHT_DEVICES = """
import jax, numpy as np
from experiments import tmd, video_students as students, video_tasks as tasks
from tmdjax import models, train
from tmdjax.harness import load_config
from tmdjax.harness.stages import stage_hashes

config = load_config("configs/tmd.py:smoke", [
    "teacher.exact=False", "distill.features=teacher", "distill.batch_size=8",
    "model.heads=2", "model.depth=3", "distill.adversarial_weight=0.03"])
config = tmd.of_arm(config, "tmd")
method = students.distillation(config)
rules = tuple(
    train.make_optimizer(train.OptimizerConfig(name="sgd", learning_rate=0.05))
    for _ in range(2))
module = models.build(students.student_spec(config))
params = tasks.initial_params(config, module, jax.random.key(0))
teacher = jax.tree.map(np.asarray, params["shared"])

def run(mesh):
    critic = tasks.first_critic(config, teacher, jax.random.key(0))
    state = train.create_distillation_state(params, critic, rules, ema=True)
    cycle, state, cut = train.compile_cycle(
        method, rules, state, tasks.frozen_teacher(config, teacher), mesh=mesh,
        rules=students.RULES, ema_decay=0.9)
    losses = []
    for i in range(4):
        rng = np.random.default_rng(i)
        rows = {
            "x_data": rng.normal(size=(40, 4, 6, 6, 3)).astype(np.float32),
            "cond": rng.integers(0, 40, 40).astype(np.int32)}
        state, metrics = cycle(state, cut(rows), jax.random.key(1))
        losses.append([float(metrics["loss"]), float(metrics["critic/loss"])])
    return state, np.array(losses)

one, losses = run(train.make_mesh(devices=jax.devices()[:1]))
for data, fsdp, tensor in ((8, 1, 1), (2, 2, 2)):
    state, other = run(train.make_mesh(data, fsdp, tensor))
    np.testing.assert_allclose(other, losses, rtol=1e-5)
    for part in ("generator", "critic"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            getattr(state, part).params, getattr(one, part).params)
print("same")
"""


@pytest.mark.slow
def test_eight_devices_equal_one(run_python):
    assert run_python(EIGHT_DEVICES, devices=8).strip().endswith("same")


def test_paper_tier_is_wan(refused):
    config = load_config(f"{CONFIG}:paper")
    with config.unlocked():
        config.mesh = {}
    described = tmd.describe(config)
    # arXiv 2601.09881, table 7, on the parameters of Wan 2.1
    assert described["dmd2: parameters"] == 1_418_996_800
    assert described["tmd: effective NFE"] == pytest.approx(2.333, abs=1e-3)
    assert described["tmd_large: effective NFE"] == 2.75
    refused("latents and text states are not published", tasks.load, config)


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_refused(refused):
    config = load_config(f"{CONFIG}:paper")
    with config.unlocked():
        config.planned = ("tmd",)
        config.mesh.fsdp = 2
    refused(r"The smallest mesh that fits is .*fsdp=", tmd.describe, config)


def test_bad_inputs(refused):
    def setup(config):
        tmd.describe(config)
        for name in tmd.arms(config):
            tmd.stages(config, name)

    for given, words in (
        ({"head_blocks": 3}, r"head_blocks=3 must lie in 1..L-1 = 1..2"),
        ({"outer": 0}, "steps=0"),
        ({"inner": 0}, "steps=0"),
        ({"kind": "tdm"}, "student.kind='tdm'.*mean 'tmd'"),
        ({"fusion": "sum"}, "fusion='sum'"),
    ):
        refused(words, setup, tiny({"x": {"student": given}}))
    nothing = {"pretrain": {"steps": 0}, "distill": {"cycles": 0}}
    refused("trains no student", setup, tiny({"x": nothing}))
    for changes, words in (
        (["sample.count=0"], "sample.count=0"),
        (["teacher.exact=False", "teacher.steps=0"], "teacher.steps=0"),
        (["model.patch_size=(3,2,2)"], "does not divide a video of 4"),
    ):
        refused(words, lambda changes=changes: setup(tiny(ONE, *changes)))
    config = load_config("configs/tmd.py:smoke", ["sample.teacher_steps=(8,8)"])
    refused(
        r"teacher_steps=\(8, 8\) has a number twice", tmd.measures, config, "teacher"
    )


@pytest.mark.slow
def test_warm_up_with_two_steps_is_warned_of(ran):
    config = tiny({"x": {"student": {"kind": "dmd2", "outer": 2, "warm_up": True}}})
    with pytest.warns(UserWarning, match=r"83.79 with it and 84.39 without"):
        ran(tmd, config, stage="fit")
