"""The report of a run, from units alone; and as a browser shows it, where there is one.

The screenshots are kept in build/ (report-390.png, report-1280.png).
"""

import html
import json
import pathlib
import re
import shutil
import subprocess
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from records import claim, unit

from tmdjax.harness import (
    ConfigError,
    Report,
    check_experiment,
    run_folder,
    run_report,
    summaries,
)
from tmdjax.harness.pictures import image_grid
from tmdjax.harness.plots import line_plot
from tmdjax.harness.report import format_value
from tmdjax.metrics.intervals import Interval, t_interval

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ARMS = ("bellman", "straightened", "uniform")
CLAIMS = [
    claim(
        id="B1", ours="straightened/error", baseline="uniform/error", direction="less"
    ),
    claim(id="B2", ours="uniform/error", baseline=None, threshold=0.82),
    claim(
        id="B3",
        ours="bellman/error",
        baseline="uniform/error",
        statement="a statement that goes on for longer than a telephone is wide, and "
        "then says in brackets what was left out (all of the rest)",
    ),
]


def finished(arm, seed, curve=None, shared=False):
    """A unit as a run folder has it; its log has two columns, or one by seed."""
    place = ARMS.index(arm)
    metrics = {"error": 1.0 - 0.1 * place + 0.01 * seed, "steps4.frechet": 1e-5 * place}
    found = unit(arm, seed, metrics, timings={"seconds": 2.0 + seed})
    steps = range(10, 60, 10)
    rows = curve or [{"step": s, "loss": (1 + seed) / s, "time/x": 1.0} for s in steps]
    stages = {"train": "same" if shared else f"{arm}{seed}", "score": f"{arm}{seed}s"}
    return {"unit": found, "logs": {"train": rows}, "stages": stages}


UNITS = [finished(arm, seed) for arm in ARMS for seed in range(5)]


def make_experiment(**changes):
    def rows(config, found):
        return [
            {"grid": arm, "NFE": 4, "error": found.get(f"{arm}/error")} for arm in ARMS
        ]

    members = {
        "stages": lambda config, arm: [],
        "describe": lambda config: {},
        "measures": lambda config, arm: set(),
        "summary_rows": rows,
        "MEANINGS": {
            "error": "mean squared error in units of the data; less is better",
            "frechet": "a distance & <more>",
            "absent": "of something else",
        },
    }
    return check_experiment(types.SimpleNamespace(**members | changes))


