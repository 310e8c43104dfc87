"""Numbers and flags: what passes, what is refused, and that a refusal says all three things."""

from __future__ import annotations

import math

import pytest
import torch

from macrobatch.checks import check_flag, check_integer, check_limit, check_number
from macrobatch.errors import ArgumentError


@pytest.mark.parametrize("value", [0, -1, 2.0, 2.5, math.nan, True, "4", None, [4]])
def test_what_is_no_integer_from_one_is_refused(value: object):
    with pytest.raises(
        ArgumentError, match=r"num: given .*; expected an integer >= 1\. To fix it, pass num=8"
    ) as raised:
        check_integer("num", value, fix="pass num=8")
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize(
    ("value", "at_least", "or_none"), [(1, 1, False), (0, 0, False), (10**20, 1, False), (None, 1, True)]
)
def test_integers_pass(value: object, at_least: int, or_none: bool):
    check_integer("num", value, fix="pass num=8", at_least=at_least, or_none=or_none)


def test_none_is_not_zero():
    with pytest.raises(ArgumentError, match="an integer >= 0 or None, the seed"):
        check_integer("seed", -1, "the seed", fix="leave it out", at_least=0, or_none=True)


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, True, "1", None])
@pytest.mark.parametrize("is_positive", [False, True])
def test_what_is_no_finite_number_is_refused(value: object, is_positive: bool):
    with pytest.raises(ArgumentError, match="expected a finite number >"):
        check_number("limit", value, is_positive=is_positive, fix="leave it out")


def test_zero_is_not_positive():
    check_number("limit", 0, fix="leave it out")
    check_number("limit", 0.5, is_positive=True, fix="leave it out")
    with pytest.raises(ArgumentError, match="given 0; expected a finite number > 0"):
        check_number("limit", 0, is_positive=True, fix="leave it out")


@pytest.mark.parametrize("value", [0, 1, None, "yes", "False"])
def test_what_is_no_flag_is_refused(value: object):
    check_flag("flag", value=True)
    check_flag("flag", value=False)
    with pytest.raises(ArgumentError, match=r"expected True or False\. To fix it, pass flag=True"):
        check_flag("flag", value)


@pytest.mark.parametrize("value", [0, 1.5, math.inf, torch.tensor(2.0)], ids=str)
def test_limits_pass(value: object):
    check_limit("max_norm", value)


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, True, "1", None, torch.tensor(math.nan)], ids=str)
def test_what_nothing_can_be_clipped_to_is_refused(value: object):
    with pytest.raises(ArgumentError, match="expected a number >= 0, or infinity"):
        check_limit("max_norm", value)
