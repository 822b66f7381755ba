import base64
import html.parser
import math
import re

import numpy as np

from tmdjax.harness.pictures import image_grid
from tmdjax.harness.report import (
    claim_row,
    format_value,
    text_table,
    write_report,
)


def test_cells():
    numbers = (123456, 0.000123456, 1234.56, np.float32(0.5), math.nan)
    found = [format_value(value) for value in (None, *numbers, True, "a")]
    assert found == "- 123456 0.0001235 1235 0.5 nan True a".split()


def test_text_table_aligns_numbers_right_and_text_left():
    rows = [{"grid": "uniform", "nfe": 4, "w2": 1 / 3}, {"grid": "bellman", "nfe": 16}]
    assert text_table(rows).splitlines() == [
        "grid     nfe      w2",
        "-------  ---  ------",
        "uniform    4  0.3333",
        "bellman   16       -",
    ]


CLAIM = {"id": "B1", "statement": "fewer <steps> & better", "published": None}
CLAIM |= {"threshold": 1.5, "direction": "greater", "ours": [1.0] * 5}
CLAIM |= {"value": 1.23456, "ci95": [1.1, 1.4], "verdict": "not reproduced"}


def test_claim_row_says_bound_interval_and_seeds():
    row = claim_row(CLAIM)
    names = ("95 % interval", "threshold", "seeds")
    assert [row[name] for name in names] == ["[1.1, 1.4]", "> 1.5", 5]
    row = claim_row(CLAIM | {"ci95": [None, None], "threshold": None})
    assert row["95 % interval"] is None and row["threshold"] is None


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; keeps text, tags and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_self_contained_escaped_page(tmp_path):
    nasty = "<script>alert('x')</script> & \"q\""
    grid = image_grid(np.zeros((1, 2, 2, 1)), tmp_path / "grid.png", 1)
    path = write_report(
        tmp_path / "out" / "report.html",
        title=nasty,
        command=f"run --config={nasty}",
        environment={nasty: nasty, "{braces}": 1},
        tables=[(nasty, [{nasty: nasty, "w2": 0.123456}])],
        figures=[(nasty, grid), ("curve", None)],
        claims=[CLAIM],
    )
    source = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    page.close()
    assert page.open == [] and "script" not in page.tags
    assert page.text.count(nasty) == 9
    for shown in ("fewer <steps> & better", "0.1235", "curve: left out"):
        assert shown in page.text
    (link,) = page.links
    kind, data = link.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == grid.read_bytes()
    assert not re.search(r"https?://|@import|url\(", source)
    assert 'name="viewport"' in source
    assert "color-scheme: light dark" in source
