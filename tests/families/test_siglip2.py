"""SigLIP 2 in its NaFlex form, which is given patches: every check is on images of several shapes in one batch."""

import copy

import pytest
import torch
from torch.nn import functional as F

import rescompress as rc
from rescompress.measure import count_macs
from tests.zoo import randomize

hf = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("rescompress.huggingface")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*an output has shape:rescompress.errors.RescompressWarning"),
    pytest.mark.filterwarnings("ignore:.*cannot be reached exactly:rescompress.errors.RescompressWarning"),
]

SIDE = 4
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": SIDE,
    "num_patches": 36,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 9,
    "max_position_embeddings": 8,
    "projection_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = ((6, 6), (4, 8), (8, 4), (2, 10))
STEPS = {"patch_resize": rc.PatchResize(scale=0.5), "input_resize": rc.InputResize(scale=0.5)}


@pytest.fixture(autouse=True)
def quiet():
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()


def tower():
    torch.manual_seed(0)
    return randomize(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**VISION))).eval()


def classifier():
    torch.manual_seed(0)
    return randomize(hf.Siglip2ForImageClassification(hf.Siglip2Config(vision_config=VISION))).eval()


def cut(image, side):
    """Return an image (C, H, W) as its processor does: (N, side * side * C)."""
    rows, columns = image.shape[1] // side, image.shape[2] // side
    return image.reshape(-1, rows, side, columns, side).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)


def images(shapes=SHAPES, side=SIDE):
    numbers = torch.Generator().manual_seed(1)
    return [torch.randn(3, rows * side, columns * side, generator=numbers) for rows, columns in shapes]


def given(pictures, length=36, side=SIDE):
    """Return the arguments for a list of images, padded to one length."""
    patches = [cut(image, side) for image in pictures]
    return {
        "pixel_values": torch.stack([F.pad(one, (0, 0, 0, length - len(one))) for one in patches]),
        "pixel_attention_mask": torch.stack([(torch.arange(length) < len(one)).long() for one in patches]),
        "spatial_shapes": torch.tensor([[image.shape[1] // side, image.shape[2] // side] for image in pictures]),
    }


def run(model, example):
    with torch.no_grad():
        return model(**example)


@pytest.mark.parametrize("build", [tower, classifier])
def test_a_plain_scale_needs_no_example(build):
    model = build()
    small = rc.compress(model, scale=0.5)
    assert rc.spec_of(small) == rc.Spec.of(rc.PatchResize(scale=0.5))
    assert run(small, given(images())).keys() == run(model, given(images())).keys()


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("build", [tower, classifier])
def test_zero_reduction_changes_nothing(build, step):
    model, example = build(), given(images())
    same = rc.compress(model, step.identity(), example_input=example)
    for left, right in zip(run(model, example).values(), run(same, example).values(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_each_image_comes_out_as_if_it_were_alone(step):
    """Shapes and padding of the others, and what stands in the padding, must not matter."""
    small = rc.compress(tower(), step)
    pictures = images()
    example = given(pictures)
    example["pixel_values"] += (1 - example["pixel_attention_mask"])[..., None] * 7
    together = run(small, example).pooler_output
    for i, image in enumerate(pictures):
        count = image[0].numel() // SIDE**2
        alone = run(small, given([image], length=count)).pooler_output
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_larger_patches_are_those_that_the_processor_would_cut():
    """And their kernel is the old one's, larger: on an image without detail they read what the old ones did."""
    model, pictures = tower(), images()
    small = rc.compress(model, rc.PatchResize(patch_size=2 * SIDE))
    bare = copy.deepcopy(small)
    bare._forward_pre_hooks.clear()
    bare._forward_pre_hooks_with_kwargs.clear()
    expected = run(bare, given(pictures, length=9, side=2 * SIDE))
    assert torch.equal(run(small, given(pictures)).pooler_output, expected.pooler_output)
    colours = torch.randn(3, generator=torch.Generator().manual_seed(2))
    plain = colours.repeat(SIDE * SIDE), colours.repeat(4 * SIDE * SIDE)
    old, new = (one.embeddings.patch_embedding(x) for one, x in zip((model, small), plain, strict=True))
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_smaller_images_are_those_that_a_loader_would_resize():
    model, pictures = tower(), images()
    small = rc.compress(model, rc.InputResize(scale=0.5))
    resized = [F.interpolate(one[None], scale_factor=0.5, mode="bilinear", antialias=True)[0] for one in pictures]
    expected = run(model, given(resized, length=9)).pooler_output
    torch.testing.assert_close(run(small, given(pictures)).pooler_output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "becomes"), [((5, 7), (2, 3)), ((1, 36), (1, 9)), ((36, 1), (9, 1)), ((3, 12), (1, 6))]
)
def test_odd_and_long_images_fit(shape, becomes):
    seen = []
    small = rc.compress(tower(), rc.InputResize(scale=0.5))
    small.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[1].tolist()))
    out = run(small, given(images([shape])))
    assert seen == [[list(becomes)]] and out.last_hidden_state.shape[1] == 9
    assert out.pooler_output.isfinite().all()


def test_cost_is_that_of_the_tower_for_larger_or_for_fewer_patches():
    example = given(images())
    halved = [image[:, ::2, ::2] for image in images()]
    for step, side, fewer in (
        (STEPS["patch_resize"], 2 * SIDE, given(images(), length=9, side=2 * SIDE)),
        (STEPS["input_resize"], SIDE, given(halved, length=9)),
    ):
        other = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**VISION | {"patch_size": side}))
        assert count_macs(rc.compress(tower(), step), example).macs == count_macs(other, fewer).macs


