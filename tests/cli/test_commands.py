"""The other commands, help, exit codes and what reaches the terminal."""

import dataclasses
import json
import subprocess
import sys
import zipfile

import pytest
import torch

import rescompress as rc
from rescompress.cli import _main, console
from rescompress.export import read_header
from rescompress.export.bundle import header_text
from rescompress.measure import count_macs
from rescompress.spec import step_kinds, step_type_of

COMMANDS = ("compress", "measure", "inspect", "methods", "families")


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
def test_help_has_examples(command, run):
    ran = run(*command, "--help")

    assert (ran.code, ran.err) == (0, "")
    assert "examples:\n  rescompress " in ran.out


def test_help_and_inspect_do_not_wait_for_torch(tmp_path):
    code = (
        "import sys; from rescompress.cli import main\n"
        "assert main(['compress', '--help']) == 0 and main(['--version']) == 0 and main(['inspect', 'none']) == 1\n"
        "sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version_as_a_module():
    ran = subprocess.run(
        [sys.executable, "-m", "rescompress.cli", "--version"], capture_output=True, text=True, check=True
    )

    assert ran.stdout == f"rescompress {rc.__version__}\n"


def test_inspect_shows_a_spec_that_this_version_does_not_know_and_does_not_load_torch(tmp_path):
    header = header_text({"spec": {"schema": 1, "steps": [{"kind": "of_tomorrow", "x": 3}]}, "log": 4, "report": []})
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/extra/rescompress.json", header)
    code = f"import sys; from rescompress.cli import main; main(['inspect', {str(tmp_path / 'a.pt')!r}])\n"

    ran = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"], capture_output=True, text=True, check=False
    )

    assert ran.returncode == 0
    assert "- kind: of_tomorrow\n  x: 3\n" in ran.stdout


def test_measure(run):
    table = run("measure", "resnet18", "--random", "--input-size", "64", "--quick", "--modules", "1")
    plain = run("measure", "resnet18", "--random", "--input-size", "64", "--quick", "--json")

    import timm

    macs = count_macs(timm.create_model("resnet18"), torch.zeros(1, 3, 64, 64)).macs
    assert json.loads(plain.out)["macs"] == macs
    assert json.loads(plain.out)["name"] == "timm:resnet18"
    assert f"{macs / 1e6:.3f} M" in table.out
    assert "layer4" in table.out and "layer4.0" not in table.out


def test_inspect(run, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1))
    x = torch.zeros(1, 3, 16, 16)
    path = rc.export(rc.compress(model, scale=0.5, example_input=x), tmp_path / "small.pt", x, labels=["cat"])

    shown, plain = run("inspect", path), run("inspect", path, "--json")

    assert json.loads(plain.out) == read_header(path)
    assert "torchscript, made by torch.jit.script" in shown.out
    assert "float32 [1, 3, 16, 16]" in shown.out
    assert f"torch {torch.__version__}" in shown.out
    spec = shown.out.partition("takes it):\n")[2]
    assert rc.Spec.from_yaml(spec) == rc.read_spec(path)


def test_inspect_does_not_obey_what_a_file_says(run, tmp_path):
    header = {"spec": {"steps": []}, "format": "\x1b[2J\x07", "model": 3, "fold": ["x"], "inputs": [7], "labels": 5}
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/extra/rescompress.json", header_text(header))

    ran = run("inspect", tmp_path / "a.pt")

    assert ran.code == 0
    assert "\x1b" not in ran.out and "\x07" not in ran.out
    assert "no spec: the model is not compressed" in ran.out


def test_methods(run):
    listed, cards = run("methods"), json.loads(run("methods", "--json").out)
    # Other tests of the same process register steps of their own.
    cards = [card for card in cards if not card["kind"].endswith("_for_test")]

    assert [card["kind"] for card in cards] == [kind for kind in step_kinds() if not kind.endswith("_for_test")]
    for card in cards:
        assert card["kind"] in listed.out
        assert card["summary"] and card["families"]
        assert [option["name"] for option in card["options"]] == [
            field.name for field in dataclasses.fields(step_type_of(card["kind"]))
        ]
        assert all(option["meaning"] for option in card["options"]), card["kind"]


def test_one_method(run):
    ran = run("methods", "token_pool")
    options = {line.split()[0]: line.split()[1] for line in ran.out.splitlines() if len(line.split()) > 2}

    assert options["after_block"] == "required"
    assert options["stride"] == "2"
    assert options["mode"] == "avg"
    assert "https://arxiv.org/" in ran.out


