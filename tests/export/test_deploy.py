"""The C++ programs of scripts/deploy run written files as Python does, without Python."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rescompress as rc
from tests.export.making import small_vit

DEPLOY = Path(__file__).parents[2] / "scripts" / "deploy"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAMS = [("run_torchscript", ".pt"), ("run_package", ".aoti.pt2")]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    subprocess.run([sys.executable, str(DEPLOY / "build.py"), "--out", str(folder)], check=True, timeout=800)
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vit, side = small_vit()
    return rc.compress(vit, rc.TokenMerge(r=2), example_input=torch.randn(1, 3, side, side)).eval()


def execute(program, path, shape, data, *options):
    # Not even a Python that could be found: what runs is libtorch alone.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [program, path, "x".join(map(str, shape)), *options], input=data, capture_output=True, env=clean, check=False
    )


@pytest.mark.parametrize(("program", "suffix"), PROGRAMS)
def test_program_computes_what_the_model_computes(program, suffix, programs, model, tmp_path):
    path = rc.export(model, tmp_path / f"small{suffix}", torch.randn(1, 3, 32, 32))

    for batch in (1, 4):
        x = torch.randn(batch, 3, 32, 32)
        done = execute(programs / program, path, x.shape, x.numpy().tobytes(), "3")

        assert done.returncode == 0, done.stderr.decode()
        assert b"ms a run" in done.stderr
        with torch.no_grad():
            wanted = model(x)
        got = torch.from_numpy(np.frombuffer(done.stdout, dtype=np.float32).copy()).reshape(wanted.shape)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(("program", "suffix"), PROGRAMS)
def test_the_clock_measures_runs(program, suffix, programs, model, tmp_path):
    path = rc.export(model, tmp_path / f"small{suffix}", torch.randn(1, 3, 32, 32))
    x = torch.randn(8, 3, 32, 32)

    done = execute(programs / program, path, x.shape, x.numpy().tobytes(), "200")

    # A transformer of two blocks takes far more than the empty loop's microseconds.
    assert float(done.stderr.decode().splitlines()[-1].removesuffix(" ms a run")) > 0.02


@pytest.mark.parametrize(("program", "suffix"), PROGRAMS)
def test_eight_threads_at_once_compute_the_same(program, suffix, programs, model, tmp_path):
    path = rc.export(model, tmp_path / f"small{suffix}", torch.randn(1, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)

    done = execute(programs / program, path, x.shape, x.numpy().tobytes(), "50", "--threads", "8")

    assert done.returncode == 0, done.stderr.decode()
    with torch.no_grad():
        wanted = model(x)
    got = torch.from_numpy(np.frombuffer(done.stdout, dtype=np.float32).copy()).reshape(wanted.shape)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("program", ["run_torchscript", "run_package"])
def test_bad_input_is_one_error_and_no_output(program, programs, tmp_path):
    (tmp_path / "bad.pt2").write_bytes(b"no model")

    cases = [((1, 3), b"1234", ()), ((1, 1), bytes(4), ()), ((1, 1), bytes(4), ("1", "--threads", "0"))]
    for shape, data, options in cases:
        done = execute(programs / program, tmp_path / "bad.pt2", shape, data, *options)
        assert done.returncode == 1
        assert done.stderr.startswith(b"error: ")
        assert done.stdout == b""
