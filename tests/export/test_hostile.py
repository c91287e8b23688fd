"""Files of unknown origin, made to break or take over who opens them: one clear line, and nothing in them runs."""

import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

import rescompress as rc
from rescompress.cli import main
from rescompress.export import load, read_header
from rescompress.export.bundle import HEADER_NAME, MAX_HEADER_BYTES, header_text
from rescompress.export.pickles import MOST_NESTED, PickleError, check_pickle
from rescompress.export.seal import seal
from tests.export.making import rewrite

SUFFIXES = [".pt", ".pt2", ".onnx", pytest.param(".aoti.pt2", marks=pytest.mark.slow)]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SPEC = {"header_schema": 1, "spec": {"steps": []}}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Return an honest file of the asked suffix, written once."""
    folder = tmp_path_factory.mktemp("honest")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    torch.save((X, model(X).detach()), folder / "example")

    def written(suffix):
        path = folder / f"small{suffix}"
        return path if path.exists() else rc.export(model, path, X)

    return written


def assert_refused(path, capsys, *, header_too=True):
    """load, read_spec and inspect: an InputError of one line each; the command line ends without a traceback."""
    for read in (load, read_header, rc.read_spec) if header_too else (load,):
        with pytest.raises(rc.InputError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    if header_too:
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: ") and len(shown.err.splitlines()) == 1


def changed(member, old, new):
    """Return what replaces bytes in one member, for `rewrite`; it must find them."""

    def change(name, data):
        if name == member:
            assert old in data
        return data.replace(old, new) if name == member else data

    return change


FLIPPING = """
import logging, pathlib, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
import torch
import rescompress as rc
torch.set_num_threads(1)
folder, count = pathlib.Path(sys.argv[1]), 0
x, wanted = torch.load(folder / "example")
for path in sorted(folder.glob("flipped-*")):
    print(path.name, file=sys.stderr)
    try:
        program = rc.load(path)
    except rc.InputError as error:
        assert "\\n" not in str(error)
        count += 1
        continue
    torch.testing.assert_close(program(x), wanted, rtol=1e-4, atol=1e-4)
print(count)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flipped_bit_is_refused_or_changes_nothing_and_never_ends_the_process(suffix, honest, tmp_path):
    source, generator = honest(suffix), random.Random(0)
    data = source.read_bytes()
    (tmp_path / "example").write_bytes((source.parent / "example").read_bytes())
    # As many at the start and the end, where the structure is, as anywhere.
    places = [generator.randrange(len(data)) for _ in range(140)]
    places += [generator.randrange(min(300, len(data))) for _ in range(20)]
    places += [len(data) - 1 - generator.randrange(min(1200, len(data))) for _ in range(40)]
    for number, place in enumerate(places):
        bad = bytearray(data)
        bad[place] ^= 1 << generator.randrange(8)
        (tmp_path / f"flipped-{number}{suffix}").write_bytes(bad)

    ran = subprocess.run([sys.executable, "-c", FLIPPING, tmp_path], capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout.splitlines()[-1]) > 100


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0, 1, 21, 22, 0.1, 0.5, 0.95, -23, -1])
def test_a_truncated_file_is_refused(suffix, kept, honest, tmp_path, capsys):
    data = honest(suffix).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])

    # The header of an ONNX file may lie before the cut.
    assert_refused(path, capsys, header_too=suffix != ".onnx" or kept != -1)


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx", ".aoti.pt2"])
def test_what_is_no_file_is_refused_without_waiting(suffix, tmp_path, capsys):
    path = tmp_path / f"a{suffix}"
    os.mkfifo(path)
    assert_refused(path, capsys)
    path.unlink()
    path.symlink_to(path)
    assert_refused(path, capsys)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert_refused(path, capsys)
    path.unlink()
    assert_refused(path, capsys)
    path.mkdir()
    assert_refused(path, capsys)
    assert_refused(tmp_path / f"{'a' * 300}{suffix}", capsys)


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx", ".aoti.pt2"])
def test_files_of_others_are_refused(suffix, tmp_path, bait, capsys):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pickle.dumps(bait))
    assert_refused(path, capsys)
    torch.save({"a": bait}, path)
    assert_refused(path, capsys)
    torch.save({"a": bait}, path, _use_new_zipfile_serialization=False)
    assert_refused(path, capsys)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert_refused(path, capsys)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert_refused(path, capsys)


