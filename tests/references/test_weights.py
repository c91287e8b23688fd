"""Weights files: read without running code, loaded all or nothing."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rescompress.errors import InputError
from rescompress.references.weights import load_weights


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("name", ["plain.pth", "nested.bin", "prefixed.pt", "compiled.pth", "file.safetensors"])
def test_state_dicts_as_training_scripts_write_them(name, tmp_path):
    source, target, path = net(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), tmp_path / name
    state = source.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        written = {
            "plain.pth": state,
            "nested.bin": {"epoch": 3, "model": state},
            "prefixed.pt": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
            "compiled.pth": {f"module._orig_mod.{key}": value for key, value in state.items()},
        }[name]
        torch.save(written, path)

    load_weights(target, path)

    torch.testing.assert_close(dict(target.state_dict()), dict(state), rtol=0, atol=0)


def test_a_checkpoint_of_a_compressed_model_is_no_original(tmp_path):
    state = {f"model.{key}": value for key, value in net().state_dict().items()}
    ours = {"class": "Classifier", "parts": {"model": {"spec": {"steps": [{"kind": "stem_resize", "scale": 0.5}]}}}}
    torch.save({"state_dict": state, "rescompress": ours}, tmp_path / "last.ckpt")

    with pytest.raises(InputError, match="checkpoint of a compressed model"):
        load_weights(net(), tmp_path / "last.ckpt")


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    target = net()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    state["0.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "other.pth")

    with pytest.raises(InputError, match=r"0\.bias is \(5,\) instead of \(4,\)"):
        load_weights(target, tmp_path / "other.pth")

    torch.testing.assert_close(dict(target.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (torch.tensor([0.0, float("nan"), float("inf"), 1.0]), "0.bias has 2 values of 4 that are NaN or infinite"),
        (torch.zeros(4, dtype=torch.complex64), r"0.bias is complex \(torch.complex64\)"),
        (torch.zeros(4).to_sparse(), "0.bias is sparse"),
        (torch.zeros(4, device="meta"), "0.bias is on the meta device"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_no_model_can_run_with_are_refused(broken, said, tmp_path):
    torch.save({**net().state_dict(), "0.bias": broken}, tmp_path / "net.pth")

    with pytest.raises(InputError, match=said):
        load_weights(net(), tmp_path / "net.pth")


def test_counters_of_batches_may_be_missing(tmp_path):
    target, state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), net().state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "net.pth")

    load_weights(target, tmp_path / "net.pth")

    torch.testing.assert_close(target[0].weight.detach(), state["0.weight"], rtol=0, atol=0)


def test_of_a_checkpoint_of_lightning_the_model_is_taken(tmp_path):
    state = net().state_dict()
    module = {f"model.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(2)}
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save({"state_dict": module, "pytorch-lightning_version": "2.5.0"}, tmp_path / "last.ckpt")
    torch.save({"state_dict": module}, tmp_path / "other.pth")

    load_weights(target, tmp_path / "last.ckpt")

    torch.testing.assert_close(dict(target.state_dict()), dict(state), rtol=0, atol=0)
    with pytest.raises(InputError, match="holds weights of another model"):  # all or nothing
        load_weights(target, tmp_path / "other.pth")
