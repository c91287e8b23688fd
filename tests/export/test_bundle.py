"""A header is read from anything that was written, and from nothing else."""

import json
import struct
import subprocess
import sys
import zipfile

import pytest

from rescompress.errors import ExportError, InputError
from rescompress.export import read_header, read_spec
from rescompress.export.bundle import HEADER_SCHEMA, MAX_HEADER_BYTES, header_text
from rescompress.spec import Spec

SPEC = {"schema": 1, "steps": [{"kind": "stem_resize", "scale": 0.5}]}
HEADER = {"header_schema": HEADER_SCHEMA, "spec": SPEC, "versions": {"torch": "2.15"}}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def test_header_and_spec_come_back(tmp_path):
    path = write_zip(
        tmp_path / "a.pt", [("a/data.pkl", b""), ("a/extra/rescompress.json", header_text({"spec": SPEC}))]
    )

    assert read_header(path) == {"header_schema": HEADER_SCHEMA, "spec": SPEC}
    assert read_spec(str(path)) == Spec.from_dict(SPEC)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a/data.pkl", b"x")], "did not write it"),
        ([("a/extra/other.json", b"{}")], "did not write it"),
        ([("rescompress.json", json.dumps(HEADER))], "did not write it"),
        ([("a/extra/rescompress.json", b"\xff\xfe")], "damaged"),
        ([("a/extra/rescompress.json", b"{")], "not JSON"),
        ([("a/extra/rescompress.json", b"[" * 200_000)], "not JSON"),
        ([("a/extra/rescompress.json", b"[]")], "no spec"),
        ([("a/extra/rescompress.json", b'{"header_schema": 1, "spec": 3}')], "no spec"),
        ([("a/extra/rescompress.json", json.dumps({**HEADER, "header_schema": 99}))], "upgrade rescompress"),
        ([("a/extra/rescompress.json", "{}"), ("b/extra/rescompress.json", "{}")], "2 headers"),
    ],
)
def test_a_zip_without_an_honest_header_is_refused(tmp_path, members, said):
    path = write_zip(tmp_path / "a.pt", members)

    with pytest.raises(InputError, match=said) as caught:
        read_header(path)

    assert "\n" not in str(caught.value)


def test_a_spec_of_unknown_methods_is_refused(tmp_path):
    header = {**HEADER, "spec": {"steps": [{"kind": "stem_resise"}]}}
    path = write_zip(tmp_path / "a.pt", [("a/extra/rescompress.json", json.dumps(header))])

    with pytest.raises(InputError, match="did you mean 'stem_resize'"):
        read_spec(path)


@pytest.mark.parametrize("steps", ['[{"kind": [1]}]', "[" * 90 + "]" * 90, '[{"kind": "stem_resize", "scale": {}}]'])
def test_a_spec_of_the_wrong_form_is_one_clear_error(tmp_path, steps):
    header = f'{{"header_schema": 1, "spec": {{"steps": {steps}}}}}'
    path = write_zip(tmp_path / "a.pt", [("a/extra/rescompress.json", header)])

    with pytest.raises(InputError, match=r"a\.pt holds a spec that cannot be read") as caught:
        read_spec(path)

    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_zip_is_refused(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"a\.pt is (empty|damaged)"):
        read_header(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.pt", [("a/extra/rescompress.json", json.dumps(HEADER)), ("a/w", bytes(5000))])
    path.write_bytes(path.read_bytes()[:3000])

    with pytest.raises(InputError, match="damaged"):
        read_header(path)


def test_a_damaged_member_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.pt", [("a/extra/rescompress.json", json.dumps(HEADER) * 3)], zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[60:70] = bytes(10)
    path.write_bytes(data)

    with pytest.raises(InputError, match="damaged"):
        read_header(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_header(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is a folder"):
        read_header(tmp_path)


@pytest.mark.parametrize("lies", [False, True])
def test_a_bomb_is_not_unpacked(tmp_path, lies):
    bomb = json.dumps(HEADER) + " " * (MAX_HEADER_BYTES + 1)
    path = write_zip(tmp_path / "a.pt", [("a/extra/rescompress.json", bomb)], zipfile.ZIP_DEFLATED)
    if lies:  # the central directory claims ten bytes
        data = bytearray(path.read_bytes())
        at = data.rindex(b"PK\x01\x02") + 24
        data[at : at + 4] = struct.pack("<I", 10)
        path.write_bytes(data)

    with pytest.raises(InputError, match=r"larger than|damaged"):
        read_header(path)


def test_a_header_that_could_not_be_read_back_is_not_written():
    with pytest.raises(ExportError, match="JSON"):
        header_text({"report": {"macs": float("nan")}})
    with pytest.raises(ExportError, match="JSON"):
        header_text({"report": {"macs": object()}})
    with pytest.raises(ExportError, match="shorter report"):
        header_text({"labels": ["x" * MAX_HEADER_BYTES]})


def test_a_header_is_read_without_torch(tmp_path):
    header = {**HEADER, "spec": {"steps": []}}
    path = write_zip(tmp_path / "a.pt", [("a/extra/rescompress.json", json.dumps(header))])
    code = "import sys; from rescompress.export import read_header, read_spec\n"
    code += f"read_header({str(path)!r}); read_spec({str(path)!r}); sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
