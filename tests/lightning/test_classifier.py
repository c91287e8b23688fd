"""Classifier: what it builds, trains, scores and refuses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rescompress as rc
from rescompress.errors import InputError, SpecError

pytest.importorskip("lightning")

from lightning.pytorch import Trainer

from rescompress.lightning import Classifier, WarmupCosine, WarmupPoly, _scoring
from rescompress.lightning.batches import Batch
from tests.lightning.tiny import TINY, Tiny

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("one_thread", "seeded")]

HALF = {"steps": [{"kind": "stem_resize", "scale": 0.5}]}


def made(**options: Any) -> Classifier:
    return Classifier("timm:test_resnet", **{"num_classes": 4, "input_size": 32, "spec": HALF, **options})


def trainer(**options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "barebones": False}
    return Trainer(accelerator="cpu", enable_checkpointing=False, **{**quiet, "max_epochs": 1, **options})


def test_the_model_is_the_compressed_one_with_the_weights_of_its_original() -> None:
    module = made()
    assert rc.spec_of(module.model) == rc.Spec.of(rc.StemResize(scale=0.5)) == module.spec
    again = rc.compress(module.original(), scale=0.5, example_input=module.example)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(module.model.eval()(images), again(images), rtol=0, atol=0)
    # The same weights in every process, and the global random state as it was.
    before = torch.get_rng_state()
    torch.testing.assert_close(made().model.state_dict(), module.model.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["state dict", "checkpoint of a run"])
def test_training_begins_with_the_weights_of_the_original(tmp_path: Path, kind: str) -> None:
    original = made(spec=None, seed=5)
    state = original.model.state_dict() if kind == "state dict" else {"state_dict": original.state_dict()}
    torch.save(state, tmp_path / "w.pt")
    module = made(initial_weights=str(tmp_path / "w.pt"))
    torch.testing.assert_close(module.model.state_dict(), original.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(module.original().state_dict(), original.model.state_dict(), rtol=0, atol=0)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt holds weights of another model"):
        made(initial_weights=str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match=r"there is no weights file .*none\.pt"):
        made(initial_weights=str(tmp_path / "none.pt"))


@pytest.mark.parametrize(
    ("reference", "options"),
    [
        ("test_vit", {}),
        ("torchvision:resnet18", {}),
        (TINY, {"options": {"width": 6}, "channels": 1, "input_size": 28}),
    ],
)
def test_references(reference: str, options: dict[str, Any]) -> None:
    module = Classifier(reference, **{"num_classes": 4, "input_size": 160, **options})
    assert module(module.example).shape == (1, 4)
    assert module.example.shape[1] == options.get("channels", 3)


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("timm:resnet5o", {}, "timm has none of this name; did you mean 'resnet50'"),
        ("torchvision:resnet19", {}, "did you mean 'resnet18'"),
        ("torchvision:resnet18", {"channels": 1}, "images of 3 channels, got channels=1"),
        ("tim:resnet50", {}, "unknown model source 'tim'"),
        (TINY, {"options": {"widht": 6}}, "takes no option 'widht'; did you mean 'width'"),
        ("timm:test_resnet", {"options": {"widht": 6}}, "cannot build timm:test_resnet: TypeError"),
    ],
)
def test_wrong_references_are_refused(reference: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Classifier(reference, num_classes=4, **options)


def test_sizes_that_the_model_does_not_take_are_told_before_the_first_step() -> None:
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    fixed = Classifier("timm:vit_tiny_patch16_224", num_classes=4, input_size=160, options=small)
    free = Classifier(
        "timm:vit_tiny_patch16_224", num_classes=4, input_size=160, options={**small, "dynamic_img_size": True}
    )
    data = Tiny(train_size=160, test_size=128, length=4)

    with pytest.raises(InputError, match=r"built for images of 160 x 160 and does not take the data's 128 x 128"):
        trainer().fit(fixed, datamodule=data)
    (tested,) = trainer().test(free, datamodule=data, verbose=False)
    assert 0 <= tested["test/accuracy"] <= 1


def test_low_bits_belong_to_deploy() -> None:
    low = {"steps": [{"kind": "quantize", "scheme": "w8"}]}
    with pytest.raises(SpecError, match="give the PRECISION steps of the spec as deploy"):
        made(spec=low)
    with pytest.raises(SpecError, match="deploy takes PRECISION steps alone"):
        made(deploy=HALF)


def test_it_learns_and_is_scored() -> None:
    module = made(optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    run = trainer(max_epochs=3)
    run.fit(module, datamodule=Tiny(length=64))
    assert run.callback_metrics["train/loss"].isfinite()
    (tested,) = run.test(module, datamodule=Tiny(length=64), verbose=False)
    assert set(tested) == {"test/loss", "test/accuracy"}
    # The logged accuracy is that of all images.
    images, labels = zip(*((batch.images, batch.labels) for batch in Tiny(length=64).batches("test")), strict=True)
    right = module.model.eval()(torch.cat(images)).argmax(1) == torch.cat(labels)
    assert tested["test/accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert tested["test/accuracy"] > 0.5


def test_sizes_of_the_test_are_scored_each() -> None:
    module, data = made(), Tiny()
    data.test_sizes = [32, 48]
    data.test_dataloader = lambda: [  # type: ignore[method-assign]
        data._loader("test", training=False),
        Tiny(test_size=48)._loader("test", training=False),
    ]
    (first, second) = trainer().test(module, datamodule=data, verbose=False)
    tested = first | second
    assert tested["test/accuracy"] == tested["test/accuracy@32"]
    images = torch.cat([batch.images for batch in Tiny(test_size=48).batches("test")])
    labels = torch.cat([batch.labels for batch in Tiny(test_size=48).batches("test")])
    assert images.shape[-1] == 48
    right = module.model.eval()(images).argmax(1) == labels
    assert tested["test/accuracy@48"] == pytest.approx(float(right.float().mean()), abs=1e-6)


def test_a_copy_in_low_bits_is_tested_beside_the_model() -> None:
    """Of the scheme that asks for training images to be calibrated with."""
    deploy = {"steps": [{"kind": "quantize", "scheme": "w8a8_static"}]}
    module = Classifier(TINY, num_classes=4, input_size=32, options={"width": 16}, spec=HALF, deploy=deploy)
    before = copy.deepcopy(module.state_dict())
    run = trainer()
    with module.deployed():
        (tested,) = run.test(module, datamodule=Tiny(), verbose=False)
    assert set(tested) == {"deployed/loss", "deployed/accuracy"}
    assert module.deployed_model is None
    assert module.deployed_bytes is not None
    assert module.deployed_bytes < rc.measure(module.model, module.example, latency=False).weight_bytes / 2
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_all_ranks_calibrate_with_the_images_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    deploy = {"steps": [{"kind": "quantize", "scheme": "w8a8_static"}]}
    module = Classifier(TINY, num_classes=4, input_size=32, options={"width": 16}, deploy=deploy)
    run, shown, sent = trainer(), [torch.rand(4, 3, 32, 32)], []

    def broadcast(self: Any, thing: Any, src: int = 0) -> Any:
        if not isinstance(thing, list):
            return thing
        sent.extend(thing)
        return shown

    monkeypatch.setattr(type(run.strategy), "broadcast", broadcast)
    given = []
    real = _scoring.compress
    monkeypatch.setattr(_scoring, "compress", lambda *args, **options: given.append(options) or real(*args, **options))
    with module.deployed():
        run.test(module, datamodule=Tiny(), verbose=False)
    torch.testing.assert_close(given[0]["calibration"], shown, rtol=0, atol=0)
    torch.testing.assert_close(sent, [batch.images for batch in Tiny().batches()][:8], rtol=0, atol=0)


def test_norms_and_biases_are_not_decayed_and_frozen_parameters_are_left_out() -> None:
    module = made(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5))
    decayed, others = module.configure_optimizers().param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert all(one.ndim > 1 for one in decayed["params"])
    assert all(one.ndim == 1 for one in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(module.model.parameters()))

    tuned = made(tune="norms_and_classifier")
    chosen = {name: one for name, one in tuned.model.named_parameters() if one.requires_grad}
    assert {"fc.weight", "fc.bias", "bn1.weight"} <= chosen.keys()
    assert not any(one.ndim == 4 for one in chosen.values())
    assert sum(len(group["params"]) for group in tuned.configure_optimizers().param_groups) == len(chosen)


@pytest.mark.parametrize("kind", [WarmupCosine, WarmupPoly])
def test_the_learning_rate_rises_and_falls_over_the_whole_run(kind: Any) -> None:
    rates = []

    class Recorded(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_start(self, *args: Any) -> None:
            if not rates:
                rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    module = Recorded(
        TINY,
        num_classes=4,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
        schedule=lambda optimizer: kind(optimizer, warmup=0.25, final=0.1),
    )
    trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=Tiny())  # 16 steps
    torch.testing.assert_close(rates[:4], [0.25, 0.5, 0.75, 1.0])
    down = [1 - step / 12 for step in range(13)]
    shape = (
        [one**0.9 for one in down]
        if kind is WarmupPoly
        else [0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (1 - one))))) for one in down]
    )
    torch.testing.assert_close(rates[4:], [0.1 + 0.9 * one for one in shape], rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_names_the_files() -> None:
    with pytest.raises(
        InputError, match=r"the loss is nan at step \d+ .*learning rate of 0\.001; images.*: image3\.png;"
    ):
        trainer().fit(made(), datamodule=Tiny(poison=3))
    module = made(loss=Infinite())
    with pytest.raises(
        InputError, match=r"the loss is inf at step 0 .*the batch was image\d+\.png, image\d+\.png, .*; begin"
    ):
        trainer(num_sanity_val_steps=0).fit(module, datamodule=Tiny())


def test_weights_that_the_last_step_broke_are_told_of() -> None:
    module = made(optimizer=lambda groups: torch.optim.SGD(groups, lr=float("inf")))
    with pytest.raises(
        InputError, match=r"after step 1 \(epoch 0\) weights are not finite: model.* and more; begin anew"
    ):
        trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=Tiny())


class Infinite(nn.Module):
    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.sum() * torch.inf


def test_wrong_numbers_of_classes_are_refused() -> None:
    with pytest.raises(InputError, match="Tiny has num_classes=7, and the model is built with num_classes=4"):
        trainer().fit(made(), datamodule=Tiny(classes=7))
    with pytest.raises(InputError, match=r"image5\.png has the label 4, and the model has the classes 0 to 3"):
        trainer().fit(made(), datamodule=Tiny(mislabel=5))
    with pytest.raises(InputError, match="Tiny has channels=1, and the model is built with channels=3"):
        trainer().fit(made(), datamodule=Tiny(channels=1))
    module = made()
    module.model = rc.compress(Classifier("test_resnet", num_classes=9).model.eval(), scale=0.5)
    with pytest.raises(InputError, match="gives 9 scores, and num_classes is 4"):
        module.losses(Batch(torch.rand(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64), ("a.png",)))


def test_mixed_labels_are_learned_from() -> None:
    module, images = made(), torch.rand(2, 3, 32, 32)
    mixed = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    loss = module.eval().losses(Batch(images, mixed, ("a", "b")))["loss"]
    scores = module.model(images).log_softmax(1)
    torch.testing.assert_close(loss, -(scores * mixed).sum(1).mean())


def test_a_distiller_takes_the_place_of_the_loss_and_stays_out_of_the_checkpoint() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(2, 2)

        def losses(self, model: nn.Module, batch: Batch, label_loss: Any = None) -> dict[str, torch.Tensor]:
            return {"loss": model(batch.images).sum() * 0 + 7, "distillation": torch.tensor(3.0)}

    module = made()
    names = list(module.state_dict())
    module.distiller = Fixed()
    assert list(module.state_dict()) == names
    run = trainer(limit_train_batches=1, limit_val_batches=0)
    run.fit(module, datamodule=Tiny())
    assert {name: float(run.callback_metrics[f"train/{name}"]) for name in ("loss", "distillation")} == {
        "loss": 7.0,
        "distillation": 3.0,
    }


def test_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    module = Classifier(f"hf:{tmp_path}", num_classes=4, channels=1, input_size=64, spec=HALF)
    batch = Batch(torch.rand(2, 1, 64, 64), torch.tensor([0, 3]), ("a", "b"))
    assert module.logits(module.model, batch).shape == (2, 4)
    assert module.losses(batch)["loss"].isfinite()


def test_a_package_without_lightning_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import rescompress.lightning

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    vars(rescompress.lightning).pop("Result", None)
    with pytest.raises(ImportError, match=r"Result needs lightning; pip install 'rescompress\[lightning\]'"):
        rescompress.lightning.Result  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Classifer'"):
        rescompress.lightning.Classifer  # noqa: B018
