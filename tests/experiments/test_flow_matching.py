"""The flow-matching experiment, its configs and the command line."""

import functools
import json
import re
import runpy
import sys

import jax
import numpy as np
import pytest
from checks import lowered

from experiments import boss, flow_matching, grpo, image_quality, run, sweep
from experiments import report as report_command
from tmdjax import flows, models
from tmdjax.core import compilation_cache
from tmdjax.harness import ConfigError, Outcome, load_config
from tmdjax.harness.stages import stage_hashes

CONFIG = "configs/flow_matching.py"
SMOKE = f"--config={CONFIG}:smoke"


def test_recorded_command_pastes():
    flags = run.parser().parse_args([SMOKE])
    line = run.command(flags, ["sample.euler_nfe=(2, 4)"])
    assert "'--config.sample.euler_nfe=(2, 4)'" in line


@pytest.mark.slow
def test_shards_merge_to_the_whole(tmp_path):
    whole = tmp_path / "whole"
    assert run.main([SMOKE, f"--workdir={whole}", "--seeds=0..1"]) == 0
    parts = [tmp_path / "s0", tmp_path / "s1"]
    for i, part in enumerate(parts):
        # a cache each, as on two machines: the shared net must come out the same
        own = [f"--workdir={part}", f"--cache={tmp_path / f'c{i}'}"]
        run.main([SMOKE, "--seeds=0..1", f"--shard={i}/2", *own])
    results = tmp_path / "results"
    together = tmp_path / "together"
    merge = ["--merge", *map(str, parts), f"--workdir={together}"]
    report_command.main([*merge, "--record", "--results", str(results)])
    merged = json.loads((results / "flow_matching" / "smoke.json").read_text())
    summary = json.loads((whole / "summary.json").read_text())
    assert merged["metrics"] == summary["metrics"]
    assert "flow_matching" in (tmp_path / "RESULTS.md").read_text()
    # the page is that of the whole run, curves and pictures too
    pages = [(each / "report.html").read_text() for each in (whole, together)]
    pictures = [re.findall('alt="(.*?)" src="(.*?)"', page) for page in pages]
    assert pictures[0] == pictures[1] and len(pictures[0]) > 4
    assert (
        re.findall("<td.*?</td>", pages[0])[:20]
        == re.findall("<td.*?</td>", pages[1])[:20]
    )
    assert "joined from 2 runs" in pages[1]


def test_training_and_sampling_lower_for_accelerators():
    config = load_config(f"{CONFIG}:smoke", ["model.depth=1", "precision.train=bf16"])
    with config.unlocked():
        config.model.attention_implementation = "xla"
    step, (state, batch, key), _ = flow_matching.updates(config)["update"]
    lowered(jax.jit(step), state, batch, key)
    apply_fn = models.functional(models.build(flow_matching.model_spec(config)))
    grid, null = flows.uniform_grid(4), config.data.num_classes

    def sample(params, noise, labels):
        velocity = functools.partial(apply_fn, params)
        guided = flows.classifier_free_guidance(velocity, 2.0, null)
        return flows.endpoints(guided, noise, grid, labels, method="heun")

    exported = lowered(jax.jit(sample), state.params, batch["image"], batch["label"])
    assert exported.out_avals[0].shape == batch["image"].shape


