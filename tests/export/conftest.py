"""What tests of untrusted files share: a bait that shows whether something in a file was executed."""

import os

import pytest


class Bait:
    def __reduce__(self):
        return os.mkdir, ("RAN",)


@pytest.fixture
def bait(tmp_path, monkeypatch):
    """What pickled code would create; nothing that is looked at or loaded may."""
    monkeypatch.chdir(tmp_path)
    yield Bait()
    assert not (tmp_path / "RAN").exists(), "something in the file was executed"
