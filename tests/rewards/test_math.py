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
    read_answer,
)


def value_of(text):
    terms, separators = read_answer(text)
    return None if separators else terms[0].number


def needs_math_verify(test):
    """The package is part of what `make nightly` installs."""
    absent = pytest.mark.skipif(
        importlib.util.find_spec("math_verify") is None,
        reason="math-verify is absent (pip install 'tmdjax[math]')",
    )
    return pytest.mark.nightly(absent(test))


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
        r"so \fbox{8} and not 7": "8",
        r"so $\boxed 9$, 3 more": "9",
        r"$\boxed 2\sqrt3$": r"2\sqrt3",
        r"is \boxed 12, not 13": "12",
        r"\boxed{1} or $\fbox -\frac12$": r"-\frac12",
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
        r"is \frac12": r"\frac12",
        r"1\frac{1}{2} cups": r"1\frac{1}{2}",
        "it takes 1 1/2 hours": "1 1/2",
        "of 3, 1/2": "1/2",
        "x2": "2",
        "It is 25 cm².": "25",
        "takes 1½ hours": r"1\frac{1}{2}",
        "so it is ‑3": "-3",
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
        "<think>" * 20_000,
        "<think>a</think>" * 10_000,
        r"\boxed{" + "1+" * 900 + "1}",
        r"\boxed{\{" + "1," * 900 + r"\}}",
        r"\boxed{" + r"\text{a}" * 280 + "}",
        r"\boxed{" + "{" * 900 + "}" * 901,
        r"\boxed{0.\overline{" + "3" * 1900 + "}}",
        r"\boxed   " * 20_000,
    ):
        plain.outcome(text, "5")
        read_answer(text)
    assert time.monotonic() - start < 5