def test_an_archive_with_another_one_before_it_is_refused(honest, tmp_path, capsys):
    data = honest(".pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data + data)  # zipfile takes the second, a reader that trusts offsets the first
    assert_refused(tmp_path / "a.pt", capsys, header_too=False)
    (tmp_path / "b.pt").write_bytes(data[:-2] + struct.pack("<H", 4) + b"more")
    assert_refused(tmp_path / "b.pt", capsys, header_too=False)


def test_bombs_are_not_unpacked(tmp_path, capsys):
    header = json.dumps({**SPEC, "format": "torchscript"})
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/extra/rescompress.json", header)
        for number in range(3):  # each under the limit, not their sum
            archive.writestr(f"a/code/m{number}.py", bytes(30_000_000))
    assert_refused(tmp_path / "a.pt", capsys, header_too=False)
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/extra/rescompress.json", header + " " * MAX_HEADER_BYTES)
    assert_refused(tmp_path / "b.pt", capsys)


def test_a_member_that_claims_to_be_huge_is_refused(honest, tmp_path, capsys):
    data = bytearray(honest(".pt").read_bytes())
    at = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)  # the second member, as the header is the first
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    (tmp_path / "a.pt").write_bytes(data)

    assert_refused(tmp_path / "a.pt", capsys, header_too=False)


