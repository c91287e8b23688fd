"""What a program computes is compared in number, shape, type and value; nothing else passes for equal."""

import math

import pytest
import torch
from torch import nn

from rescompress.errors import ExportError
from rescompress.export.checking import Case, check, expected_outputs

INPUTS = ((torch.ones(1),), {})


def judge(wanted, got, **more):
    check(lambda _: got, [Case("here", 1, INPUTS, wanted, **more)])


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        (torch.tensor([1.0, 100.0]), torch.tensor([1.005, 100.0])),  # 5e-5 of the largest
        (torch.tensor([1.0, math.nan, math.inf, -math.inf]), torch.tensor([1.0, math.nan, math.inf, -math.inf])),
        (torch.tensor([1.0], dtype=torch.float16), torch.tensor([1.005], dtype=torch.float16)),
        (torch.zeros(2), torch.zeros(2)),
        (torch.tensor([3, 4]), torch.tensor([3, 4])),
        ({"a": torch.ones(2), "b": 3}, (torch.ones(2),)),
        (torch.ones(0, 3), torch.ones(0, 3)),
    ],
)
def test_equal_is_equal(wanted, got):
    judge(wanted, got)


@pytest.mark.parametrize(
    ("wanted", "got", "said"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.01]), "at here .* differ from the model's by 0.005 of their"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]), "by inf of their size"),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]), "by inf of their size"),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf]), "by inf of their size"),
        (torch.zeros(2), torch.full((2,), 1e-3), "differ"),
        (torch.tensor([3, 4]), torch.tensor([3, 5]), "in 1 of 2 values"),
        (torch.ones(2), torch.ones(2, 1), r"gives \(2, 1\) torch.float32 instead of \(2,\)"),
        (torch.ones(2), torch.ones(2).double(), "gives .* torch.float64 instead of"),
        (torch.ones(2), (torch.ones(2), torch.ones(2)), "gives 2 outputs instead of 1"),
    ],
)
def test_different_is_an_error_that_says_how(wanted, got, said):
    with pytest.raises(ExportError, match=said):
        judge(wanted, got)


def test_slack_widens_what_is_equal():
    judge(torch.tensor([1.0]), torch.tensor([1.01]), slack=0.02)
    with pytest.raises(ExportError, match=r"by 0\.03"):
        judge(torch.tensor([1.0]), torch.tensor([1.03]), slack=0.02)


@pytest.mark.parametrize(("batch", "checked"), [(1, [1, 3]), (2, [2, 4, 1])])
def test_other_batches_are_run_where_the_model_takes_them(batch, checked):
    found = expected_outputs(nn.Linear(2, 2), ((torch.randn(batch, 2),), {}), "batch")

    assert [case.batch for case in found] == checked
    for case in found:
        torch.testing.assert_close(case.inputs[0][0].shape[0], case.batch)