def shown(workdir, units=UNITS, claims=CLAIMS, single=None, **changes):
    """The page of made-up units."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"files": []}))
    (workdir / "metrics.csv").write_text("step\n")
    given = {"system": "made_up", "tier": "cpu", "command": "run", "config_hash": "0"}
    summary = summaries.summary(
        **given, units=[each["unit"] for each in units], claims=claims
    )
    experiment = make_experiment(**changes)
    run_folder.write_single(workdir, "uniform", single)
    run_report.show(workdir, experiment, None, summary, units)
    return (workdir / "report.html").read_text()


def test_claims_come_first_then_means_of_every_arm(tmp_path, capsys):
    page = shown(tmp_path)
    order = ["B1", "Results: mean ±", "What the measures mean", "Training of stage"]
    places = [page.index(text) for text in [*order, "All metrics", "Timings"]]
    assert places == sorted(places)
    for verdict in ("reproduced", "not-reproduced", "inconclusive"):
        assert f'<span class="verdict {verdict}">' in page
    for arm in ARMS:
        errors = [
            u["unit"]["metrics"]["error"] for u in UNITS if u["unit"]["arm"] == arm
        ]
        cell = format_value(t_interval(errors))
        assert page.count(f"{cell}</td>") == 2  # side by side, in both tables
    assert "a distance &amp; &lt;more&gt;" in page and "of something else" not in page
    out = capsys.readouterr().out
    assert "0.92 ± 0.02" in out and out.index("Results") < out.index("Claims")
    for said in ("cpu, 2 cores", "seeds 0, 1, 2, 3, 4", "commit abc", " UTC"):
        assert said in page
    assert set(re.findall('href="(.*?)"', page)) == {
        "metrics.csv", "config.json", "summary.json"
    }  # fmt: skip
    listed = json.loads((tmp_path / "config.json").read_text())["files"]
    assert listed == ["single.json", "figures/training-train-loss.png"]


def test_cells_of_means():
    for value, text in (
        (Interval(0.123456, 0.1, 0.146912), "0.1235 ± 0.023"),
        (Interval(2.0, 2.0, 2.0), "2"),
        (Interval(2.0, None, None), "2"),
        (Interval(float("nan"), None, None), "nan"),
    ):
        assert format_value(value) == text
    assert format_value(0.123456, 2) == "0.12"


def test_a_seed_that_diverged_leaves_no_interval(tmp_path):
    bad = finished("uniform", 5)
    bad["unit"]["metrics"]["error"] = float("nan")
    bad["logs"]["train"][2]["loss"] = float("inf")
    page = shown(tmp_path, [*UNITS, bad], claims=[])
    assert (
        '<td>uniform</td><td class="number">4</td><td class="number">nan</td>' in page
    )


@pytest.fixture
def plotted(monkeypatch):
    """What is plotted, by the name of the file."""
    found = {}

    def plot(series, path, **options):
        found[path.name] = series
        return line_plot(series, path, **options)

    monkeypatch.setattr(run_report.plots, "line_plot", plot)
    return found


def test_every_arm_has_its_curve_over_all_seeds(tmp_path, plotted):
    pytest.importorskip("matplotlib")
    shown(tmp_path, CURVES={"loss": "loss", "reward": "mean reward", "absent": "x"})
    (series,) = plotted.values()
    assert list(series) == [*ARMS]
    steps, values = series["uniform"]
    assert steps.tolist() == [10, 20, 30, 40, 50]
    assert values[1] == t_interval([(1 + seed) / 20 for seed in range(5)])


def test_a_training_that_arms_share_is_one_curve_and_columns_by_seed_are_taken_apart(
    tmp_path, plotted
):
    def rows(arm):
        return [
            {"step": 1, "loss": 3.0, **{f"loss.seed{s}": s + arm for s in (0, 1)}},
            {"step": 2, "loss": 3.0, **{f"loss.seed{s}": s + arm for s in (0, 1)}},
        ]

    def units(shared, by_seed):
        found = []
        for place, arm in enumerate(ARMS):
            for seed in (0, 1):
                curve = rows(place) if by_seed else None
                found.append(finished(arm, seed, curve, shared=shared))
        return found

    page = shown(tmp_path, units(True, False), claims=[])
    assert "Training of stage train: loss, all arms<" in page
    page = shown(tmp_path / "b", UNITS[:5], claims=[])
    assert "stage train: loss, bellman, mean and 95 % interval of 5 trainings" in page
    shown(tmp_path, units(True, False), claims=[])
    ((name, (_, values)),) = plotted["training-train-loss.png"].items()
    assert name == "all arms" and values[0].low is None
    side_by_side = units(False, True)
    for each in side_by_side:  # all seeds of an arm are one training
        each["stages"]["train"] = each["unit"]["arm"]
    shown(tmp_path, side_by_side, claims=[])
    series = plotted["training-train-loss.png"]
    assert [values[0].value for _, values in series.values()] == [0.5, 1.5, 2.5]


def run_folder_of(path, units, first):
    """A workdir with units, and a picture of the first of an arm."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"files": []}))
    for each in units:
        run_folder.write_unit(path, each["unit"], each["stages"], each["logs"])
    arm, seed = first
    folder = run_folder.arm_folder(path, arm)
    grid = image_grid(np.full((1, 2, 2, 1), seed / 9), folder / "grid.png", 1)
    shown = Report([("Steps", [{"k": np.float32(2)}])], [("Samples", grid)])
    run_folder.write_single(path, arm, shown.of(f"{arm}, seed {seed}"))
    return path


