"""Count MACs a second time with fvcore, which reads a traced graph and shares no code with `macs`.

fvcore comes without handlers for attention and for products with a bias matrix or a vector; they are added here. Its
handlers for norms, pooling and interpolation are taken out, because these do not count by convention.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rescompress.errors import MeasureError
from rescompress.inputs import as_args
from rescompress.measure.macs import count_macs, first_line
from rescompress.measure.sandbox import real_copy, undisturbed


@dataclass(frozen=True)
class CrossCheck:
    """The same count by two meters.

    Attributes:
        macs: by `count_macs`
        fvcore_macs: by fvcore
        unsupported: (operator, calls) for which fvcore has no handler; elementwise operations among them
    """

    macs: int
    fvcore_macs: int
    unsupported: tuple[tuple[str, int], ...]

    @property
    def difference(self) -> float:
        """|ours - fvcore's| over fvcore's."""
        if self.fvcore_macs == self.macs:
            return 0.0
        return abs(self.macs - self.fvcore_macs) / self.fvcore_macs if self.fvcore_macs else math.inf


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (_shape(inputs[i]) for i in range(3))
    # Scores for every pair of a query and a key, then their sum over the values; a mask does not change the work.
    pairs = math.prod(query[:-1]) * key[-2]
    return pairs * (query[-1] + value[-1])


def _native_attention(inputs: list[Any], outputs: list[Any]) -> int:
    batch, queries, width = _shape(inputs[0])
    keys = _shape(inputs[1])[1]
    projections = batch * width * width * (2 * queries + 2 * keys)  # query and output, key and value
    return projections + 2 * batch * queries * keys * width


def _native_encoder_layer(inputs: list[Any], outputs: list[Any]) -> int:
    batch, tokens, width = _shape(inputs[0])
    hidden = _shape(inputs[14])[0]  # ffn_weight_1: (hidden, width)
    attention = 4 * batch * tokens * width * width + 2 * batch * tokens * tokens * width
    return attention + 2 * batch * tokens * width * hidden


def _product(first: int) -> Callable[[list[Any], list[Any]], int]:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        a, b = _shape(inputs[first]), _shape(inputs[first + 1])
        return math.prod(a) * (b[-1] if len(b) > 1 else 1)

    return handle


def _matmul(inputs: list[Any], outputs: list[Any]) -> int:
    # By the output, since either side may be broadcast or a vector.
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


_HANDLERS: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::_native_multi_head_attention": _native_attention,
    "aten::_transformer_encoder_layer_fwd": _native_encoder_layer,
    "aten::baddbmm": _product(1),
    "aten::addbmm": _product(1),
    "aten::mv": _product(0),
    "aten::addmv": _product(1),
    "aten::dot": _product(0),
    "aten::matmul": _matmul,
}

_BY_CONVENTION_FREE = (
    "aten::batch_norm",
    "aten::group_norm",
    "aten::layer_norm",
    "aten::instance_norm",
    "aten::upsample_nearest2d",
    "aten::upsample_bilinear2d",
    "aten::adaptive_avg_pool2d",
    "aten::grid_sampler",
)


@contextmanager
def _silent() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("fvcore", "fvcore.nn.jit_analysis")]
    old = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, was in zip(loggers, old, strict=True):
            logger.disabled = was


def crosscheck_macs(model: nn.Module, example_input: Any) -> CrossCheck:
    """Count the MACs of one forward pass by both meters. The model runs once for real, traced.

    Raises:
        MeasureError: fvcore is not installed, keyword arguments were given (its tracer takes none), or the model cannot
            be traced.
    """
    args, kwargs = as_args(example_input)
    if kwargs:
        raise MeasureError(f"fvcore takes positional arguments only, got {sorted(kwargs)}; give a tuple")
    with ExitStack() as stack:
        stack.enter_context(_silent())
        try:
            from fvcore.nn import FlopCountAnalysis
        except ImportError as error:
            raise MeasureError("the second meter needs fvcore; pip install 'rescompress[report]'") from error
        subject = real_copy(model)
        stack.enter_context(undisturbed(subject, args))
        stack.enter_context(torch.no_grad())
        analysis = FlopCountAnalysis(subject, args)
        # A handler of None would leave fvcore's own in place: only another one replaces it.
        analysis.set_op_handle(**_HANDLERS).set_op_handle(**dict.fromkeys(_BY_CONVENTION_FREE, _nothing))
        try:
            total = int(analysis.total())
            unsupported = tuple(sorted(analysis.unsupported_ops().items()))
        except Exception as error:
            raise MeasureError(f"{type(model).__name__} cannot be traced for fvcore: {first_line(error)}") from error
    return CrossCheck(macs=count_macs(model, args).macs, fvcore_macs=total, unsupported=unsupported)
