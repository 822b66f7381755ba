"""What the profile of control makes of seconds and counts, by hand; and a tiny one."""

import json

import pytest

from benchmarks.control_profile import PARTS, Profile, main, rows_of


def test_what_is_allowed_follows_from_operations_and_the_rivals_seconds():
    """0.2 of 20 s and 0.4 of 60 s, and the rival's other 20 s."""
    profiles = {
        "ours": Profile(parts={}, calls=(4, 60), flops=(1e9, 4e9)),
        "dppo": Profile(parts={}, calls=(20, 150), flops=(5e9, 10e9)),
    }
    parts = dict(zip(PARTS, (4.0, 20.0, 60.0, 10.0, 5.0)))
    seconds = {**parts, "whole": 100.0, "rest": 1.0}
    slower = {name: 0.5 * taken for name, taken in seconds.items()}
    rows = rows_of(profiles, {"ours": [slower] * 3, "dppo": [seconds] * 3})
    found = {row["what"].partition(": ")[2]: row for row in rows}
    assert found["whole"]["ratio"] == 0.5 and found["whole"]["goal"] == 0.5
    assert found["network calls an action, acting"]["ratio"] == 0.2
    assert found["... and training"]["ours"] == 64
    assert found["GFLOP an iteration"]["ratio"] == pytest.approx(5 / 15)
    assert found["allowed"]["ours"] == pytest.approx(0.2 * 20 + 0.4 * 60 + 20)
    assert found["allowed"]["ratio"] == pytest.approx(0.48)


@pytest.mark.nightly
def test_calls_of_the_networks_are_those_that_the_page_counts(tmp_path):
    path = tmp_path / "found.json"
    sizes = "--hidden 64 64 64 --critic 64 64 64".split()
    main(["--envs=4", "--repeats=1", f"--json={path}", *sizes])
    rows = {row["what"]: row for row in json.loads(path.read_text())["rows"]}
    for name, acting, all_calls in (
        ("reinflow", 4, 64),
        ("reinflow, 1 noisy step", 4, 19),
    ):
        what = f"{name} / dppo: "
        counted = rows[what + "network calls an action, acting"]
        assert (counted["ours"], counted["rival"]) == (acting, 20)
        counted = rows[what + "... and training"]
        assert (counted["ours"], counted["rival"]) == (all_calls, 170)
        share = rows[what + "GFLOP an iteration"]["ratio"]
        assert all_calls / 170 < share < 1  # the noise network's come on top
        for part in (*PARTS, "whole"):
            assert rows[what + part]["ours"] > 0
