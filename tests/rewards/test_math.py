import importlib.util
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmdjax.rewards.math import (
    OUTCOMES,
    MathVerifier,
    extract_answer,
    normalise,
    parse_number,
)


def value_of(text):
    found = parse_number(normalise(text))
    return found and found[0]


needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="math-verify is absent (pip install 'tmdjax[math]')",
)


@pytest.fixture
def plain():
    return MathVerifier(symbolic=False)


@pytest.fixture(scope="module")
def symbolic():
    verifier = MathVerifier(timeout=3.0)
    yield verifier
    verifier.close()


def test_extraction():
    for text, answer in {
        r"so $\boxed{42}$.": "42",
        r"\boxed{1} no, \boxed{ \frac{1}{2} }": r"\frac{1}{2}",
        r"\fbox{7}": "7",
        r"\boxed {7}": "7",
        r"\boxed{\{1,2\}}": r"\{1,2\}",
        r"\boxed{\{1, 2}": r"\{1, 2",  # an escaped brace is no brace
        r"\boxed{3} and then \boxed{4": "3",  # the second was cut off
        r"\boxed{a\boxed{b}}": "b",
        r"\boxed{}": "",
        "16 - 3 = 13\n#### 1,300": "1,300",
        "#### 5\nor so 7": "5",
        r"#### 5, so \boxed{6}": "6",
        "The answer is 1,234.": "1,234",
        "It is 12.5% or 3/4 of it": "3/4",
        "from 10-3": "3",
        "x = -3": "-3",
        "costs $5.": "$5",
        "1, 2, 3": "3",
        "1.5e-3 m": "1.5e-3",
        r"is \frac{3}{4} of": r"\frac{3}{4}",
        "x2": "2",
        **dict.fromkeys(("no number", "", "}{\\", "####")),
    }.items():
        assert extract_answer(text) == answer, text


def test_long_nonsense_costs_little(plain):
    start = time.monotonic()
    for text in (
        r"\boxed{" * 20_000,
        "{" * 100_000,
        "1,111," * 20_000,
        "9" * 100_000,
        "- " * 50_000,
        r"\text{" * 20_000,
    ):
        plain.outcome(text, "5")
        normalise(text)
    assert time.monotonic() - start < 5


def test_numbers():
    for value, texts in {
        42: ["42"],
        7: ["+7", "007"],
        -7: ["−7"],
        Fraction("1234567.5"): ["1,234,567.50"],
        1234: [r"1{,}234"],
        18: ["$18", r"\$18.00"],
        Fraction(1, 2): [".5", "50%"],
        5: ["5.", r"5\text{ cm}", r"5\ \mathrm{cm}^2", "x = 5"],
        Fraction(3, 4): ["3/4", "-3/-4", r"\frac{3}{4}", r"\tfrac34"],
        Fraction(-3, 4): [r"-\dfrac{3}{4}", r"\frac{-3}{4}"],
        Fraction(3, 2): ["1 1/2", r"1\frac{1}{2}"],
        Fraction(-3, 2): ["-1 1/2"],
        Fraction(1, 8): [r"12.5\%"],
        1500: ["1.5e3"],
        Fraction(3, 2000): ["1.5E-3"],
        Fraction(1, 500): [r"2\times 10^{-3}"],
        200_000: [r"2 \cdot 10^5"],
        300: ["3 x 10^2"],
        90: [r"90^\circ", r"90^{\circ}"],
        None: [
            *[r"\left(5\right)", "1,2", "12,34", "1/0", r"\frac{1}{0}", "5%%", "1e401"],
            *["1e999999999", "9" * 101, "1.2.3", "--5", "٣", "½", "nan", "inf", "0x10"],
            *["1_000", ""],
        ],
    }.items():
        for text in texts:
            assert value_of(text) == value, text