def test_a_third_of_the_scale_is_reached_by_rounding_in_one_direction():
    small = rc.compress(tower(), rc.InputResize(scale=2 / 3))
    assert run(small, given(images([(6, 6)]))).last_hidden_state.shape[1] == 16


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("build", [tower, classifier])
def test_names_gradients_and_checkpoints(build, step):
    model, example = build(), given(images())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = rc.compress(model, step)
    assert not model._forward_pre_hooks
    assert list(small.state_dict()) == list(before)
    other = rc.compress(build(), step)
    other.load_state_dict(before)
    assert torch.equal(run(other, example)[0], run(small, example)[0])
    small.train()(**example)[0].square().sum().backward()
    silent = [name for name, one in small.named_parameters() if one.grad is None or not one.grad.isfinite().all()]
    # The pooling head has no part in the tokens that a classifier averages; a tower's sequence does not pass it.
    assert all(".head." in f".{name}" for name in silent)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_export_takes_images_of_other_shapes(step):
    small, example = rc.compress(tower(), step), given(images())
    program = torch.export.export(small, (), example).module()
    others = given(images([(3, 11), (6, 5), (1, 9), (9, 4)]))
    torch.testing.assert_close(program(**others).pooler_output, run(small, others).pooler_output)


def test_onnx_file(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    small, example = rc.compress(tower(), scale=0.5), given(images())
    path = rc.export(small, tmp_path / "tower.onnx", example, dynamic="none")
    others = given(images([(3, 11), (6, 5), (1, 9), (9, 4)]))
    session = onnxruntime.InferenceSession(path)
    got = torch.from_numpy(session.run(None, {name: one.numpy() for name, one in others.items()})[1])
    torch.testing.assert_close(got, run(small, others).pooler_output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [tower, classifier])
def test_saved_and_loaded(build, tmp_path):
    small, example = rc.compress(build(), scale=0.5), given(images())
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert rc.spec_of(loaded) == rc.spec_of(small)
    assert torch.equal(run(loaded, example)[0], run(small, example)[0])


def test_inside_a_larger_model():
    torch.manual_seed(0)
    model = randomize(hf.Siglip2Model(hf.Siglip2Config(vision_config=VISION, text_config=TEXT))).eval()
    example = given(images()) | {"input_ids": torch.ones(4, 5, dtype=torch.int64)}
    small = rc.compress(model, scale=0.5, example_input=example)
    expected = rc.compress(model.vision_model, scale=0.5)
    got = run(small, example).vision_model_output.pooler_output
    assert torch.equal(got, run(expected, given(images())).pooler_output)


def test_twice():
    once = rc.compress(tower(), rc.InputResize(scale=0.5))
    twice = rc.compress(once, rc.PatchResize(scale=1 / 3))
    assert len(twice._forward_pre_hooks) == 1
    assert run(twice, given(images())).last_hidden_state.shape[1] == 1
    assert run(once, given(images())).last_hidden_state.shape[1] == 9
    spec = rc.Spec.of(rc.InputResize(scale=0.5, mode="nearest"), rc.PatchResize(scale=1 / 3))
    (hook,) = rc.compress(tower(), spec)._forward_pre_hooks.values()
    assert (hook.mode, hook.antialias) == ("nearest", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    small, example = rc.compress(tower(), scale=0.5), given(images())
    whole = run(small, example).pooler_output
    low = run(small.to(dtype), example | {"pixel_values": example["pixel_values"].to(dtype)}).pooler_output
    assert low.dtype == dtype
    assert (low.float() - whole).abs().max() < 16 * torch.finfo(dtype).eps * whole.abs().max()


def test_the_real_processor():
    processor = hf.Siglip2ImageProcessor(patch_size=SIDE, max_num_patches=36)
    pictures = [torch.randint(0, 255, (3, *size), dtype=torch.uint8) for size in ((60, 100), (33, 31))]
    example = dict(processor(pictures, return_tensors="pt"))
    small = rc.compress(tower(), scale=0.5, example_input=example)
    assert run(small, example).pooler_output.shape == (2, 16)


def test_without_a_mask_everything_is_real():
    small, example = rc.compress(tower(), scale=0.5), given(images([(6, 6)]))
    assert torch.equal(
        run(small, example | {"pixel_attention_mask": None}).pooler_output, run(small, example).pooler_output
    )


def test_refusals():
    for step in (rc.TokenMerge(r=2), rc.TokenPool(after_block=0, stride=2)):
        with pytest.raises(rc.UnsupportedModelError, match="grid of its own image"):
            rc.compress(tower(), step)
    with pytest.raises(rc.SpecError, match="no one size"):
        rc.compress(tower(), rc.InputResize(size=12))
    with pytest.raises(rc.SpecError, match="larger square ones only"):
        rc.compress(tower(), rc.PatchResize(patch_size=2))
    small = rc.compress(tower(), scale=0.5)
    with pytest.raises(ValueError, match="needs pixel_values and spatial_shapes"):
        small(pixel_values=torch.randn(1, 36, 48), pixel_attention_mask=None)
    wrong = given(images([(6, 6)])) | {"spatial_shapes": torch.tensor([[7, 6]])}
    with pytest.raises(RuntimeError, match="7 x 6 patches, more than the 36"):
        small(**wrong)