@pytest.mark.parametrize("deep", ['{"a":' * 500 + "1" + "}" * 500, "[" * 500 + "]" * 500, "[" * 200_000])
def test_a_deeply_nested_header_is_refused(deep, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr(
            "a/extra/rescompress.json", f'{{"header_schema": 1, "spec": {{"steps": []}}, "report": {deep}}}'
        )

    assert_refused(tmp_path / "a.pt", capsys)


def test_a_report_that_could_not_be_read_back_is_not_written():
    report: dict = {}
    for _ in range(200):
        report = {"a": report}

    with pytest.raises(rc.ExportError, match="nested deeper than 100"):
        header_text({"report": report})


def test_an_onnx_file_of_nothing_but_fields_is_not_read_for_hours(tmp_path, capsys):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x01" * 3_000_000)

    assert_refused(tmp_path / "a.onnx", capsys)


SCRIPTS = {
    "file": ("(input)", "(torch.from_file(torch.str(input)))", "touches files"),
    "library": ("(input)", "(ops.image.read_file(input))", "'image', which are not known to only compute"),
    "class": ("(input)", "(__torch__.torch.classes.c10d.ProcessGroup(input))", "makes objects of 'c10d'"),
    "deep": ("(input)", "(" + "(" * 300 + "input" + ")" * 300 + ")", "nested deeper than"),
    "deeper": ("(input)", "(input" + "+input" * 30_000 + ")", "nested deeper than"),
    "chain": ("(input)", "(input" + " and input" * 30_000 + ")", "nested deeper than"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_torchscript_that_calls_what_it_should_not_is_refused(script, honest, tmp_path, bait):
    old, new, said = SCRIPTS[script]

    def change(name, data):
        return data.replace(b"torch.relu" + old.encode(), b"torch.relu" + new.encode())

    path = rewrite(honest(".pt"), tmp_path / "a.pt", change)

    with pytest.raises(rc.InputError, match=said):
        load(path)


def class_of_relu(path):
    """Return what the file calls the class: a number is put in where earlier programs had one of that name."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    return re.search(rb"__torch__\.torch\.nn\.modules\.activation[\w.]*\nReLU\n", data)[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (b"posix\nmkdir\n", "names 'posix mkdir'"),
        (b"__torch__.torch.classes.c10d\nProcessGroup\n", "names '__torch__.torch.classes.c10d ProcessGroup'"),
        (b"builtins\neval\n", "names 'builtins eval'"),
    ],
)
def test_torchscript_objects_of_other_classes_are_refused(name, said, honest, tmp_path):
    file = honest(".pt")
    path = rewrite(file, tmp_path / "a.pt", changed("data.pkl", class_of_relu(file), name))

    with pytest.raises(rc.InputError, match=said):
        load(path)


def test_objects_nested_beyond_the_stack_are_refused(honest, tmp_path):
    deep = b"(" * 500_000 + b"t" * 500_000  # torch.jit.load ends the process on this
    path = rewrite(honest(".pt"), tmp_path / "a.pt", changed("data.pkl", b"\x80\x02", b"\x80\x02" + deep))

    with pytest.raises(rc.InputError, match=f"nested deeper than {MOST_NESTED}"):
        load(path)


@pytest.mark.parametrize("data", [b"", b".", b"\x80\x02}", b"\x80\x02tttuR.", b"h\x05.", b"r\xff\xff\xff\xff."])
def test_a_broken_pickle_is_an_error(data):
    with pytest.raises(PickleError, match="no whole pickle"):
        check_pickle(data)


def test_an_honest_pickle_is_none():
    check_pickle(pickle.dumps({"a": [1, (2.0, None)], "b": ([], {})}, protocol=2))


@pytest.mark.parametrize("key", ["sizes", "strides", "storage_offset"])
@pytest.mark.parametrize(
    "lie", [{"as_int": 2**30}, {"as_int": -5}, {"as_expr": {"expr_str": "__import__('os').mkdir('RAN')"}}]
)
def test_weights_that_lie_about_their_place_are_refused(key, lie, honest, tmp_path, bait):
    def change(name, data):
        if name != "data/weights/model_weights_config.json":
            return data
        config = json.loads(data)
        meta = next(iter(config["config"].values()))["tensor_meta"]
        meta[key] = lie if key == "storage_offset" else [lie] * len(meta[key])
        return json.dumps(config)

    with pytest.raises(rc.InputError, match=r"damaged|refused"):
        load(rewrite(honest(".pt2"), tmp_path / "a.pt2", change))


def with_onnx(honest, tmp_path, change):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(honest(".onnx"))
    del model.metadata_props[-1]
    change(onnx, model)
    onnx.save(model, tmp_path / "a.onnx")
    seal(tmp_path / "a.onnx")
    return tmp_path / "a.onnx"


def external(onnx, model):
    """In a function, which is not in the graph."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(onnx.helper.make_function("own", "f", [], ["c"], [node], model.opset_import))


def foreign_operator(_onnx, model):
    model.graph.node[0].domain = "evil.corp"


def compiled_context(_onnx, model):
    model.graph.node[0].domain, model.graph.node[0].op_type = "com.microsoft", "EPContext"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (external, "refers to other files"),
        (foreign_operator, "calls 'evil.corp::Conv', which is not known"),
        (compiled_context, "calls 'com.microsoft::EPContext', which is not known"),
    ],
)
def test_onnx_models_that_reach_outside_are_refused(change, said, honest, tmp_path):
    with pytest.raises(rc.InputError, match=said):
        load(with_onnx(honest, tmp_path, change))


def test_a_changed_onnx_file_is_refused_until_it_is_sealed_again(honest, tmp_path):
    path = with_onnx(honest, tmp_path, lambda onnx, model: None)
    x, wanted = torch.load(honest(".onnx").parent / "example")
    torch.testing.assert_close(load(path)(x), wanted, rtol=1e-4, atol=1e-5)

    path.write_bytes(path.read_bytes()[:-1] + b"0")

    with pytest.raises(rc.InputError, match="its checksum is not that of its content"):
        load(path)


def test_a_package_with_a_pickle_in_it_is_refused(tmp_path, bait):
    stream = io.BytesIO()
    torch.save(bait, stream)
    header = header_text({"format": "aotinductor", "spec": {"steps": []}})
    with zipfile.ZipFile(tmp_path / "a.aoti.pt2", "w") as archive:
        archive.writestr(f"a/extra/{HEADER_NAME}", header)
        archive.writestr("a/data/constants/model.pt", stream.getvalue())

    with pytest.raises(rc.InputError, match=r"'a/data/constants/model\.pt', which no aotinductor file"):
        load(tmp_path / "a.aoti.pt2")
