"""Example inputs are read as torch.export reads them, and take another batch size."""

import pytest
import torch
from torch.testing import assert_close

from rescompress.errors import InputError
from rescompress.inputs import as_args, batch_size_of, with_batch

X = torch.arange(6.0).reshape(2, 3)


def test_every_kind_of_example_input_becomes_arguments() -> None:
    assert as_args(X) == ((X,), {})
    assert as_args((X, 3)) == ((X, 3), {})
    assert as_args(((X,), {"mask": None})) == ((X,), {"mask": None})
    assert as_args({"pixels": X}) == ((), {"pixels": X})
    # A tensor before a dict: the dict is the second argument, not keyword arguments.
    options = {"a": 1}
    assert as_args((X, options)) == ((X, options), {})


def test_another_kind_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"got list; wrap a single argument as \(argument,\)"):
        as_args([X])


def test_samples_are_repeated_in_turn_or_left_out() -> None:
    (more, other), kwargs = with_batch(((X, 7), {"mask": X[:, 0]}), 5)
    assert_close(more, X[[0, 1, 0, 1, 0]])
    assert other == 7
    assert_close(kwargs["mask"], X[:, 0][[0, 1, 0, 1, 0]])
    assert_close(with_batch((X,), 1)[0], X[:1])


def test_what_has_no_batch_dimension_is_kept() -> None:
    scale, table = torch.tensor(2.0), torch.ones(7, 2)
    args = with_batch((X, scale, table), 4)
    assert args[1] is scale
    assert args[2] is table


def test_channels_last_stays() -> None:
    x = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    (y,) = with_batch((x,), 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, x.repeat(2, 1, 1, 1))


@pytest.mark.parametrize(("args", "n"), [((X,), 0), ((3,), 2), (([X, X],), 2), ((X[:0],), 2)])
def test_an_impossible_batch_is_refused(args: tuple[object, ...], n: int) -> None:
    with pytest.raises(InputError):
        with_batch(args, n)


def test_batch_size_is_that_of_the_first_tensor_with_a_dimension() -> None:
    assert batch_size_of((torch.tensor(1.0), X)) == 2