def test_numbers():
    for value, texts in {
        42: ["42"],
        7: ["+7", "007", r"\boldsymbol{7}", r"\textcolor{red}{7}", "7\u200b", "７"],
        -7: ["−7", "‑7"],  # with the hyphen that ends no line
        Fraction("1234567.5"): ["1,234,567.50"],
        1234: [r"1{,}234"],
        18: ["$18", r"\$18.00"],
        Fraction(1, 2): [".5", "50%", "½", r"{\frac{1}{2}}", "1⁄2"],
        5: ["5.", r"5\text{ cm}", r"5\ \mathrm{cm}^2", "x = 5"],
        Fraction(3, 4): ["3/4", "-3/-4", r"\frac{3}{4}", r"\tfrac34"],
        Fraction(-3, 4): [r"-\dfrac{3}{4}", r"\frac{-3}{4}"],
        Fraction(3, 2): ["1 1/2", r"1\frac{1}{2}", "1½"],
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
            *["1e999999999", "9" * 101, "1.2.3", "--5", "٣", "nan", "inf", "0x10"],
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


def test_answers_behind_a_mark_are_paid_as_strict_patterns_pay(plain):
    for response, answer in {
        "#### 72 dollars": "72",
        "#### **72**": "72",
        "#### **72** dollars": "72",
        "#### 72<|im_end|>": "72",
        "#### 72</s>": "72",
        "#### $72": "72",
        "#### 72.": "72",
        "####72": "72",
        "####\n\n72 apples are left": "72",
        "#### -1,234 metres": "-1234",
        "#### Step 3\nAdd: 70 + 2 = 72.": "72",
        "#### Step 3\nAdd.\n#### 72": "72",
        "#### 72\n#### Check\nIt is right.": "72",
        "So it is 72<|reserved_special_token_5|>": "72",
        "#### Tuesday": "Tuesday",
        "#### 3/4": "3/4",
        "#### 5 million": "5000000",
        "#### 1/2 cup": "0.5",
        "#### 2 1/2 cups": "2.5",
        "#### 72 (seventy-two)": "72",
        "#### 72, because 70 + 2 = 72": "72",
        "#### 72 = the total": "72",
        "#### 72 a day": "72",
        "#### $72/day": "72",
        "#### 72 m": "72",
        "#### 20% off": "20",
        "#### 72🎉": "72",
        '#### "72"': "72",
        "##### 72": "72",
        "#### 72<|endoftext|>on 99": "72",
        "#### 72 million dollars": "72000000",
    }.items():
        assert plain(response, answer) == 1, response
    assert plain("#### 5!", "5") == plain("#### 10^3", "1000") == 1
    assert plain(r"so 3.5\times10^2", "350") == plain("some 50 percent", "0.5") == 1
    for response, answer in {
        "#### Step 3": "3",
        "#### Step 3\nIt is Tuesday": "3",
        "#### 3/4": "3",
        "#### 72 dollars": "720",
        "#### 5 million": "5",
        "#### 5x": "5",
        "#### 5 + x": "5",
        "#### 5^2": "5",
        "#### 5/x": "5",
        "#### 3:30": "3",
        "72<|reserved_special_token_5|>": "5",
    }.items():
        assert plain(response, answer) == 0, response


def test_a_thought_is_no_answer(plain):
    for response, answer in {
        r"<think>so \boxed{3}</think> It is 4.": "4",
        r"so \boxed{3}</think>#### 4": "4",  # the prompt opened it
        r"\boxed{4} <think>or \boxed{3}</think>": "4",
        r"<think>3</think>\boxed{4}<think>is it \boxed{3}": "4",
        r"<think>3</think>a<think>3</think> 4": "4",
        r"<think>it is \boxed{3}": None,  # cut off
        r"<think>it is \boxed{3}</think>": None,
    }.items():
        assert extract_answer(response) == answer, response
        assert plain(response, "3") == 0


def matrix(*rows, kind="pmatrix"):
    return rf"\begin{{{kind}}}" + r" \\ ".join(rows) + rf"\end{{{kind}}}"


SAME_OR_NOT = [
    # found, gold, whether a verifier without symbols pays
    (r"\begin{pmatrix}1\\2\end{pmatrix}", matrix("1", "2"), 1),
    (matrix("1", "2"), matrix("2", "1"), 0),
    (matrix("1 & 2", "3 & 4"), matrix("1 & 3", "2 & 4"), 0),
    (matrix(r"\frac12", "2"), matrix("0.5", "2"), 1),
    (matrix("1", "2"), "(1,2)", 0),
    (matrix("12", "3"), matrix("1", "23"), 0),
    (r"3\,000", "3000", 1),
    (r"x\leftarrow y", "x y", 0),
    (r"\left.5\right.", "5", 1),
    ("100, 200", "100200", 0),
    ("100, 200", "100,200", 0),
    ("100200", "100, 200", 0),
    ("7, 300, 41", "7,300,41", 1),
    ("(100,200)", "(100, 200)", 1),
    ("(1,000, 2)", "(1000, 2)", 1),
    (r"\{1,2\}", r"\left\{ 1, 2 \right\}", 1),
    (r"3\text{ and }4", "3, 4", 1),
    (r"3\text{ and }4", "4", 0),
    (r"45^\circ, 135^\circ", r"45, 135", 1),
    (r"45^\circ, 135^\circ", "45135", 0),
    (r"30^{\circ},150^{\circ}", r"30^\circ, 150^\circ", 1),
    (r"30^\circ, 50^\circ", r"30^\circ, 150^\circ", 0),
    (r"10\text{ a.m.}", r"10\text{ p.m.}", 0),
    ("10:30 a.m.", r"10:30\text{ p.m.}", 0),
    ("10:30 AM", r"10:30\text{ a.m.}", 1),
    (r"5\text{ cm}", r"5\text{ m}", 0),
    (r"5\text{ cm}", r"5\text{ cm}^2", 0),
    ("5 square inches", r"5\text{ in}^2", 1),
    (r"90\text{ degrees}", r"90^\circ", 1),
    (r"\$5", r"5\text{ dollars}", 1),
    (r"\$5", r"5\text{ kg}", 0),
    ("5 x", "5", 0),
    ("5 pi", "5", 0),
    (r"5\text{ million}", "5", 0),
    (r"5\text{ million}", "5,000,000", 1),
    (r"5\text{ million dollars}", "5", 0),
    (r"5\text{ million dollars}", r"\$5,000,000", 1),
    ("2.5 thousand km", "2500", 1),
    ("12 percent", r"12\%", 1),
    ("y=5", "x=5", 0),
    (r"\theta = 5", "5", 1),
    ("x_1 = 5", "x_2 = 5", 0),
    ("x=1, y=2", "y=1, x=2", 0),
    (r"x\in[1,2]", "[1, 2]", 1),
    ("4343_7", "4343_6", 0),
    ("4343_{6}", "4343_6", 1),
    (r"10_{\text{three}}", "10_3", 1),
    ("2B_{12}", "2b", 1),
    ("1 1/2", "11/2", 0),
    ("1 1/2", r"\frac32", 1),
    (r"x^10", "x^{10}", 0),
    (r"\sqrt2", r"\sqrt{2}", 1),
    (r"\sqrt[3]2", r"\sqrt[3]{2}", 1),
    (r"\frac{x}2", r"\dfrac x2", 1),
    # sets and intervals
    (r"\{1,2,3\}", r"\{3,2,1\}", 1),
    (r"\{1,2\}", r"\{1,2,3\}", 0),
    (r"\{1,1,2\}", r"\{1,2,2\}", 1),
    (r"\{1,1,2\}", r"\{1,2,3\}", 0),
    (r"\left(-\infty, 3\right]", "(−∞,3]", 1),
    (r"(-\infty,3]", r"(-\infty,3)", 0),
    (r"[1,2)\cup(3,4]", "[1, 2) ∪ (3, 4]", 1),
    (r"\varnothing", "∅", 1),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", matrix("1 & 2", "3 & 4"), 1),
    (matrix("1", "2"), matrix("1 & 2"), 0),
    ("(2,+\\infty)", r"(2,\infty)", 1),
    (r"\begin{pmatrix}1\\[4pt]2\\\end{pmatrix}", matrix("1", "2"), 1),
    ("x = 2 or x = 3", "2, 3", 1),
    ("2 and 3", "3", 0),
    # letters that look different
    ("25 cm²", r"25\text{ cm}^2", 1),
    (r"25\text{ cm²}", r"25\text{ cm}^3", 0),
    (r"25\text{ cm^2}", "25 square centimeters", 1),
    ("x² + 1", "x^2+1", 1),
    ("2³", "23", 0),
    ("10⁻³", "0.001", 1),
    ("（1，2）", "(1, 2)", 1),
    ("60º", r"60^\circ", 1),
    (r"\log_2 3", r"\log_{2}3", 1),
    (r"\underline{\frac12}", r"{\bf 0.5}", 1),
    (r"|x|\leqslant 5", r"\lvert x\rvert\le5", 1),
    # numbers
    ("50 per cent", "50", 1),
    ("0.5%", "50", 0),
    ("10^6", "1,000,000", 1),
    ("10^3", "103", 0),
    ("-10^{3}", "1000", 0),
    (r"6\cdot 10^{-4}", "0.0006", 1),
    (r"\frac{0.5}{2}", "0.25", 1),
    (r"0.\overline{3}", r"\frac13", 1),
    (r"0.\overline{3}", "0.3", 0),
    (r"-1.1\bar6", r"-\frac76", 1),
    (r"0.\overline{12}", "4/33", 1),
    ("5!", "5", 0),
    (r"\pm 2", "2", 0),
    ("±2", r"\pm 2", 1),
    ("2π", r"2 \pi", 1),
    (r"3√2", r"3\sqrt{2}", 1),
    ("x ≥ 5", r"x\ge5", 1),
    # units and money
    ("€5", "5", 1),
    ("£5", "€5", 0),
    (r"5\text{ euros}", "€5", 1),
    (r"US\$5", r"\$5", 1),
    (r"\$1{,}000.50", "1000.5", 1),
    (r"5\ \mathrm{~cm}", r"5\text{ cm}", 1),
    ("5 cm^2", r"5\text{ cm}^2", 1),
    ("5 cm^2", r"5\text{ cm}^3", 0),
    ("5 km/h", r"5\text{ kilometers per hour}", 1),
    ("5 km/h", r"5\text{ m/h}", 0),
    ("60 mph", r"60\text{ miles per hour}", 1),
    (r"\text{5 cm}", "5", 1),
    (r"\text{5 apples}", "5", 1),
    (r"\text{5 apples}", r"5\text{ pears}", 0),
    ("5 students", "5", 1),
    ("5¢", r"5\text{ cents}", 1),
    ("98.6°F", "98.6", 1),
    (r"37^\circ\text{C}", "37 °C", 1),
    ("37°C", "37°F", 0),
    ("8:00 PM", r"8\text{ p.m.}", 1),
    ("8:00 PM", r"8\text{ a.m.}", 0),
    # names, bases, choices
    ("5 = x", "5", 1),
    ("5 = x", "y=5", 0),
    ("(1010)_2", "1010_2", 1),
    ("(1010)_2", "1010_3", 0),
    ("A", r"\text{(A)}", 1),
    ("(B)", r"\text{(A)}", 0),
    ("**5**", "5", 1),
    ("{5}", "5", 1),
]


def test_answers_are_read_as_tex_and_then_compared(plain):
    for found, gold, same in SAME_OR_NOT:
        assert plain(rf"\boxed{{{found}}}", gold) == same, (found, gold)


@needs_math_verify
def test_the_symbolic_judge_decides_no_other_way(symbolic):
    """It sees what was written; what is decided before stays as it is."""
    for found, gold, same in SAME_OR_NOT:
        if found != "x^10":  # which it reads as people mean it
            assert symbolic(rf"\boxed{{{found}}}", gold) == same, (found, gold)


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
        ("so it is 5", r"\boxed{5}", 1),  # a truth that a file gives as it was written
        (r"\boxed{\frac12}", r"Thus $\boxed{0.5}$.", 1),
        ("so it is 5", r"\boxed{6}", 0),
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
        ("1.414214", r"\sqrt2", False),
        ("1.4142135623730951", r"\sqrt2", False),
        (r"3.141592653589793", r"\pi", False),
        (r"0.75", r"\frac12+\frac14", True),
        (r"0.1\sqrt2", r"\frac{\sqrt2}{10}", True),
        (r"$2\sqrt{2}$", r"\sqrt8", True),
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


@needs_math_verify
def test_a_tolerance_holds_for_symbols_too():
    verifier = MathVerifier(timeout=3.0, tolerance=1e-3)
    assert verifier("1.414", r"\sqrt2") == 1 and verifier("1.41", r"\sqrt2") == 0
    verifier.close()
