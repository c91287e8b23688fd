"""Where a file may be written is known before the work, and an old file stays until the new one is whole."""

import os
from pathlib import Path

import pytest

from rescompress.errors import ExportError
from rescompress.export import paths
from rescompress.export.paths import check_writable, replacing, suffix_of


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("small", r"known: \.pt \(TorchScript\)"),
        ("small.engine", "names no format"),
        (".onnx", "names no format"),
        ("small.ptt", "did you mean '.pt'"),
        ("none/small.pt", "create it first"),
        ("folder.pt", "it is a folder"),
        ("file.txt/small.pt", "is not a folder"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_with_the_reason(tmp_path, name, said):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "file.txt").touch()

    with pytest.raises(ExportError, match=said):
        check_writable(tmp_path / name)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even the superuser may write to")
def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(ExportError, match="not writable"):
        check_writable("/proc/self/small.pt")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.pt", ".pt"),
        ("a.b.PT2", ".pt2"),
        ("a.aoti.pt2", ".aoti.pt2"),
        (".aoti.pt2", ".pt2"),
        ("a.onnx", ".onnx"),
        ("a.pth", None),
    ],
)
def test_the_longest_suffix_names_the_format(name, suffix):
    assert suffix_of(Path(name)) == suffix


def test_missing_tools_are_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")

    with pytest.raises(ExportError, match=r"needs onnxscript; pip install 'rescompress\[onnx\]'"):
        check_writable(tmp_path / "a.onnx")
    with pytest.raises(ExportError, match=r"no 'no-such-compiler'; install"):
        check_writable(tmp_path / "a.aoti.pt2")
    assert check_writable(tmp_path / "a.pt2") == tmp_path / "a.pt2"
    assert os.listdir(tmp_path) == []


def test_checking_leaves_no_trace(tmp_path):
    old = tmp_path / "small.pt"
    old.write_bytes(b"old")

    assert check_writable(str(old)) == old

    assert os.listdir(tmp_path) == ["small.pt"]
    assert old.read_bytes() == b"old"


def test_a_failure_keeps_the_old_file_and_nothing_else(tmp_path):
    old = tmp_path / "small.pt"
    old.write_bytes(b"old")

    with pytest.raises(RuntimeError, match="halfway"), replacing(old) as new:
        new.write_bytes(b"half")
        raise RuntimeError("halfway")

    assert os.listdir(tmp_path) == ["small.pt"]
    assert old.read_bytes() == b"old"


def test_success_replaces_the_file_behind_a_link(tmp_path):
    target, link = tmp_path / "target.pt", tmp_path / "link.pt"
    target.write_bytes(b"old")
    link.symlink_to(target)

    with replacing(link) as new:
        new.write_bytes(b"new")

    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["link.pt", "target.pt"]


def test_an_error_of_the_file_system_is_an_export_error(tmp_path):
    with pytest.raises(ExportError, match="cannot write"), replacing(tmp_path / "small.pt"):
        pass  # nothing was written, so there is nothing to put in place