def test_joined_runs_have_the_page_of_the_whole(tmp_path, refused):
    """Means and curves of all units; a picture keeps saying whose it is."""
    parts = [
        run_folder_of(tmp_path / "a", UNITS[:7], ("bellman", 0)),
        run_folder_of(tmp_path / "b", UNITS[7:], ("bellman", 3)),
        run_folder_of(tmp_path / "c", [], ("uniform", 2)),
    ]
    given = {"system": "made_up", "tier": "cpu", "command": "run", "config_hash": "0"}
    units = [each["unit"] for each in UNITS]
    shards = [summaries.summary(**given, units=p) for p in (units[:7], units[7:])]
    config, experiment = ConfigDict({"system": "made_up"}), make_experiment()

    def joined(workdir, folders):
        merged = summaries.merge(shards)
        figures = run_report.show_joined(workdir, experiment, config, merged, folders)
        return figures, (workdir / "report.html").read_text()

    figures, page = joined(tmp_path / "all", parts)
    whole = shown(tmp_path / "whole", claims=[])
    tables = [re.findall("<td.*?</td>", text) for text in (page, whole)]
    assert [cell for cell in tables[1] if "±" in cell]
    assert [c for c in tables[0] if "±" in c] == [c for c in tables[1] if "±" in c]
    curve = "figures/training-train-loss.png"
    drawn = [(tmp_path / name / curve).read_bytes() for name in ("all", "whole")]
    assert drawn[0] == drawn[1]
    captions = [caption for caption, _ in figures]
    assert "Samples (bellman, seed 0)" in captions and len(captions) == 3
    assert "Samples (uniform, seed 2)" in captions
    assert "Steps (bellman, seed 0)" in page and "joined from 3 runs" in page
    assert "bellman, seed 3" not in page and "a config that was changed" in page
    (first,) = (path for caption, path in figures if "bellman, seed 0" in caption)
    assert first.read_bytes() == (parts[0] / "figures/bellman/grid.png").read_bytes()
    rows = (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 5 * len(UNITS)
    figures, page = joined(tmp_path / "all", parts[2:])  # again, of one of them
    assert "Samples (bellman" not in page and "Training of stage" not in page
    words = "holds a run of its own"
    refused(words, joined, parts[0], parts, error=ConfigError)
    refused(words, joined, parts[2], parts, error=ConfigError)


def test_a_foreign_list_of_pictures_is_refused(tmp_path, refused):
    for text, words in (
        ("[]", "no dict of arms"),
        ('{"a": {"tables": []}}', "KeyError"),
        ('{"a": {"tables": [], "figures": [["x", "../secret"]]}}', "no file of it"),
        ('{"a": {"tables": [], "figures": [["x", "/etc/passwd"]]}}', "no file of it"),
    ):
        (tmp_path / "single.json").write_text(text)
        refused(f"single.json is damaged .*{words}", run_folder.read_single, tmp_path)
    gone = '{"a": {"tables": [], "figures": [["x", "gone.png"]]}}'
    (tmp_path / "single.json").write_text(gone)
    assert run_folder.read_single(tmp_path) == {"a": Report()}


LAYOUT = """<title></title><iframe width="WIDTH" height="900" srcdoc="PAGE"></iframe>
<script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const colour = (one) => getComputedStyle(one).backgroundColor;
  document.title = JSON.stringify({
    width: page.defaultView.innerWidth,
    wide: page.documentElement.scrollWidth,
    pictures: [...page.images].map((i) => [i.naturalWidth, i.clientWidth]),
    colours: [...page.querySelectorAll(".verdict")].map(colour),
    heads: [...page.querySelectorAll("h2")].map((h) => h.offsetTop),
  });
});
</script>
"""
"""A window is never narrower than 500 pixels, a frame in it may be."""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(tmp_path, width):
    """No line runs over the edge, pictures are whole, verdicts have their colours."""
    grid = image_grid({"4 steps": np.zeros((9, 8, 8, 1))}, tmp_path / "a.png")
    single = Report([], [("Samples (uniform, seed 0)", grid)])
    page = shown(tmp_path, single=single)
    looked = tmp_path / "looked.html"
    framed = LAYOUT.replace("WIDTH", str(width))
    looked.write_text(framed.replace("PAGE", html.escape(page)))
    picture = pathlib.Path("build") / f"report-{width}.png"
    picture.parent.mkdir(exist_ok=True)
    picture.unlink(missing_ok=True)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1800"]
    found = []
    for what, file in (
        ("--dump-dom", looked),
        (f"--screenshot={picture.absolute()}", tmp_path / "report.html"),
    ):
        command = [CHROMIUM, *flags, what, file.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    seen = json.loads(re.search("<title>(.*?)</title>", found[0])[1])
    assert seen["wide"] <= seen["width"] == width, seen
    assert len(seen["pictures"]) == 2
    assert all(
        0 < small <= seen["width"] and natural for natural, small in seen["pictures"]
    )
    assert len({*seen["colours"], "rgba(0, 0, 0, 0)"}) == 4
    assert seen["heads"] == sorted(seen["heads"])
    assert picture.stat().st_size > 20_000
