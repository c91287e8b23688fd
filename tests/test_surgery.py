"""surgery: swapping and inserting keep names, sharing clones share weights and nothing else."""

import copy

import pytest
import torch
from torch import nn

import rescompress as rc
from rescompress import surgery
from rescompress.layers.resize import Resize2d, ResizedConv2d
from rescompress.layers.wrap import ResizedModule


def net() -> nn.Module:
    model = nn.Sequential()
    model.add_module("a", nn.Conv2d(3, 4, 3))
    model.add_module("b", nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    return model


def test_get_names_the_model_and_the_missing_part() -> None:
    model = net()
    assert surgery.get(model, "b.1") is model.b[1]
    assert surgery.get(model, "") is model
    with pytest.raises(rc.UnsupportedModelError, match=r"Sequential has no module 'b\.2'"):
        surgery.get(model, "b.2")


def test_swap_replaces_every_registration_and_keeps_the_mode() -> None:
    model = net().eval()
    model.add_module("again", model.a)
    new = nn.Conv2d(3, 4, 1)
    surgery.swap(model, "a", new)
    assert model.a is new and model.again is new and not new.training
    with pytest.raises(rc.UnsupportedModelError, match="cannot be swapped"):
        surgery.swap(model, "", new)


def test_a_shared_clone_shares_tensors_and_no_modules() -> None:
    model = net()
    clone = surgery.clone_shared(model)
    assert all(a is b for a, b in zip(model.parameters(), clone.parameters(), strict=True))
    for a, b in zip(model.buffers(), clone.buffers(), strict=True):  # a forward may write into these
        assert a is not b
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not set(map(id, model.modules())) & set(map(id, clone.modules()))
    meta = surgery.clone_shared(model, "meta")
    assert all(p.is_meta for p in meta.parameters()) and not any(p.is_meta for p in model.parameters())


def test_hooks_are_not_lost_in_silence() -> None:
    model = net()
    model.a.register_forward_hook(lambda *args: None)
    with pytest.raises(rc.UnsupportedModelError, match="'a' carries hooks"):
        surgery.swap(model, "a", nn.Conv2d(3, 4, 1))
    model.b[0].register_forward_pre_hook(lambda *args: None)
    surgery.swap(model, "b", nn.Sequential(model.b[0], nn.Tanh()))  # the hooked module itself is kept


def test_set_parameter_keeps_requires_grad() -> None:
    model = net()
    model.a.bias.requires_grad_(False)
    surgery.set_parameter(model, "a.bias", torch.ones(4))
    assert isinstance(model.a.bias, nn.Parameter) and not model.a.bias.requires_grad
    surgery.set_parameter(model, "b.0.running_mean", torch.ones(4))
    torch.testing.assert_close(dict(model.named_buffers())["b.0.running_mean"], torch.ones(4))
    with pytest.raises(rc.UnsupportedModelError, match="is no tensor"):
        surgery.get_parameter(model, "a.stride")


def test_output_grid_runs_the_convolution_alone() -> None:
    conv = nn.Conv2d(3, 4, 7, 2, 3)
    assert surgery.output_grid(conv, (224, 225)) == (112, 113)
    resized = ResizedConv2d.from_conv(conv, before=Resize2d((0.5, 0.5)), after=Resize2d((0.5, 0.5)))
    assert surgery.output_grid(resized, (224, 225)) == (112, 113)


def test_a_wrapped_module_keeps_its_names_in_state_dicts() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    surgery.swap(model, "a", ResizedModule(model.a, nn.Identity(), Resize2d((0.5, 0.5))))
    assert sorted(model.state_dict()) == sorted(before)
    wrapped = copy.deepcopy(model)
    nn.init.zeros_(wrapped.a.inner.weight)
    wrapped.load_state_dict(before)
    torch.testing.assert_close(wrapped.a.inner.weight, before["a.weight"])
    with pytest.raises(RuntimeError, match="Missing key"):
        wrapped.load_state_dict({key: value for key, value in before.items() if key != "a.weight"})
