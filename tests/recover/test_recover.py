"""rc.recover: the compressed model comes nearer to the original, only what is tuned changes, a kill is survived."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rescompress as rc
from rescompress.recover.batches import ModelCall


class Net(nn.Module):
    """A small classifier, or with `dense` a segmentor of the same body."""

    def __init__(self, dense: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = dense
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, 5, 1) if dense else nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer1(self.bn1(self.conv1(x)).relu())
        if self.dense:
            return F.interpolate(self.head(y), size=x.shape[-2:], mode="bilinear")
        return self.head(self.dropout(y.mean((2, 3))))


def images(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.randn(8, 3, 4, 4, generator=generator) for _ in range(count)]
    return [F.interpolate(x, size=16, mode="bilinear") for x in coarse]


def pair(dense: bool = False, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """Return a teacher whose logits spread, and what compress makes of it."""
    torch.manual_seed(0)
    teacher = Net(dense, dropout)
    with torch.no_grad():
        teacher.head.weight *= 5
    rc.recalibrate(teacher, images())
    return teacher, rc.compress(teacher, scale=0.5, example_input=images()[0])


def distance(model: nn.Module, teacher: nn.Module) -> float:
    model.eval()
    teacher.eval()
    with torch.no_grad():
        return sum(float(rc.Distillation().losses(model, teacher, ModelCall((x,), {}, None))["loss"]) for x in images())


@pytest.mark.parametrize(("dense", "left"), [(False, 0.15), (True, 0.6)])
def test_the_model_comes_nearer_to_its_teacher(dense: bool, left: float) -> None:
    """A class asks less of a coarse grid than an edge: 0.07 and 0.48 of the divergence were left when written."""
    teacher, small = pair(dense)
    weights, before = copy.deepcopy(teacher.state_dict()), distance(small, teacher)
    teacher.train()
    seen: list[float] = []
    returned = rc.recover(small, teacher, images(), steps=60, lr=3e-3, log=lambda step, told: seen.append(told["loss"]))
    assert returned is small and not small.training and teacher.training
    assert distance(small, teacher) < left * before
    assert sum(seen[-8:]) < 0.65 * sum(seen[:8])
    assert rc.spec_of(small) == rc.Spec.of(rc.StemResize(scale=0.5))
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)


def test_only_norms_and_the_classifier_are_tuned() -> None:
    teacher, small = pair()
    before = copy.deepcopy(small.state_dict())
    rc.recover(small, teacher, images(), steps=3, tune="norms_and_classifier", recalibrate_batches=0)
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("conv1", "layer1.0")) for name in changed)
    assert {"bn1.weight", "layer1.1.bias", "head.weight"} <= changed
    assert all(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_killed_run_ends_at_the_same_weights(dropout: float, tmp_path: Path) -> None:
    teacher, whole = pair(dropout=dropout)
    killed = copy.deepcopy(whole)
    rc.recover(whole, teacher, images(), steps=12)

    class Killed(Exception):
        pass

    def until(step: int, told: dict[str, float]) -> None:
        if step == 7:
            raise Killed

    path = tmp_path / "run.ckpt"
    fresh = copy.deepcopy(killed)
    with pytest.raises(Killed):
        rc.recover(killed, teacher, images(), steps=12, checkpoint=path, every=3, log=until)
    rc.recover(fresh, teacher, images(), steps=12, checkpoint=path, every=3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


def test_the_random_state_of_the_caller_stays() -> None:
    teacher, small = pair(dropout=0.5)
    before = torch.get_rng_state()
    rc.recover(small, teacher, images(), steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_and_labels_are_learned_from() -> None:
    teacher, small = pair()
    batch = ModelCall((images()[0],), {}, torch.arange(8) % 5)
    both = rc.Distillation(features=("layer1",), feature_weight=0.5, label_weight=0.25, temperature=2.0)
    losses = both.losses(small.eval(), teacher.eval(), batch)
    with torch.no_grad():
        new, old = small(batch.args[0]), teacher(batch.args[0])
        kl = F.kl_div((new / 2).log_softmax(1), (old / 2).softmax(1), reduction="batchmean") * 4
        maps = [net.layer1(net.bn1(net.conv1(batch.args[0])).relu()) for net in (small, teacher)]
    torch.testing.assert_close(losses["distillation"], kl)
    torch.testing.assert_close(losses["labels"], F.cross_entropy(new, batch.labels))
    expected = F.mse_loss(maps[0], F.avg_pool2d(maps[1], 2)) / F.avg_pool2d(maps[1], 2).pow(2).mean()
    torch.testing.assert_close(losses["features"], expected)
    total = 0.75 * losses["distillation"] + 0.5 * losses["features"] + 0.25 * losses["labels"]
    torch.testing.assert_close(losses["loss"], total)
    assert not small.layer1._forward_hooks and not teacher.layer1._forward_hooks


def test_dense_labels_are_compared_at_their_own_size_and_255_is_no_class() -> None:
    teacher, small = pair(dense=True)
    labels = torch.arange(8 * 32 * 32).reshape(8, 32, 32) % 5
    labels[:, :4] = 255
    batch = ModelCall((images()[0],), {}, labels)
    losses = rc.Distillation(label_weight=0.5).losses(small.eval(), teacher.eval(), batch)
    with torch.no_grad():
        logits = F.interpolate(small(batch.args[0]), size=(32, 32), mode="bilinear")
    torch.testing.assert_close(losses["labels"], F.cross_entropy(logits[:, :, 4:], labels[:, 4:]))


def test_a_batch_without_any_label_teaches_nothing() -> None:
    teacher, small = pair(dense=True)
    call = ModelCall((images()[0],), {}, torch.full((8, 16, 16), 255))
    losses = rc.Distillation(label_weight=1.0).losses(small.eval(), teacher.eval(), call)
    losses["loss"].backward()
    assert float(losses["loss"].detach()) == 0
    assert all(float(one.grad.abs().max()) == 0 for one in small.parameters() if one.grad is not None)


def endless() -> Iterator[Tensor]:
    yield from itertools.repeat(images(1)[0] * float("nan"))


def test_wrong_use_is_told(tmp_path: Path) -> None:
    teacher, small = pair()
    with pytest.raises(rc.InputError, match="loss is nan at step 0"):
        rc.recover(small, teacher, endless(), steps=2)
    with pytest.raises(rc.InputError, match="no batch"):
        rc.recover(small, teacher, [], steps=2)
    with pytest.raises(rc.InputError, match="label_weight needs labels"):
        rc.recover(small, teacher, images(), steps=2, distillation=rc.Distillation(label_weight=0.5))
    with pytest.raises(rc.SpecError, match="a teacher of its own"):
        rc.recover(small, small, images(), steps=2)
    with pytest.raises(rc.SpecError, match="'norms_and_classifier'"):
        rc.recover(small, teacher, images(), steps=2, tune="norms")
    with pytest.raises(rc.UnsupportedModelError, match=r"of shape \(8, 7\)"):
        rc.recover(small, nn.Sequential(teacher, nn.Linear(5, 7)), images(), steps=2)
    path = tmp_path / "run.ckpt"
    rc.recover(small, teacher, images(), steps=2, checkpoint=path)
    with pytest.raises(rc.InputError, match="of a run of 2 steps"):
        rc.recover(small, teacher, images(), steps=3, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(rc.InputError, match=r"is damaged or no checkpoint .*delete it"):
        rc.recover(small, teacher, images(), steps=2, checkpoint=path)
    torch.save({"model": {}}, path)
    with pytest.raises(rc.InputError, match="no checkpoint of recover"):
        rc.recover(small, teacher, images(), steps=2, checkpoint=path)
    with pytest.raises(rc.InputError, match="is a folder; give the path of a file"):
        rc.recover(small, teacher, images(), steps=2, checkpoint=tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    teacher, small = pair()
    done: list[int] = []

    with pytest.raises(rc.InputError, match=r"nope.run.ckpt cannot be written \(No such file .*; make its folder"):
        rc.recover(
            small, teacher, images(), steps=2, checkpoint=tmp_path / "nope" / "run.ckpt", log=lambda *at: done.append(1)
        )

    assert done == []
