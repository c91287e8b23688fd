"""What the tests of the command line share: a run with its output, and small files to give it."""

import sys
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from rescompress.cli import main


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def warnings(self):
        return [line for line in self.err.splitlines() if line.startswith("warning: ")]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `rescompress` in this process on one thread; tables are as wide as in a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def photo(tmp_path):
    """A small picture with structure in it."""
    pixels = torch.randint(0, 256, (12, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels.numpy()).resize((160, 120), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The temporary folder as the current one; modules imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
