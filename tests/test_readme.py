"""The README's Python runs as it stands."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def test_python_blocks_run(capsys):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert "(1024, 2) 32" in out
    losses = [float(line.split()[1]) for line in out.splitlines()[1:]]
    assert losses[-1] < 0.9 * losses[0]
    assert int(namespace["result"].state.step) == 200
