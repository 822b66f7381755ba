"""RESULTS.md: what stands on it, and that nothing stands on it that no file says."""

import shlex
import subprocess

from records import claim, unit

from tmdjax.harness import records, results_page, summaries

CLAIM = claim(statement="a | b\nc", ours="loss", baseline=None)


def record(system="boss", tier="cpu", device="cpu, 2 cores", claims=(CLAIM,)):
    made = {"wall_s": 30.0, "peak_memory_gb": 1.25, "device": device}
    units = [
        unit("main", seed, {"loss": 1.0 + 0.1 * seed, "w": 7.5}, **made)
        for seed in range(5)
    ]
    command = f"python -m experiments.run --config=configs/{system}.py:{tier}"
    given = {"system": system, "tier": tier, "command": command, "config_hash": "0"}
    return summaries.summary(**given, units=units, claims=claims)


def test_page_holds_claims_findings_and_commands_but_no_metrics():
    made = [record(), record("appo", claims=()), record(tier="smoke")]
    shown = {"finding": "It works.", "picture": "cpu-a.png", "caption": "one seed"}
    findings = {"boss": {"cpu": shown}}
    text = results_page.render(made, findings)
    assert text == results_page.render(made[::-1], findings)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# Results", "## appo, cpu tier", "## boss, smoke tier", "## boss, cpu tier"
    ]  # fmt: skip
    assert "It works.\n\n![boss, cpu tier](results/boss/cpu-a.png)" in text
    assert "The picture: one seed. The claims are of all seeds." in text
    made[0]["figures"] = {"cpu-a.png": "Samples (uniform, seed 0)"}  # it knows better
    again = results_page.render(made, findings)
    assert "The picture: Samples (uniform, seed 0). The claims are of all" in again
    assert f"{made[0]['command']}\n" in text and "peak memory 1.25 GB" in text
    rows = [line for line in text.splitlines() if "a \\| b c" in line]
    assert len(rows) == 2
    for shown in ("B1", "1.5x", "> 0", "1.2", "reproduced", "5"):
        assert f"| {shown} |" in rows[0]
    assert "7.5" not in text  # metrics stay in the record
    for row in text.splitlines():
        if row.startswith("|"):
            assert row.replace("\\|", "").count("|") - 1 in (6, 8)
    assert "| [appo](#appo-cpu-tier) | cpu | no claims | 5 |" in text


def test_long_commands_are_cut_where_a_shell_reads_the_same_words():
    python = "python() { printf '<%s>' \"$@\"; echo; }\n"
    value = "--config.a=it's  {'b': '$HOME'} \""
    for width in range(30, 71):
        words = [f"--workdir={'x' * (width - 10)}", value, "--seeds=0..4"]
        commands = [shlex.join(["python", "-m", "run", *words[i:]]) for i in range(2)]
        made = record() | {"command": "\n".join(commands)}
        shown = results_page.render([made]).split("```\n")[1]
        lines = shown.splitlines()
        assert max(map(len, lines)) <= 76 and len(lines) > 2
        if width % 10:  # a shell costs a few milliseconds
            continue
        read = subprocess.run(
            ["sh", "-c", python + shown], capture_output=True, text=True, check=True
        )
        told = ["".join(f"<{w}>" for w in ("-m", "run", *words[i:])) for i in range(2)]
        assert read.stdout.splitlines() == told
    for command in ("python -m run " + "--a='x\n  y' " * 9, "python  -m ~/run" * 9):
        text = results_page.render([record() | {"command": command}])
        assert f"```\n{command}\n```" in text  # not what shlex.join writes


def test_page_says_that_no_gpu_was_seen_until_one_was():
    assert results_page.NO_GPU in results_page.render([record()])
    seen = results_page.render([record(), record(tier="gpu", device="NVIDIA H100, 1")])
    assert results_page.NO_GPU not in seen


def test_benchmarks_are_ratios_against_their_rival():
    row = {"what": "x / y", "unit": "s", "ours": 1.0, "rival": 2.0, "ratio": 0.51,
           "quartiles": [0.5, 0.52], "goal": 1.0}  # fmt: skip
    alone = {"what": "memory", "unit": "GB", "ours": 3.0}
    rate = {**row, "unit": "1/s", "ratio": 1.5, "better": "greater"}
    rows = [row, alone, rate]
    found = {"benchmark": "sampler", "device": "cpu, 2 cores", "rows": rows}
    text = results_page.render([], benchmarks=[found])
    cells = "| sampler | x / y | 1 s | 2 s | 0.51 | 0.5 .. 0.52 | at most 1 | cpu, 2"
    assert cells in text
    cells = "| 1 1/s | 2 1/s | 1.5 | 0.5 .. 0.52 | at least 1 |"
    assert cells in text and "of a rate (1/s) above 1" in text  # is better
    assert "| sampler | memory | 3 GB | - | - | - | - | cpu, 2 cores |" in text


def test_page_is_written_beside_the_records(tmp_path, refused):
    results = tmp_path / "results"
    records.write_record(results, record())
    written = results_page.write_results(results)
    assert written.read_text() == results_page.render([record()])
    (results / "findings.toml").write_text('[boss.cpu]\npicture = "gone.png"\n')
    for folder in ("reslts", "results/boss"):  # no record there: the page stays
        words = "there is no record .* in .*stays as it is"
        refused(words, results_page.write_results, tmp_path / folder)
    assert written.read_text() == results_page.render([record()])
    assert not (results / "RESULTS.md").exists()
    words = "shows 'gone.png' for boss.cpu, which is not"
    refused(words, results_page.write_results, results)
    for text, words in (
        ("[boss", "findings.toml is not TOML"),
        ("boss = 1", "boss. is 1; a finding is a table"),
        ("[boss]\ncpu = 1", "boss.cpu is 1; a finding"),
        ("[boss.cpu]\nfinding = 1", "boss.cpu is .* a finding is a table"),
        ("[boss.cpu]\nfindng = 'x'", "texts called finding, picture, caption"),
        ("[boss.cpu]\npicture = '../x.png'", "picture='../x.png' names a file"),
        ("[bos.cpu]\nfinding = 'x'", "bos.cpu, of which there is no record"),
        ("\xff", "findings.toml is not UTF-8"),
    ):
        (results / "findings.toml").write_text(text, encoding="latin1")
        refused(words, results_page.write_results, results)
    (results / "findings.toml").unlink()
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for text in ("{}", "[]", "3", '{"rows": [{}]}'):
        (folder / "a.json").write_text(text)
        words = "a.json is no result of a benchmark"
        refused(words, results_page.write_results, results)
    assert written.read_text() == results_page.render([record()])
