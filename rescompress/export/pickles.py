"""Look at a pickle without loading it: which names it asks for, and how deep its objects are nested.

TorchScript keeps its objects in pickles, which a reader in C++ loads. That reader runs no Python, but it makes objects
of any C++ class that is registered, and ends the whole process on objects nested a hundred thousand deep.
"""

import pickletools
import re
from typing import Any

NAMES = re.compile(
    r"__torch__(\.(?!torch\.classes\.)[\w.]+)? \w+"  # classes whose source is in the same file
    r"|__torch__\.torch\.classes\.(quantized|mkldnn|xnnpack)(\.\w+)* \w+"  # packed weights
    r"|torch\._utils _rebuild_(tensor_v2|qtensor|parameter)|torch \w+Storage|torch per_(tensor|channel)_affine"
    r"|torch device|torch\.jit\._pickle (build_\w+|restore_type_tag)|collections OrderedDict",
    re.ASCII,
)
"""Module and name of all that the pickles in a TorchScript file of ours name."""

MOST_NESTED = 1000
"""A module within a module takes three levels; the reader's stack holds some ten thousand."""

_MARK = -1
"""Stands on the stack where a mark does; every object is there as how deep it is nested."""


class PickleError(ValueError):
    """A pickle is malformed or asks for more than it should."""


def check_pickle(data: bytes) -> None:
    """Refuse a pickle that names what is not in `NAMES`, or nests its objects deeper than `MOST_NESTED`.

    Raises:
        PickleError: it does, or is no whole pickle.
    """
    stack: list[int] = []
    memo: dict[Any, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and NAMES.fullmatch(str(argument)) is None:
                raise PickleError(f"it names {str(argument)[:80]!r}")
            if opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[argument] = stack[-1]
            elif opcode.name == "MARK":
                stack.append(_MARK)
            else:
                _apply(opcode, stack)
    except PickleError:
        raise
    except (ValueError, KeyError, IndexError) as error:
        raise PickleError(f"it is no whole pickle ({type(error).__name__})") from error


def _apply(opcode: pickletools.OpcodeInfo, stack: list[int]) -> None:
    """Take from the stack what the opcode takes, and put one level more for what it makes of that."""
    taken = [0]
    for kind in reversed(opcode.stack_before):
        if kind is pickletools.stackslice:
            while stack[-1] != _MARK:
                taken.append(stack.pop())
        else:
            taken.append(stack.pop())
    depth = max(taken) + 1
    if depth > MOST_NESTED:
        raise PickleError(f"its objects are nested deeper than {MOST_NESTED}")
    stack += [depth] * len(opcode.stack_after)
