"""Small files are written whole or not at all, and what cannot be written is said with a remedy."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from rescompress.errors import RescompressError, WriteError
from rescompress.files import whole, write_whole

BIG = "x" * 5000


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 2000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_holds_the_text_as_it_is_in_a_folder_that_is_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a/b/file.csv"

    for text in ("eins,\u00e4\r\nzwei\n", "later\n"):
        write_whole(path, text)
        assert path.read_bytes() == text.encode()

    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_file_and_no_part_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")

    with pytest.raises(WriteError) as raised:
        write_whole(path, BIG)

    assert str(raised.value) == f"cannot write {path}: File too large; free some space and run the same command again"
    assert isinstance(raised.value, RescompressError) and isinstance(raised.value, OSError)
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"file.json": "old"}


@pytest.mark.usefixtures("full_disk")
def test_what_mends_it_can_be_said_otherwise(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"; free some space and the next epoch writes all rows$"):
        write_whole(tmp_path / "file", BIG, retry="the next epoch writes all rows")


def test_a_place_that_is_no_folder_is_not_mended_by_space(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(WriteError, match=r"cannot write .*file/a: .*; give a place that can be written to and run"):
        write_whole(tmp_path / "file/a", "text")


def test_what_is_no_failure_of_the_disk_is_raised_as_it_was_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "\ud800")
    with pytest.raises(KeyError), whole(tmp_path / "file") as part:
        part.write_text("half")
        raise KeyError

    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_into_each_others_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with whole(path) as part:
        part.write_text("of this one")
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: -1)
            write_whole(path, "of the other")
        assert path.read_text() == "of the other"

    assert path.read_text() == "of this one"
    assert list(tmp_path.iterdir()) == [path]
