"""torchvision: classification, segmentation and detection, whose outputs stay in the coordinates of the image."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.models import detection, segmentation

import rescompress as rc
from rescompress.anatomy import ViTAnatomy
from rescompress.inputs import default_args
from rescompress.measure import count_macs
from tests.zoo import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSIFIERS = torchvision.models.list_models(torchvision.models)
GIGABYTES = ("regnet_y_128gf", "regnet_x_32gf", "regnet_y_32gf")
SMALLEST = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "vgg11_bn",
]
SEGMENTATION = torchvision.models.list_models(segmentation)
DETECTION = torchvision.models.list_models(detection)
SMALL_DETECTION = ["fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"]


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def some_marked_slow(names: list[str], fast: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in names]


def classifier(name: str, side: int) -> torch.nn.Module:
    """Build a classifier with random weights, for images of this side where it is made for one size."""
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        options["image_size"] = side
    return getattr(torchvision.models, name)(weights=None, **options).eval()


def on_meta(name: str, side: int) -> tuple[torch.nn.Module, Tensor]:
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # which reads values while it is built
        model = classifier(name, side).to("meta")
    return model, torch.empty(1, 3, side, side, device="meta")


SIDES = {"inception_v3": 256, "vit_b_32": 256, "vit_l_32": 256}
"""Sides of images other than 224 whose half the networks take as well."""

TOLERANCE = {"maxvit_t": None, "squeezenet1_0": 0.02} | {
    # The original fills up windows that are larger than its map; the compressed one's fit.
    f"swin_{size}": bound
    for size, bound in (("t", 0.15), ("s", 0.1), ("b", 0.1), ("v2_t", 0.1), ("v2_s", 0.1), ("v2_b", 0.1))
}
"""How far the cost may lie from that of the original at half the image; None: that original does not exist."""


@pytest.mark.parametrize("name", some_marked_slow(CLASSIFIERS, SMALLEST))
def test_the_cost_of_classifiers_falls_as_predicted(name: str) -> None:
    """It is the original's at half the image, with a stem that goes on reading all of it."""
    if name in GIGABYTES:
        pytest.skip("gigabytes of real weights, and the class of regnet_y_400mf")
    side = SIDES.get(name, 224)
    model, x = on_meta(name, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RescompressWarning)  # meta tensors have no values; odd sides are floored
        small = rc.compress(model, scale=0.5, example_input=x)
    assert list(small.state_dict()) == list(model.state_dict())
    assert small(x).shape == model(x).shape
    whole, count = count_macs(model, x), count_macs(small, x).macs
    assert count < 0.75 * whole.macs
    bound = TOLERANCE.get(name, 0)
    if bound is None:
        return
    at_half = count_macs(*on_meta(name, side // 2))
    anatomy = small._rescompress.anatomy
    reader = anatomy.patch_conv if isinstance(anatomy, ViTAnatomy) else anatomy.first_conv
    stems = [next(row.macs for row in one.modules if row.fqn == reader) for one in (whole, at_half)]
    assert count == pytest.approx(at_half.macs + stems[0] - stems[1], rel=bound)


@pytest.mark.parametrize("name", some_marked_slow(CLASSIFIERS, ["mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1"]))
def test_classifiers_keep_what_they_promise(name: str) -> None:
    if name in GIGABYTES or name == "vit_h_14":
        pytest.skip("gigabytes of real weights, and the class of a smaller one")
    side = 224 if name == "maxvit_t" else 192 if name == "inception_v3" else 112 if name.startswith("vit_") else 96
    side = 64 * (side // 64) if name.endswith("_32") else side
    model, x = randomize(classifier(name, side)).eval(), noise(2, 3, side, side)
    before = copy.deepcopy(model.state_dict())  # with its versions of layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RescompressWarning)
        small = rc.compress(model, scale=0.5, example_input=x)
        same = rc.compress(model, next(iter(rc.spec_of(small))).identity(), example_input=x)
    with torch.no_grad():
        old, new = model(x), small(x)
        torch.testing.assert_close(same(x), old, rtol=0, atol=1e-6 * float(old.abs().max()))
        assert (new - old).abs().max() > 1e-3 * old.abs().max()
        loaded = copy.deepcopy(small)
        loaded.load_state_dict(before)
        torch.testing.assert_close(loaded(x), new, rtol=0, atol=1e-5 * float(new.abs().max()))
        program = torch.export.export(small, (x,)).module()
        torch.testing.assert_close(program(x), new, rtol=0, atol=1e-5 * float(new.abs().max()))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    small(x).square().sum().backward()
    silent = [key for key, one in small.named_parameters() if one.grad is None or not bool(one.grad.isfinite().all())]
    assert all("aux" in key.lower() for key in silent)  # heads that run in training only


def segmentor(name: str) -> torch.nn.Module:
    aux = {} if name.startswith("lraspp") else {"aux_loss": True}
    return randomize(getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3, **aux)).eval()


@pytest.mark.parametrize(
    "name", some_marked_slow(SEGMENTATION, ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
)
def test_segmentation_keeps_the_size_of_the_image(name: str) -> None:
    model, x = segmentor(name), noise(1, 3, 65, 97)
    same = rc.compress(model, rc.StemResize(scale=1.0), example_input=x)
    for step in (rc.StemResize(scale=0.5), rc.InputResize(scale=0.5)):
        with pytest.warns(rc.RescompressWarning, match="cannot be reached exactly"):
            small = rc.compress(model, step, example_input=x)
        for image in (x, noise(2, 3, 64, 50)):
            old, new = model(image), small(image)
            assert {key: value.shape for key, value in old.items()} == {key: value.shape for key, value in new.items()}
    torch.testing.assert_close(same(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", some_marked_slow(SEGMENTATION, ["lraspp_mobilenet_v3_large"]))
def test_segmentors_keep_what_they_promise(name: str) -> None:
    model, x = segmentor(name), noise(2, 3, 64, 64)
    small = rc.compress(model, scale=0.5, example_input=x)
    at_half = count_macs(model, x[..., ::2, ::2])
    reader = small._rescompress.anatomy.first_conv
    stems = [next(row.macs for row in one.modules if row.fqn == reader) for one in (count_macs(model, x), at_half)]
    assert count_macs(small, x).macs == at_half.macs + stems[0] - stems[1]

    assert list(small.state_dict()) == list(model.state_dict())
    loaded = copy.deepcopy(small)
    loaded.load_state_dict(model.state_dict())
    program = torch.export.export(small, (x,)).module()
    with torch.no_grad():
        expected = small(x)
        for other in (loaded, program):
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)

    had, has = gradients(model, x), gradients(small, x)
    assert has.keys() == had.keys()
    assert all(bool(one.isfinite().all()) for one in has.values())


def gradients(model: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the parameters that get one, by their names in the state dict."""
    model = copy.deepcopy(model)
    sum(out.square().mean() for out in model(x).values()).backward()
    state = model.state_dict(keep_vars=True)
    return {name: one.grad for name, one in state.items() if one.grad is not None}


def detector(name: str, side: int = 128, **options: Any) -> Any:
    """Build a detector with visible random weights that keeps boxes of any score."""
    options |= {"weights": None, "weights_backbone": None, "num_classes": 4}
    if not name.startswith("ssd"):
        options |= {"min_size": side, "max_size": side}
    if "rcnn" in name:
        options |= {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 10}
    else:
        options |= {"score_thresh": 0.0, "topk_candidates": 20, "detections_per_img": 10}
    if "keypoint" in name:
        options["num_keypoints"] = 5
    return randomize(getattr(detection, name)(**options)).eval()


def images() -> list[Tensor]:
    return [noise(3, 128, 128), noise(3, 100, 90)]


@pytest.mark.parametrize("name", some_marked_slow(DETECTION, SMALL_DETECTION))
def test_boxes_lie_in_image_coordinates(name: str) -> None:
    model, given = detector(name), images()
    same = rc.compress(model, rc.StemResize(scale=1.0), example_input=(given,))
    wanted = model(given)
    assert all(len(one["boxes"]) > 0 for one in wanted)  # else there would be nothing to compare
    torch.testing.assert_close(same(given), wanted, rtol=0, atol=0)
    small = rc.compress(model, scale=0.5, example_input=(given,))
    assert list(small.state_dict()) == list(model.state_dict())
    found = pickle.loads(pickle.dumps(small))(given)
    assert [one.keys() for one in found] == [one.keys() for one in model(given)]
    for image, one in zip(given, found, strict=True):
        height, width = image.shape[-2:]
        boxes = one["boxes"]
        assert len(boxes) > 0
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width + 1e-3 and boxes[:, 3].max() <= height + 1e-3
        # Not all in the upper left half: anchors reach over the whole image.
        assert boxes[:, 2].max() > 0.6 * width and boxes[:, 3].max() > 0.6 * height
        if "masks" in one:
            assert one["masks"].shape[-2:] == image.shape[-2:]


@pytest.mark.parametrize(
    "name",
    some_marked_slow(
        [
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            "maskrcnn_resnet50_fpn",
            "retinanet_resnet50_fpn",
            "fcos_resnet50_fpn",
        ],
        SMALL_DETECTION,
    ),
)
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "has run before"])
def test_half_the_image_inside_is_half_the_image_outside(name: str, warm: bool) -> None:
    """Anchors, regions and levels are those of the smaller image; torchvision's cache of scales must not disturb."""
    model, given = detector(name), [images()[0]]
    half = copy.deepcopy(model)
    half.transform.min_size, half.transform.max_size = (64,), 64
    if warm:
        model(given)
    small = rc.compress(model, rc.InputResize(scale=0.5, antialias=False), example_input=(given,))
    torch.testing.assert_close(small(given), half(given), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["ssdlite320_mobilenet_v3_large", pytest.param("ssd300_vgg16", marks=pytest.mark.slow)]
)
def test_default_boxes_of_an_ssd_are_twice_as_large_and_cover_the_image(name: str) -> None:
    model, given = detector(name), [images()[0]]
    small = rc.compress(model, scale=0.5, example_input=(given,))
    batch, _ = model.transform(given)
    side = batch.tensors.shape[-1]

    def boxes(one: Any) -> Tensor:
        return one.anchor_generator(batch, list(one.backbone(batch.tensors).values()))[0]

    old, new = boxes(model), boxes(small)
    largest = (old[:, 2] - old[:, 0]).max()
    torch.testing.assert_close((new[:, 2] - new[:, 0]).max(), 2 * largest)
    centres = (new[:, 0] + new[:, 2]) / 2
    assert centres.min() < 0.06 * side and centres.max() > 0.94 * side


@pytest.mark.parametrize(
    "name", some_marked_slow(["fasterrcnn_mobilenet_v3_large_320_fpn", "keypointrcnn_resnet50_fpn"], SMALL_DETECTION)
)
def test_detectors_train(name: str) -> None:
    model, given = detector(name), [images()[0]]
    targets = [
        {
            "boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0], [20.0, 5.0, 100.0, 50.0]]),
            "labels": torch.tensor([1, 2]),
            "keypoints": 60 * noise(2, 5, 3),
        }
    ]
    small = rc.compress(model, scale=0.5, example_input=(given,)).train()
    losses = small(given, targets)
    assert losses.keys() == model.train()(given, targets).keys()
    sum(losses.values()).backward()
    for key, parameter in small.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.isfinite().all()), key


@pytest.mark.parametrize("name", some_marked_slow(DETECTION, SMALL_DETECTION))
@pytest.mark.parametrize(
    "step",
    [rc.StemResize(scale=0.5), pytest.param(rc.InputResize(scale=0.5), marks=pytest.mark.slow)],
    ids=["stem", "input"],
)
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and gives pairs
def test_compressed_detectors_can_be_scripted(name: str, step: rc.Step) -> None:
    # TorchScript rounds the sizes that torchvision resizes images to otherwise, where they are no whole numbers.
    given = [noise(3, 128, 128), noise(3, 96, 128)]
    small = rc.compress(detector(name, side=64), step, example_input=(given,))
    fresh = torch.jit.script(small)
    wanted = small(given)
    assert all(len(one["boxes"]) > 0 for one in wanted)
    for program in (fresh, torch.jit.script(small)):  # torchvision keeps the scales of its maps from the first run on
        losses, found = program(given)
        assert losses == {}
        torch.testing.assert_close(found, wanted)


def test_optical_flow_is_refused() -> None:
    with torch.device("meta"):
        model, image = torchvision.models.optical_flow.raft_small(weights=None).eval(), torch.empty(1, 3, 128, 128)
    with pytest.raises(rc.UnsupportedModelError, match="how far each pixel moves"):
        rc.compress(model, scale=0.5, example_input=(image, image))


@pytest.mark.parametrize("name", ["r3d_18", "s3d", "swin3d_t"])
def test_video_is_refused(name: str) -> None:
    with torch.device("meta"):
        model, clip = torchvision.models.get_model(name, weights=None).eval(), torch.empty(1, 3, 16, 112, 112)
    with pytest.raises(rc.UnsupportedModelError, match=r"videos .* are not supported"):
        rc.compress(model, scale=0.5, example_input=clip)


def test_detectors_are_measured_and_have_a_default_input() -> None:
    model = detector("fasterrcnn_mobilenet_v3_large_320_fpn")
    (given,), kwargs = default_args(model)
    assert [tuple(image.shape) for image in given] == [(3, 128, 128)] and kwargs == {}
    small = rc.compress(model, scale=0.5)
    old, new = (
        rc.measure(m, (given,), batch_sizes=(1,), latency=False, peak_memory=False, training=False).macs
        for m in (model, small)
    )
    assert new < old
