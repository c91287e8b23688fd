"""load opens what export wrote, and refuses everything else without running any of it."""

import io
import json
import pickle
import re
import shutil
import warnings
import zipfile

import pytest
import torch
from torch import nn

import rescompress as rc
from rescompress.export import load, read_header
from rescompress.export.bundle import HEADER_NAME, header_text
from rescompress.export.seal import seal
from rescompress.export.untrusted import is_arithmetic
from tests.export.making import rewrite

SUFFIXES = [".pt", ".pt2", ".onnx"]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Honest files of every format that needs no compiler."""
    folder = tmp_path_factory.mktemp("honest")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    for suffix in SUFFIXES:
        rc.export(model, folder / f"small{suffix}", X)
    with torch.no_grad():
        torch.save(model.eval()(X), folder / "outputs")
    return folder


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_written_file_is_loaded_as_a_module_in_evaluation_mode(suffix, folder):
    program = load(folder / f"small{suffix}")

    assert isinstance(program, nn.Module)
    assert not program.train().training and not program.eval().training
    assert program.header == read_header(folder / f"small{suffix}")
    assert program.spec == rc.Spec()
    torch.testing.assert_close(program(X), torch.load(folder / "outputs"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_content_tells_the_format(suffix, folder, tmp_path):
    shutil.copy(folder / f"small{suffix}", tmp_path / "renamed")

    torch.testing.assert_close(load(tmp_path / "renamed")(X), torch.load(folder / "outputs"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0, 3, 0.3, 0.9, -1])
def test_a_truncated_file_is_refused(suffix, kept, folder, tmp_path):
    data = (folder / f"small{suffix}").read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])

    for read in (load, read_header, rc.read_spec):
        with pytest.raises(rc.InputError, match=r"empty|damaged|no header") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_flipped_bit_in_the_weights_is_found(suffix, folder, tmp_path):
    source = folder / f"small{suffix}"
    with zipfile.ZipFile(source) as archive:
        info = next(one for one in archive.infolist() if one.filename.endswith(("/data/0", "weight_0")))
    data = bytearray(source.read_bytes())
    data[info.header_offset + 200] ^= 1
    (tmp_path / f"bad{suffix}").write_bytes(data)

    with pytest.raises(rc.InputError, match="damaged"):
        load(tmp_path / f"bad{suffix}")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".aoti.pt2"])
@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07not a model", b"PK\x03\x04" + bytes(50)])
def test_a_foreign_file_is_refused(suffix, content, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(content)

    for read in (load, read_header):
        with pytest.raises(rc.InputError, match=r"empty|damaged|no header"):
            read(tmp_path / f"a{suffix}")


def test_files_of_torch_itself_are_refused(tmp_path, bait):
    torch.save({"a": bait}, tmp_path / "a.pt")
    torch.export.save(torch.export.export(nn.ReLU(), (X,)), tmp_path / "a.pt2")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(bait))

    for name in ("a.pt", "a.pt2", "b.pt"):
        with pytest.raises(rc.InputError, match=r"no header|damaged"):
            load(tmp_path / name)


@pytest.mark.parametrize("kind", ["torchscript", "torch.export", "aotinductor", "onnx", "unknown", None, ["onnx"]])
def test_a_pickle_with_our_header_is_refused(kind, tmp_path, bait):
    stream = io.BytesIO()
    torch.save({"a": bait}, stream)
    (tmp_path / "plain.pt").write_bytes(stream.getvalue())
    header = header_text({"format": kind, "spec": {"steps": []}})
    path = rewrite(tmp_path / "plain.pt", tmp_path / "small.pt2", add=[(f"extra/{HEADER_NAME}", header)])

    with pytest.raises(rc.InputError):
        load(path)


def evil_pickle(bait):
    stream = io.BytesIO()
    torch.save(bait, stream)
    return stream.getvalue()


def test_pickled_parts_of_a_program_are_refused(folder, tmp_path, bait):
    source, evil = folder / "small.pt2", evil_pickle(bait)

    def with_pickle(part, path_name):
        def change(name, data):
            if name != f"data/{part}/model_{part}_config.json":
                return data
            entry = {"path_name": path_name, "is_param": True, "use_pickle": True, "tensor_meta": None}
            return json.dumps({"config": {"0.weight": entry}})

        return change

    changes = {
        "inputs": (lambda name, data: evil if name == "data/sample_inputs/model.pt" else data, ()),
        "weights": (with_pickle("weights", "weight_9"), [("data/weights/weight_9", evil)]),
        "constants": (with_pickle("constants", "tensor_9"), [("data/constants/tensor_9", evil)]),
        "objects": (with_pickle("constants", "custom_obj_9"), [("data/constants/custom_obj_9", evil)]),
        "opaque": (with_pickle("constants", "opaque_obj_9"), [("data/constants/opaque_obj_9", pickle.dumps(bait))]),
        "old weights": (lambda name, data: data, [("data/weights/model.pt", evil)]),
        "old constants": (lambda name, data: data, [("data/constants/model.pt", evil)]),
        "other model": (lambda name, data: data, [("models/other.json", b"{}")]),
        "library": (lambda name, data: data, [("data/aotinductor/model/x.wrapper.so", b"\x7fELF")]),
        "twice": (lambda name, data: data, [("models/model.json", b"{}")]),
        "outside": (lambda name, data: data, [("data/weights/../weight_1", b"")]),
    }
    for number, (change, add) in enumerate(changes.values()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns of the duplicate
            path = rewrite(source, tmp_path / f"{number}.pt2", change, add)
        with pytest.raises(rc.InputError, match=r"refused|damaged"):
            load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"Symbol\('s\d+', positive=True, integer=True\)", "__import__('os').mkdir('RAN')"),
        (r"torch\.ops\.aten\.conv2d\.default", "torch.os.mkdir"),
        (r"torch\.ops\.aten\.conv2d\.default", "torch.ops.aten.from_file.default"),
        (r"torch\.ops\.aten\.conv2d\.default", "torch.ops.image.write_file.default"),
        (r"torch\.ops\.aten\.conv2d\.default", "#export:call"),
    ],
)
def test_a_program_that_evaluates_or_calls_other_things_is_refused(old, new, folder, tmp_path, bait):
    found = []

    def change(name, data):
        if name != "models/model.json":
            return data
        text, count = re.subn(old, new, data.decode())
        found.append(count > 0)
        return text

    path = rewrite(folder / "small.pt2", tmp_path / "a.pt2", change)

    assert found == [True]
    with pytest.raises(rc.InputError, match="refused"):
        load(path)


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        ("Mul(Integer(32), Symbol('s77', positive=True, integer=True))", True),
        ("Add(Integer(1), FloorDiv(Add(Symbol('s0', integer=True), Integer(-1)), Integer(2)))", True),
        ("Max(Integer(1), TruncToInt(Mul(Float('0.75', precision=53), ToFloat(Symbol('s53', integer=True)))))", True),
        ("2*s77 + 1", True),
        ("s77 // 2 >= 3", True),
        ("__import__('os')", False),
        ("Symbol('s77').__class__", False),
        ("Symbol('__import__')", False),
        ("Float('__import__')", False),
        ("Integer('s77')", False),
        ("eval(s77)", False),
        ("Mul(*s77)", False),
        ("[s77][0]", False),
        ("(lambda: s77)()", False),
        ("exec", False),
        ("'s77'", False),
        ("", False),
        ("(" * 10_000, False),
    ],
)
def test_arithmetic_is_told_from_code(expression, fine):
    assert is_arithmetic(expression) is fine


class WritesWhenLoaded(nn.Module):
    """TorchScript runs `__setstate__` in torch.jit.load, and has an operator that writes files."""

    def __init__(self):
        super().__init__()
        self.kept = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self):
        return (self.kept, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.kept = state[0]
        self.training = state[1]
        torch.save(self.kept, "RAN")

    def forward(self, x):
        return x + self.kept


def test_torchscript_that_writes_files_is_refused(tmp_path, bait):
    header = header_text({"format": "torchscript", "spec": {"steps": []}})
    torch.jit.save(torch.jit.script(WritesWhenLoaded()), "evil.pt", _extra_files={HEADER_NAME: header})
    # saving runs nothing, loading without looking would
    with pytest.raises(rc.InputError, match="'save', which touches files"):
        load("evil.pt")


def test_torchscript_of_unknown_classes_is_refused(folder, tmp_path, bait):
    path = rewrite(
        folder / "small.pt",
        tmp_path / "a.pt",
        lambda name, data: pickle.dumps(bait, protocol=2) if name == "data.pkl" else data,
    )

    with pytest.raises(rc.InputError, match=r"it names '\w+ mkdir'; refused"):
        load(path)


def test_an_onnx_model_that_names_other_files_is_refused(folder, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "small.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    onnx.save(model, tmp_path / "a.onnx")

    with pytest.raises(rc.InputError, match="its checksum is not that of its content"):
        load(tmp_path / "a.onnx")
    seal(tmp_path / "a.onnx")
    with pytest.raises(rc.InputError, match="refers to other files"):
        load(tmp_path / "a.onnx")


def test_onnx_programs_say_which_inputs_they_take(folder):
    program = load(folder / "small.onnx")

    with pytest.raises(rc.InputError, match="the program takes input; got 2"):
        program(X, X)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(rc.InputError, match="there is no file"):
        load(tmp_path / "none.pt2")
    with pytest.raises(rc.InputError, match="is a folder"):
        load(tmp_path)
