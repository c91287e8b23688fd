"""A spec is plain data: it round trips, is checked where it is born, and names typos."""

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import rescompress as rc
from rescompress.spec import step_kinds

scales = st.floats(min_value=1e-3, max_value=1.0)
sides = st.integers(min_value=1, max_value=512)
sizes = st.one_of(sides, st.tuples(sides, sides))
modes = st.sampled_from(["nearest", "bilinear", "bicubic", "area"])
resolution_steps = st.one_of(
    st.builds(rc.StemResize, scale=scales, mode=modes),
    st.builds(rc.StemResize, size=sizes, mode=st.just("bicubic"), antialias=st.booleans()),
    st.builds(rc.InputResize, scale=scales, mode=modes),
    st.builds(rc.InputResize, size=sizes, antialias=st.booleans()),
    st.builds(rc.PatchResize, scale=scales),
    st.builds(rc.PatchResize, patch_size=sizes),
)
blocks = st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True)
token_steps = st.one_of(
    st.builds(rc.TokenPool, after_block=st.one_of(st.integers(-12, 40), blocks), stride=sizes),
    st.builds(rc.TokenMerge, r=st.one_of(st.integers(0, 99), st.lists(st.integers(0, 99), min_size=1))),
    st.builds(rc.TokenMerge, keep=scales),
)
specs = st.builds(
    lambda first, then: rc.Spec((*first, *then)), st.lists(resolution_steps), st.lists(token_steps, max_size=3)
)


@given(specs)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_round_trips(spec: rc.Spec) -> None:
    assert rc.Spec.from_dict(spec.to_dict()) == spec
    assert rc.Spec.from_json(spec.to_json()) == spec
    assert rc.Spec.from_yaml(spec.to_yaml()) == spec
    assert hash(rc.Spec.from_json(spec.to_json())) == hash(spec)


@given(specs)
@settings(max_examples=50, derandomize=True, deadline=None)
def test_identity_has_the_same_kinds(spec: rc.Spec) -> None:
    assert [step.kind for step in spec.identity()] == [step.kind for step in spec]


def test_the_dict_of_the_design() -> None:
    spec = rc.Spec.from_dict({"schema": 1, "steps": [{"kind": "stem_resize", "scale": 0.5}]})
    assert spec == rc.Spec.of(rc.StemResize(scale=0.5))
    assert spec.to_dict() == {"schema": 1, "steps": [{"kind": "stem_resize", "scale": 0.5}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "token_pool", "after": 3}, "has no option 'after'; did you mean 'after_block'"),
        ({"kind": "token_pool"}, "needs the option 'after_block'"),
        ({"kind": "stem_resiz", "scale": 0.5}, "unknown method 'stem_resiz'; did you mean 'stem_resize'"),
        ({"kind": 7}, "unknown method 7"),
        ({"kind": [1]}, r"unknown method \[1\]"),
        ({"kind": "stem_resize", "scale": 10**400}, r"must be in \(0, 1\]"),
        ({"kind": "stem_resize", "scale": 0.5, "antialias": None}, "must be true or false"),
        ({"kind": "token_pool", "after_block": 1.5}, "block index"),
        ({"scale": 0.5}, "needs a 'kind'"),
        ({"kind": "stem_resize"}, "takes either a scale or a size"),
        ({"kind": "stem_resize", "scale": 0.5, "size": 4}, "takes either a scale or a size"),
        ({"kind": "stem_resize", "scale": 0}, r"stem_resize.scale must be in \(0, 1\], got 0"),
        ({"kind": "stem_resize", "scale": 1.5}, r"must be in \(0, 1\], got 1.5"),
        ({"kind": "stem_resize", "scale": float("nan")}, "got nan"),
        ({"kind": "stem_resize", "scale": "0.5"}, "got '0.5'"),
        ({"kind": "stem_resize", "scale": True}, "got True"),
        ({"kind": "stem_resize", "scale": 0.5, "mode": "bilinaer"}, "did you mean 'bilinear'"),
        ({"kind": "stem_resize", "scale": 0.5, "antialias": 1}, "must be true or false"),
        ({"kind": "stem_resize", "scale": 0.5, "mode": "area", "antialias": True}, "antialias goes with"),
        ({"kind": "stem_resize", "size": [3, 4, 5]}, r"\(height, width\)"),
        ({"kind": "stem_resize", "size": 0}, "of at least 1"),
        ({"kind": "patch_resize"}, "either a scale or a patch_size"),
        ({"kind": "patch_resize", "patch_size": 3.5}, "an int or a"),
        ({"kind": "token_pool", "after_block": [1, 1]}, "names a block twice"),
        ({"kind": "token_pool", "after_block": 1, "stride": 0}, "of at least 1"),
        ({"kind": "token_pool", "after_block": "1"}, "block index"),
        ({"kind": "token_pool", "after_block": []}, "block index"),
        ({"kind": "token_pool", "after_block": 1, "mode": "mean"}, "one of avg, max"),
        ({"kind": "token_merge"}, "either r or keep"),
        ({"kind": "token_merge", "r": -1}, "whole number"),
        ({"kind": "token_merge", "r": []}, "whole number"),
        ({"kind": "token_merge", "keep": 0}, r"token_merge.keep must be in \(0, 1\]"),
    ],
)
def test_bad_steps_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(rc.SpecError, match=message):
        rc.Spec.from_dict({"steps": [data]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a spec must look like"),
        ("steps: 3", "a spec must look like"),
        ("{steps: [], extra: 1}", "no key 'extra'"),
        ("{schema: 2, steps: []}", "schema 2"),
        ("steps: [3]", "a step must be a mapping"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(rc.SpecError, match=message):
        rc.Spec.load(path)


def test_missing_file_and_bad_json(tmp_path: Path) -> None:
    with pytest.raises(rc.SpecError, match="cannot read the spec"):
        rc.Spec.load(tmp_path / "none.yaml")
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(rc.SpecError, match="not JSON"):
        rc.Spec.load(tmp_path / "spec.json")


def test_deep_nesting_is_named() -> None:
    with pytest.raises(rc.SpecError, match="not JSON"):
        rc.Spec.from_json("[" * 100_000)
    with pytest.raises(rc.SpecError, match="not YAML"):
        rc.Spec.from_yaml("[" * 5_000)


def test_stages_never_go_back() -> None:
    with pytest.raises(rc.SpecError, match=r"'input_resize' .* must come before 'token_merge'"):
        rc.Spec.of(rc.TokenMerge(r=1), rc.InputResize(scale=0.5))
    with pytest.raises(rc.SpecError, match="holds steps"):
        rc.Spec.of({"kind": "stem_resize"})


def test_every_method_is_a_file_named_after_its_tag() -> None:
    assert {"input_resize", "patch_resize", "stem_resize", "token_merge", "token_pool"} <= set(step_kinds())


def test_importing_is_light() -> None:
    """`import rescompress` brings in none of the model libraries, and a spec can be read without torch."""
    code = (
        "import sys, rescompress as rc\n"
        "rc.Spec, rc.SpecError\n"
        "heavy = {'torch', 'timm', 'torchvision', 'lightning', 'transformers', 'mmseg'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "rc.compress, rc.measure, rc.fold, rc.export\n"
        "heavy = {'timm', 'torchvision', 'lightning', 'transformers', 'mmseg'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import rescompress.compress, rescompress.measure\n"
        "assert callable(rc.compress) and callable(rc.measure) and 'compress' in dir(rc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = rc.compres