def test_families(run):
    listed, data = run("families"), json.loads(run("families", "--json").out)

    assert {family["name"] for family in data} >= {"resnet", "vit", "convolutional"}
    for family in data:
        assert f"{family['name']}: {family['summary']}" in listed.out
        assert set(family["methods"]) <= set(step_kinds())


def raising(error):
    def run_command(_args):
        raise error

    return run_command


def test_an_interruption_is_code_130(run, monkeypatch):
    monkeypatch.setattr("rescompress.cli.families.run", raising(KeyboardInterrupt()))

    ran = run("families")

    assert (ran.code, ran.err) == (130, "error: interrupted\n")


def test_an_unexpected_error_is_one_line_and_debug_shows_where(run, monkeypatch):
    monkeypatch.setattr("rescompress.cli.families.run", raising(ZeroDivisionError("two\nlines")))

    plain, debug = run("families"), run("families", "--debug")

    assert plain.code == debug.code == 1
    assert plain.err == "error: ZeroDivisionError: two lines (unexpected; --debug shows where)\n"
    assert "Traceback" in debug.err and "run_command" in debug.err


def test_a_closed_pipe_is_no_error(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "rescompress.cli", "methods", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()

    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == _main.FAILED


def test_only_our_own_warnings_are_shown(capsys):
    import warnings

    def warn():
        warnings.warn("ours", rc.RescompressWarning, stacklevel=1)
        warnings.warn("ours", rc.RescompressWarning, stacklevel=1)
        warnings.warn("theirs", UserWarning, stacklevel=1)

    with console.messages(debug=False):
        warn()
    plain = capsys.readouterr().err
    with console.messages(debug=True):
        warn()

    assert plain == "warning: ours\n"
    assert capsys.readouterr().err == "warning: ours\nwarning: UserWarning: theirs\n"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bytes"), (999, "999 bytes"), (46_929_189, "46.9 MB"), (2e9, "2.0 GB")]
)
def test_sizes_for_people(number, text):
    assert console.size(number) == text


def test_json_has_no_nan(run, tmp_path):
    spec = '"spec": {"steps": []}, "report": {"ratios": {"macs": NaN, "bytes": [0.5, -Infinity]}}'
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/extra/rescompress.json", f'{{"header_schema": 1, {spec}}}')

    ran = run("inspect", tmp_path / "a.pt", "--json")

    assert json.loads(ran.out)["report"] == {"ratios": {"macs": None, "bytes": [0.5, None]}}
    assert "NaN" not in ran.out


@pytest.mark.parametrize(
    ("redirection", "said"),
    [(">&-", "error: stdout is closed"), ("> /dev/full", "error: cannot write the result to stdout: No space left")],
)
@pytest.mark.parametrize("arguments", ["families --json", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_takes_nothing_is_one_line(redirection, said, arguments, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    ran = subprocess.run(
        f"{sys.executable} -m rescompress.cli {arguments} {redirection}",
        shell=True, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip

    assert ran.returncode == _main.FAILED
    assert ran.stderr.startswith(said)
    assert len(ran.stderr.splitlines()) == 1


def test_what_a_model_prints_does_not_reach_stdout(run, here):
    (here / "loud.py").write_text(
        "import torch\n"
        "class Loud(torch.nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        print('running')\n"
        "        return super().forward(x)\n"
        "def build():\n"
        "    print('building')\n"
        "    return Loud(3, 4, 3)\n"
    )

    ran = run("measure", "loud:build", "--input-size", "8", "--quick", "--json")

    assert json.loads(ran.out)["parameters"] == 112
    assert "building" in ran.err and "running" in ran.err


def test_termination_cleans_up(tmp_path):
    code = (
        "import os, pathlib, signal, sys; from rescompress.cli import families, main\n"
        "from rescompress.export.paths import replacing\n"
        "def run(args):\n"
        "    with replacing(pathlib.Path(sys.argv[1])) as new:\n"
        "        new.write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "families.run = run\n"
        "raise SystemExit(main(['families']))\n"
    )

    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small.pt")], capture_output=True, text=True, check=False
    )

    assert (ran.returncode, ran.stderr) == (143, "error: terminated\n")
    assert list(tmp_path.iterdir()) == []
