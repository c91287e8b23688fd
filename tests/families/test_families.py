"""families: what they read off the models, by name and without importing the library."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import rescompress as rc
from rescompress import families
from rescompress.anatomy import ConvAnatomy
from rescompress.families import _base
from tests import test_invariants
from tests.zoo import MODELS, Case, build, image

FIRST_CONV = {
    "resnet18": ("resnet", "conv1", (32, 32)),
    "resnet50d": ("resnet", "conv1.0", (32, 32)),
    "torchvision resnet50": ("resnet", "conv1", (32, 32)),
    "resnetv2_50": ("convolutional", "stem.conv", (32, 32)),
    "regnetx_002": ("convolutional", "stem.conv", (32, 32)),
    "convnext_atto": ("convolutional", "stem.0", (16, 16)),
    "mobilenetv3_small_050": ("convolutional", "conv_stem", (32, 32)),
    "tf_efficientnet_lite0": ("convolutional", "conv_stem", (32, 32)),
}


@pytest.mark.parametrize("name", FIRST_CONV)
def test_convolutional_anatomies(name: str) -> None:
    anatomy = families.describe(build(name), (image(name),))
    assert (anatomy.family, anatomy.first_conv, anatomy.stem_grid) == FIRST_CONV[name]
    assert anatomy.input_size == (64, 64)


PREFIX = {
    "vit_tiny_patch16_224": (1, 1, (4, 4)),
    "deit3_small_patch16_224": (1, 0, (4, 4)),
    "vit_small_patch14_reg4_dinov2": (5, 0, (4, 4)),
    "vit_base_patch16_siglip_224": (0, 0, (4, 4)),
    "deit_tiny_distilled_patch16_224": (2, 2, (4, 4)),
    "torchvision vit_b_16": (1, 1, (4, 4)),
}


@pytest.mark.parametrize("name", PREFIX)
def test_vit_anatomies(name: str) -> None:
    model = build(name)
    anatomy = families.describe(model, (image(name),))
    assert (anatomy.num_prefix_tokens, anatomy.pos_embed_prefix_tokens, anatomy.grid) == PREFIX[name]
    assert len(anatomy.blocks) == 12 and len(anatomy.grids) == 13
    for fqn in (anatomy.patch_conv, anatomy.norm, *anatomy.blocks):
        assert isinstance(model.get_submodule(fqn), nn.Module)
    assert model.get_parameter(anatomy.pos_embed).shape[1] == anatomy.pos_embed_prefix_tokens + 16


def test_every_model_of_the_zoo_has_a_family() -> None:
    names = [family.name for family in families.families()]
    assert names[-1] == "convolutional" and {"resnet", "vit"} <= set(names)
    for name in MODELS:
        assert families.describe(build(name), (image(name),)).family in names


def test_the_probe_equals_the_named_family() -> None:
    """The fallback finds by running what the family knows by name."""
    from rescompress.families import convolutional

    for name in ("resnet18", "resnet50d", "torchvision resnet50"):
        probed = convolutional.describe(build(name), (image(name),), {})
        named = families.describe(build(name), (image(name),))
        assert (probed.first_conv, probed.stem_grid) == (named.first_conv, named.stem_grid)


class ByValue(nn.Module):
    """Looks at the values of its input, so it cannot run on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x * float(x.mean())).mean((2, 3))


def test_models_that_look_at_values_are_probed_for_real() -> None:
    small = rc.compress(ByValue(), scale=0.5, example_input=torch.rand(1, 3, 18, 18))
    assert rc.spec_of(small) == rc.Spec.of(rc.StemResize(scale=0.5))


def test_a_family_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_base, "_registered", [])

    class Made(nn.Sequential):
        pass

    def describe(model: nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, object]) -> ConvAnatomy:
        return ConvAnatomy(family="made", input_size=(16, 16), first_conv="1", stem_grid=(14, 14))

    host = f"{Made.__module__}.{Made.__qualname__}"
    families.register(
        families.Family(name="made", summary="for the test", methods=("stem_resize",), hosts=(host,), describe=describe)
    )
    model = Made(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    small = rc.compress(model, scale=0.5, example_input=torch.rand(1, 3, 16, 16))
    assert small._rescompress.anatomy.family == "made" and type(small[1]).__name__ == "ResizedConv2d"


INVARIANTS = (
    test_invariants.test_identity,
    test_invariants.test_names_survive,
    test_invariants.test_original_is_untouched,
    test_invariants.test_works_or_raises,
    test_invariants.test_cost_falls_as_predicted,
    test_invariants.test_spec_is_data,
    test_invariants.test_pickles_and_copies,
    test_invariants.test_gradients_reach_every_parameter,
    test_invariants.test_compiles_without_graph_breaks,
    test_invariants.test_replicates,
    test_invariants.test_forward_keeps_no_state,
)


@pytest.fixture
def how_to(monkeypatch: pytest.MonkeyPatch) -> str:
    """The page on adding a family, its blocks carried out as the script that they are: their line for the zoo."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "add-a-family.md").read_text(encoding="utf-8")
    script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(_base, "_registered", [])
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(block, vars(script))
    [line] = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name, case in eval(f"{{{line}}}", {**vars(script), "Case": Case}).items():
        monkeypatch.setitem(MODELS, name, case)
    return str(name)


@pytest.mark.parametrize("step", ["stem_resize", "input_resize"])
def test_a_new_family_is_one_file_and_one_line(how_to: str, step: str) -> None:
    """The how-to is true: with its file and its line every invariant holds for the family that it makes up."""
    pair = test_invariants.make_pair(how_to, step)
    assert pair.small._rescompress.anatomy.family == "quilt"
    for invariant in INVARIANTS:
        invariant(pair)


def test_describing_imports_no_library() -> None:
    code = (
        "import sys, torch, rescompress as rc\n"
        "m = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
        "rc.compress(m, scale=0.5, example_input=torch.rand(1, 3, 18, 18))\n"
        "heavy = {'timm', 'torchvision', 'lightning', 'transformers', 'mmseg', 'torchao'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
