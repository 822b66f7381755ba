"""The pictures of an asynchronous run, made of its log alone."""

import html
import shlex

import numpy as np
import pytest
from PIL import Image
from simulated_runs import SLOTS, run

from experiments import timeline
from tmdjax.harness import ConfigError
from tmdjax.runtime import Schedule
from tmdjax.runtime.events import Event, EventLog, read_run, staleness

FIGURES = ["lengths", "staleness", "throughput", "timeline", "utilisation"]
SCHEDULE = Schedule(
    batch=4, samples=2, max_new_tokens=400, updates=6, slots=SLOTS, eta=2
)


def shown(folder):
    """Names of the figures of a page, each a whole picture of a bounded size."""
    names = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            picture.load()
            assert 100 < min(picture.size) and max(picture.size) < 2000
            assert np.ptp(np.asarray(picture)[..., :3].astype(int), axis=-1).max() > 100
        names.append(path.stem)
    return names


def test_a_run_is_shown_from_its_folder(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a run" / "events_000.jsonl"
    with EventLog(path) as log:
        found = run(SCHEDULE, log=log)
    assert timeline.main([str(path.parent)]) == 0
    folder = path.parent / "timeline"
    assert shown(folder) == FIGURES
    page, text = (folder / "report.html").read_text(), capsys.readouterr().out
    command = html.unescape(page.split("<pre>")[1].split("</pre>")[0])
    given = ["python", "-m", "experiments.timeline", str(path.parent)]
    assert shlex.split(command) == given
    assert page.count("data:image/png;base64,") == 5
    for words in ("batch not full", "straggler", "Where the time went; the busiest is"):
        assert words in page and words in text
    events = read_run(path)
    by_lag = staleness(events)
    told = timeline.totals(events, found.seconds, by_lag)
    assert told["updates"] == 6 and told["workers that died"] == 0
    assert told["tokens trained on"] == found.tokens
    assert told["responses trained on"] == len(found.records)
    assert told["tokens written"] == sum(e.counts["drawn"] for e in found.engines)
    lags = [b.version - v for b in found.batches for g in b.groups
            for r in g.records for v in r.versions]  # fmt: skip
    assert told["mean lag"] == pytest.approx(np.mean(lags))
    assert told["largest lag"] == max(lags)


def test_rows_add_up_and_bins_hold_all_numbers():
    assert timeline.MOST_BARS == 40
    heights, edges = timeline.whole_histogram([3, 3, 5], [1, 2, 4])
    assert heights.tolist() == [3, 0, 4] and edges.tolist() == [2.5, 3.5, 4.5, 5.5]
    values = np.arange(1000) + 7
    heights, edges = timeline.whole_histogram(values)
    assert len(heights) == 40 and heights.tolist() == [25] * 40
    found = {"written": np.array([1, 1, 2, 4]), "trained": np.array([1, 2])}
    shares, edges = timeline.shares_by_length(found)
    assert shares["written"].tolist() == [0.5, 0.25, 0, 0.25]
    assert shares["trained"].tolist() == [0.5, 0.5, 0, 0]
    assert list(timeline.shares_by_length(found | {"trained": values[:0]})[0]) == [
        "written"
    ]


def test_a_run_of_many_workers_has_a_band_a_role(tmp_path, monkeypatch):
    """What is drawn does not grow with workers and events."""
    drawn = {}

    def plot(rows, *arguments):
        drawn["edges"] = arguments[0]
        drawn["rows"] = rows

    monkeypatch.setattr(timeline, "timeline_plot", plot)
    for kind in ("bar", "line"):
        monkeypatch.setattr(timeline, f"{kind}_plot", lambda *given: None)
    notes = [{"waits": {"generate": reason}} for reason in ("weights", "throttled")]
    events = [
        Event(worker="control", step=i, what="work", begin=2 * i, end=2 * i, notes=n)
        for i, n in enumerate([*notes, {}])
    ]
    events += [
        Event(worker=f"generate/{i}", step=0, what="decode", begin=i / 1024, end=3.0)
        for i in range(1024)
    ]
    report = timeline.report(events, tmp_path)
    assert list(drawn["rows"]) == ["generate", "control"]
    assert len(drawn["edges"]) == timeline.PERIODS + 1
    parts = drawn["rows"]["generate"]
    assert list(parts) == ["busy", "weights", "throttled", "idle"]
    np.testing.assert_allclose(sum(parts.values()), 1, rtol=1e-12)
    (table, _) = report.tables
    (row,) = [row for row in table[1] if row["role"] == "generate"]
    assert row["busy"] == pytest.approx((3 - 1023 / 2048) / 4)
    assert row["throttled"] == pytest.approx(1 / 4)
    names = [f"generate/{i}" for i in (0, 2, 10)] + ["control"]
    few = [e for e in events[::-1] if e.worker in names]
    timeline.report(few, tmp_path)
    assert list(drawn["rows"]) == names


def test_what_cannot_be_shown_is_refused(tmp_path, refused):
    EventLog(tmp_path / "events_000.jsonl").close()
    refused("no step that took time", timeline.main, [str(tmp_path)])
    refused("no events_", timeline.main, [str(tmp_path / "..")], error=OSError)
    refused("required: RUN", timeline.main, [], error=ConfigError)