@pytest.mark.parametrize("command", [run, sweep])
def test_a_command_keeps_its_programs_where_make_does(command, tmp_path, monkeypatch):
    """Every one of them, in the user's cache folder: a second command is warm."""
    before, seen = jax.config.jax_compilation_cache_dir, []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def look(*given):
        seconds = jax.config.jax_persistent_cache_min_compile_time_secs
        seen.append((jax.config.jax_compilation_cache_dir, seconds))
        return Outcome(0, None, finished=False)

    monkeypatch.setattr(run, "run", look)
    axis = ["--sweep.evaluate.projections=8,16"] if command is sweep else []
    try:
        assert command.main([SMOKE, *axis, f"--workdir={tmp_path / 'run'}"]) == 0
    finally:
        compilation_cache.enable(before)
    assert seen == [(str(compilation_cache.folder()), 0.0)]
    assert compilation_cache.folder().parents[1] == tmp_path


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], r"give --config=configs/<system>.py:<tier>"),
        ([f"--config={CONFIG}"], "names no tier"),
        (["--config=configs/flow_machin.py:cpu"], "Did you mean 'configs/flow_mat"),
        ([SMOKE, "--config.model.hiden=3"], "Did you mean 'model.hidden'"),
        ([SMOKE, "--config.train.steps", "5"], "--config.train.steps=<value>"),
        ([SMOKE, "--sedes=3"], "unknown argument '--sedes'. Did you mean '--seeds'"),
        ([SMOKE, "--seeds=4..1"], "is not like 0..4"),
        ([SMOKE, "--shard=3"], "is not like 0/4"),
        ([SMOKE, "--workdir=", "--fresh"], "--workdir: it is empty; name a folder"),
        ([SMOKE, "--cache= "], "--cache: it is empty"),
        (["--config=:smoke"], "config file '' does not exist"),
        ([SMOKE, "--config.system=../x"], "names the experiment '../x'"),
    ],
)
def test_bad_commands_are_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run.main(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.heads=5", "hidden=32 must be a multiple of heads=5"),
        ("model.name=dut", "Did you mean 'dit'"),
        ("precision.train=bf61", r"precision.train: .*Did you mean 'bf16'"),
        ("optimizer.name=adamm", "Did you mean 'adam"),
        ("sample.heun_nfe=(3,)", r"sample.heun_nfe has 3.*give positive multiples"),
        ("data.num_classes=9", "announce"),
        ("data.options.size=16", r"options.size=16, but data.shape=\(8, 8, 3\)"),
        ("train.drop_rate=1.5", r"rate=1.5 is outside \[0, 1\)"),
        ("train.log_every=0", "train.log_every=0 is outside"),
        ("train.microbatches=0", "train.microbatches=0"),
        ("sample.count=0", "sample.count=0"),
        ("sample.count=100000", "data.options.test_count=128"),
        ("sample.euler_nfe=(0,4)", r"euler_nfe=\(0, 4\) is outside"),
        ("sample.euler_nfe=(4,4)", r"euler_nfe=\(4, 4\) has a number twice"),
        ("evaluate.projections=0", "evaluate.projections=0"),
        ("train.microbatches=5", "batch of 32 does not divide into 5"),
    ],
)
def test_impossible_settings(override, message, tmp_path, as_shipped):
    with pytest.raises(ValueError, match=message):
        run.main([SMOKE, f"--config.{override}", f"--workdir={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    "command, arguments, what",
    [
        ("experiments/run", [SMOKE, "--config.train.stps=1"], "train.steps"),
        ("experiments/sweep", [SMOKE], "give --sweep.a.b=v,w"),
        ("experiments/plan", [], "give --config"),
        ("experiments/report", ["--merge"], "expected at least one argument"),
        ("experiments/report", ["--merge", ""], "--merge: it is empty"),
        ("experiments/report", ["--merge=a", "--workdir="], "--workdir: it is empty"),
        ("experiments/report", ["--render", "--results="], "--results: it is empty"),
        (
            "experiments/report",
            ["--compare=a", "--record"],
            "--record goes with --merge",
        ),
        ("experiments/report", [], "give --merge WORKDIR"),
        ("tmdjax/data/convert", ["arrays", "no.npy", "--name=x"], "no.npy is no array"),
        ("tmdjax/data/check", ["digits"], "'digits' is too much"),
    ],
)
def test_one_line_at_the_shell(command, arguments, what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(f"{command}.py", run_name="__main__")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and what in said and "Traceback" not in said
    assert stopped.value.code == 2


def test_a_claim_about_what_is_not_measured_stops_at_once(tmp_path, refused):
    command = [f"--config={CONFIG}:cpu", f"--workdir={tmp_path / 'run'}"]
    command.append("--config.sample.heun_nfe=(4,6,16)")
    words = "claim 'F4' is about 'heun8.frechet'"
    refused(words, run.main, command, error=ConfigError)


def test_every_stage_depends_on_the_content_of_what_it_reads(tmp_path):
    """A set, weights or problems that are written again under their old names."""

    def data_of(name, **options):
        config = load_config(f"configs/{name}.py:cpu").copy_and_resolve_references()
        config.unlock()
        config.data.name, config.data.options = "video_files", options
        return config

    videos = tmp_path / "video.npy"
    language = load_config("configs/grpo.py:paper").copy_and_resolve_references()
    language.unlock()
    own = language.arms.qwen_gsm8k
    own.model.folder, own.task.path = str(tmp_path / "model"), str(tmp_path / "a.jsonl")
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    for experiment, config, arm, files in (
        (
            flow_matching,
            data_of("flow_matching", folder=str(tmp_path)),
            "main",
            [videos],
        ),
        (boss, data_of("boss", folder=str(tmp_path)), "main", [videos]),
        (grpo, language, "qwen_gsm8k", [weights, tmp_path / "a.jsonl"]),
    ):
        stages = experiment.stages(config, arm)
        before = stage_hashes(stages, 0)
        for path in files:
            for content in (b"old", b"new", None):
                path.write_bytes(content) if content else path.unlink()
                found = stage_hashes(stages, 0)
                assert all(found[name] != before[name] for name in found), experiment
                before = found


def test_real_set_has_the_classes_asked_for():
    rng = np.random.default_rng(0)
    available, wanted = rng.integers(0, 5, 200), rng.integers(0, 5, 60)
    rows = image_quality.same_classes(available, wanted)
    np.testing.assert_array_equal(available[rows], wanted)
    assert len(set(rows)) == 60
    scarce = image_quality.same_classes(np.array([0, 1]), np.array([1, 1, 0]))
    np.testing.assert_array_equal(scarce, [1, 1, 0])
