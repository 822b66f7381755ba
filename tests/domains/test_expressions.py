import ast
import contextlib
import itertools
import operator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmdjax.domains.arithmetic.expressions import (
    ExpressionError,
    canonical,
    check_countdown,
    evaluate,
    parse,
)

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_by_python(text):
    """Exact value by Python's own grammar."""

    def walk(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return OPERATORS[type(node.op)](walk(node.left), walk(node.right))

    return walk(ast.parse(text, mode="eval").body)


def binary(inner):
    operator = st.sampled_from(["+", "-", "*", "/", " - "])
    return st.tuples(inner, operator, inner).map("".join)


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(binary(inner), inner.map("({})".format)),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_values_are_those_of_python(text):
    try:
        expected = value_by_python(text)
    except ZeroDivisionError:
        with pytest.raises(ExpressionError, match="is divided by zero"):
            evaluate(parse(text))
    else:
        assert evaluate(parse(text)) == expected


@settings(max_examples=500, deadline=None)
@given(st.text("12+-*/() ", max_size=9))
def test_texts_are_read_exactly_where_python_reads_them_without_signs(text):
    # '//' and '**' are operators of Python's, and signs are no ast.BinOp
    kinds = (ast.Expression, ast.BinOp, ast.Constant, *OPERATORS)
    try:
        tree = ast.parse(text.strip(), mode="eval")
        readable = all(isinstance(n, kinds) for n in ast.walk(tree))
    except SyntaxError:
        readable = False
    try:
        parse(text)
    except ExpressionError:
        assert not readable
    else:
        assert readable


def test_every_short_text_gives_a_value_or_our_error():
    for text in map("".join, itertools.product("1+-/()$", repeat=4)):
        with contextlib.suppress(ExpressionError):
            evaluate(parse(text))


def test_postfix_order():
    assert parse("2*(3+4)") == (2, 3, 4, "+", "*")
    assert parse("8-2-1") == (8, 2, "-", 1, "-")
    assert evaluate(parse("1/3+1/6")) == Fraction(1, 2)
    # deep brackets need no recursion
    assert evaluate(parse("(" * 499 + "7" + ")" * 499)) == 7


def test_texts_that_are_no_expression(refused):
    for text, message in {
        "": r"character 1 is the end; expected a number or '\('",
        "3+": r"character 3 is the end; expected a number",
        "-3": r"character 1 is '-'; expected a number",
        "3 4": r"character 3 is '4'; expected an operator, '\)' or the end",
        "3(4)": r"character 2 is '\('; expected an operator",
        "3)": r"character 2 is '\)'; expected an operator",
        "()": r"character 2 is '\)'; expected a number",
        "(3+4": r"a bracket of '\(3\+4' is never closed",
        "3**4": r"character 3 is '\*'; expected a number",
        "1.5": r"character 2 is '\.'",
        "__import__('os')": r"character 1 is '_'",
        "٣+4": r"character 1 is '٣'",
        "1" * 10: r"number at character 1 has 10 digits; at most 9",
        "1+" * 501 + "1": r"has 1003 characters; at most 1000",
    }.items():
        refused(message, parse, text, error=ExpressionError)


def test_rules_of_the_countdown(refused):
    check_countdown("(25 - 7) * 3", (3, 25, 7), 54)
    check_countdown("7*7", (7, 7, 2), 49)
    check_countdown("8/(3-8/3)", (3, 3, 8, 8), 24)
    check_countdown("10/4*2", (10, 4, 2), 5)  # through a fraction
    for text, message in (
        ("3*25-7", "the value is 68, not 54"),
        ("7/3", "the value is 7/3, not 54"),
        ("7*7+5", r"7 is used 1 time\(s\) more often than .* numbers 3, 25, 7"),
        ("54", r"54 is used 1 time\(s\) more"),
        ("3/(7-7)", "7 is used"),
        ("54=54", "character 3 is '='"),
    ):
        refused(message, check_countdown, text, (3, 25, 7), 54, error=ExpressionError)
    by_zero = "3/(7-7)", (3, 7, 7), 1
    refused("3 is divided by zero", check_countdown, *by_zero, error=ExpressionError)


@pytest.mark.parametrize(
    "alike",
    [
        ("3*(25-7)", "(25-7)*3", "((25-7))*3"),
        ("9-(5-2)", "2+(9-5)", "(9+2)-5", "9-5+2"),
        ("8/(4/2)", "8*2/4", "2/4*8"),
        ("2*(3*4)+1", "1+4*2*3"),
        ("1-(2-(3-4))", "1-2+3-4"),
    ],
)
def test_orders_of_sums_and_products_are_one_form(alike):
    assert len({canonical(text) for text in alike}) == 1
    assert len({evaluate(parse(text)) for text in alike}) == 1


def test_other_ways_are_other_forms():
    """Equal values by other numbers, operators or pairings are told apart."""
    ways = ["6*4", "4*(5+1)", "4*5+4", "3*8", "24", "30-6", "6-30", "(5+1)*(3+1)"]
    assert len({canonical(text) for text in ways}) == len(ways)
    assert canonical("6-30") != canonical("30-6")
    with pytest.raises(ExpressionError):
        canonical("6*")


@settings(max_examples=200, deadline=None)
@given(expressions)
def test_a_form_has_the_value_of_its_expression(text):
    form = canonical(text)
    for bracket in ("(+", "(-", "(*", "(/"):  # the operator of a first operand
        form = form.replace(bracket, f"({int(bracket[1] in '*/')}{bracket[1]}")
    with contextlib.suppress(ZeroDivisionError):
        assert value_by_python(form) == value_by_python(text)