@settings(max_examples=200, deadline=None)
@given(st.fractions(-(10**6), 10**6, max_denominator=999), st.data())
def test_every_writing_of_a_number_has_its_value(number, data):
    top, bottom = number.numerator, number.denominator
    sign = "-" if top < 0 else ""
    forms = [
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"{sign}\dfrac{{{abs(top)}}}{{{bottom}}}",
        rf"$\frac{{{top}}}{{{bottom}}}\text{{ kg}}$",
    ]
    if bottom == 1:
        forms += [f"{top:,}", f"{top}.00", f"{top * 100}%", f"{top}e0", f"{top}000e-3"]
    text = data.draw(st.sampled_from(forms))
    assert value_of(text) == number
    verifier = MathVerifier(symbolic=False)
    assert verifier(rf"thus \boxed{{{text}}}", f"{top}/{bottom}") == 1.0
    assert verifier(rf"thus \boxed{{{text}}}", f"{top + bottom * 101}/{bottom}") == 0.0


def test_comparison_without_symbols(plain):
    for response, gold, reward in (
        ("so it is 1234", "1,234", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{50\%}", "50", 1),
        (r"\boxed{50\%}", "0.5", 1),
        (r"\boxed{50}", r"50\%", 1),
        (r"\boxed{50\%}", r"0.5\%", 0),
        (r"\boxed{0.333}", "1/3", 0),
        (r"\boxed{\text{Tuesday}}", "Tuesday", 1),
        (r"\boxed{(3, 4)}", r"\left(3,4\right)", 1),
        (r"\boxed{x=5}", "5", 1),
        (r"\boxed{5 and 7}", "7", 0),
        (r"\boxed{}", "7", 0),
        ("", "7", 0),
        (r"\boxed{x^2}", "x^2+0", 0),  # symbols are not compared here
    ):
        assert plain(response, gold) == reward, response


def test_outcomes_are_counted_and_bounded_by_the_tolerance(plain):
    for response in ("5", "6", "7", "none", r"\boxed{ }", r"\boxed{y}"):
        plain(response, "7")
    assert plain.counts == {"equal": 1, "different": 3, "no answer": 2}
    assert set(plain.counts) <= set(OUTCOMES)
    for tolerance, reward in ((1e-2, 1.0), (1e-4, 0.0)):
        verifier = MathVerifier(symbolic=False, tolerance=tolerance)
        assert verifier("0.333", "1/3") == reward


@settings(max_examples=300, deadline=None)
@given(st.text(r"\{}$%#boxedfrac0123456789,./-+^() " + "é½\n", max_size=40))
def test_no_text_raises(text):
    verifier = MathVerifier(symbolic=False)
    assert verifier(text, "123456789") in (0.0, 1.0)
    assert verifier(rf"\boxed{{{text}}}", r"\frac{1}{7}") in (0.0, 1.0)
    if text.strip():
        verifier("7", text)


def test_bad_input(plain, monkeypatch, refused):
    refused("the gold answer is blank; drop the problem", plain, "7", " ")
    negative = {"symbolic": False, "tolerance": -1.0}
    refused(r"tolerance=-1\.0 is outside \[0, inf\)", MathVerifier, **negative)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    extra = r"'tmdjax\[math\]', or set symbolic=False"
    refused(extra, MathVerifier, error=ImportError)


@needs_math_verify
def test_symbolic_comparison(symbolic):
    column = r"\begin{pmatrix}1\\%d\end{pmatrix}"
    for found, gold, same in (
        (r"2\sqrt2", r"\sqrt{8}", True),
        (r"\frac{1}{\sqrt 2}", r"\frac{\sqrt{2}}{2}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+2x+2", False),
        (r"\{2,1\}", r"\{1,2\}", True),
        ("[3,4]", "(3,4)", False),
        (column % 2, column % 3, False),
        ("2^{10}", "1024", True),
        (r"\frac{", "5", False),
        ("}{", "5", False),
        ("__import__('os')", "5", False),
        ("😀", "5", False),
    ):
        assert symbolic(rf"\boxed{{{found}}}", gold) == same, found


@needs_math_verify
def test_what_cannot_be_computed_times_out_and_is_counted():
    verifier = MathVerifier(timeout=0.5)
    start = time.monotonic()
    for found in (r"9^{9^{9^{9}}}", r"(1+x)^{100000}-x"):
        assert verifier.outcome(rf"\boxed{{{found}}}", "5") == "timed out"
    assert time.monotonic() - start < 20
    assert verifier(r"\boxed{\sqrt{4}}", "2") in (0.0, 1.0)
    assert verifier.counts["timed out"] >= 2
    verifier.close()
