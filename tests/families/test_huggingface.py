"""Models of transformers, built small from configs: alone, in heads, as towers, and through save_pretrained."""

import copy
import json
import logging
import pickle
from functools import cache

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import rescompress as rc
from rescompress.cli import main
from rescompress.families import describe
from rescompress.inputs import as_args
from rescompress.layers.positions import resample_table
from rescompress.measure import count_macs
from tests.zoo import randomize

hf = pytest.importorskip("transformers", minversion="5")
huggingface = pytest.importorskip("rescompress.huggingface")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*an output has shape:rescompress.errors.RescompressWarning"),
]


@pytest.fixture(autouse=True)
def quiet():
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
FOUR = VIT | {"num_hidden_layers": 4}
OUT = {"out_indices": [1, 2, 3, 4]}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "is_hybrid": False}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 64, "patch_size": 4}
DEEP_SWIN = SWIN | {"depths": [2, 2, 2], "num_heads": [2, 2, 2]}  # its last stage has 4 x 4 positions
SEGFORMER = STAGES | {"num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 16}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TWO = {"vision_config": VIT, "text_config": TEXT | {"max_position_embeddings": 16}}
RELATIVE = {"use_relative_position_bias": True}
UPER = {"hidden_size": 16, "auxiliary_channels": 8, "num_labels": 3}


def images(side, batch=2, width=None):
    return torch.randn(batch, 3, side, width or side, generator=torch.Generator().manual_seed(1))


def of(model, config, **options):
    """Return what builds a model from a config."""
    return lambda **more: getattr(hf, model)(getattr(hf, config)(**options | more))


def dinov2(**options):
    return hf.Dinov2Config(**FOUR, **OUT, reshape_hidden_states=False, **options)


def dpt_on_dinov2():
    return hf.DPTForDepthEstimation(hf.DPTConfig(backbone_config=dinov2(), **NECK))


def depth_anything():
    options = {"patch_size": 8, "reassemble_hidden_size": 32, "head_hidden_size": 8} | NECK
    del options["is_hybrid"]
    return hf.DepthAnythingForDepthEstimation(hf.DepthAnythingConfig(backbone_config=dinov2(), **options))


def upernet(backbone, channels):
    return hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(backbone_config=backbone, auxiliary_in_channels=channels, **UPER)
    )


def upernet_swin():
    return upernet(hf.SwinConfig(**SWIN | {"depths": [1] * 4, "num_heads": [2] * 4}, **OUT), 64)


VITS = {
    "ViT": of("ViTModel", "ViTConfig", **VIT),
    "DeiT": of("DeiTModel", "DeiTConfig", **VIT),
    "ViTMSN": of("ViTMSNModel", "ViTMSNConfig", **VIT),
    "I-JEPA": of("IJepaModel", "IJepaConfig", **VIT),
    "BEiT": of("BeitModel", "BeitConfig", **VIT, use_absolute_position_embeddings=True),
    "DINOv2": of("Dinov2Model", "Dinov2Config", **VIT),
    "DINOv2 registers": of("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **VIT),
    "DINOv3": of("DINOv3ViTModel", "DINOv3ViTConfig", **VIT, num_register_tokens=4),
    "CLIP": of("CLIPVisionModel", "CLIPVisionConfig", **VIT),
    "SigLIP": of("SiglipVisionModel", "SiglipVisionConfig", **VIT),
    "BLIP": of("BlipVisionModel", "BlipVisionConfig", **VIT),
    "BLIP-2": of("Blip2VisionModel", "Blip2VisionConfig", **VIT),
    "DPT": of("DPTModel", "DPTConfig", **VIT, is_hybrid=False),
    "DINOv2 backbone": of("Dinov2Backbone", "Dinov2Config", **VIT),
    "DINOv3 backbone": of("DINOv3ViTBackbone", "DINOv3ViTConfig", **VIT),
}
"""Plain ViTs without relative positions, on images of 32 pixels."""

OTHERS = {
    "ViT classifier": (of("ViTForImageClassification", "ViTConfig", **VIT), 32),
    "DeiT with teacher": (of("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VIT), 32),
    "BEiT relative": (of("BeitForImageClassification", "BeitConfig", **VIT, **RELATIVE), 32),
    "BEiT shared": (of("BeitModel", "BeitConfig", **VIT, use_shared_relative_position_bias=True), 32),
    "BEiT backbone": (of("BeitBackbone", "BeitConfig", **FOUR, **OUT, **RELATIVE), 32),
    "Data2Vec": (of("Data2VecVisionForImageClassification", "Data2VecVisionConfig", **VIT, **RELATIVE), 32),
    "SigLIP classifier": (of("SiglipForImageClassification", "SiglipConfig", **TWO), 32),
    "CLIP projection": (of("CLIPVisionModelWithProjection", "CLIPVisionConfig", **VIT), 32),
    "DINOv3 ConvNeXt": (of("DINOv3ConvNextModel", "DINOv3ConvNextConfig", **STAGES), 64),
    "Swin": (of("SwinForImageClassification", "SwinConfig", **SWIN), 64),
    "Swin small": (of("SwinModel", "SwinConfig", **DEEP_SWIN, use_absolute_embeddings=True), 64),
    "Swin backbone": (of("SwinBackbone", "SwinConfig", **SWIN, out_indices=[1, 2]), 64),
    "Swin v2": (of("Swinv2ForImageClassification", "Swinv2Config", **DEEP_SWIN), 64),
    "Swin v2 backbone": (of("Swinv2Backbone", "Swinv2Config", **SWIN, out_indices=[1, 2]), 64),
    "ConvNeXt": (of("ConvNextForImageClassification", "ConvNextConfig", **STAGES), 64),
    "ConvNeXt v2": (of("ConvNextV2ForImageClassification", "ConvNextV2Config", **STAGES), 64),
    "ConvNeXt backbone": (of("ConvNextBackbone", "ConvNextConfig", **STAGES), 64),
    "ResNet": (of("ResNetForImageClassification", "ResNetConfig", **STAGES, embedding_size=8), 64),
    "SegFormer classifier": (of("SegformerForImageClassification", "SegformerConfig", **SEGFORMER), 64),
}

DENSE = {
    "SegFormer": (of("SegformerForSemanticSegmentation", "SegformerConfig", **SEGFORMER, num_labels=3), 64),
    "BEiT": (of("BeitForSemanticSegmentation", "BeitConfig", **FOUR, **OUT, **RELATIVE, num_labels=3), 32),
    "Data2Vec": (of("Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig", **FOUR, **OUT, num_labels=3), 32),
    "DPT": (of("DPTForSemanticSegmentation", "DPTConfig", **FOUR, **NECK, backbone_out_indices=[0, 1, 2, 3]), 32),
    "DPT depth": (of("DPTForDepthEstimation", "DPTConfig", **FOUR, **NECK, backbone_out_indices=[0, 1, 2, 3]), 32),
    "DPT on DINOv2": (dpt_on_dinov2, 32),
    "Depth Anything": (depth_anything, 32),
    "UperNet on Swin": (upernet_swin, 64),
    "UperNet on ConvNeXt": (lambda: upernet(hf.ConvNextConfig(**STAGES, **OUT), 24), 64),
}

CASES = (
    {name: (build, 32) for name, build in VITS.items()}
    | OTHERS
    | {f"{name} dense": case for name, case in DENSE.items()}
)


@cache
def made(name):
    """Return a model, an image for it, and the model at scale 0.5."""
    build, side = CASES[name]
    torch.manual_seed(0)
    model, image = randomize(build()).eval(), images(side)
    return model, image, rc.compress(model, scale=0.5, example_input=image)


def tensors(outputs):
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def run(model, example, **options):
    args, kwargs = as_args(example)
    with torch.no_grad():
        return model(*args, **kwargs, **options)


def assert_same(actual, expected, tolerance=1e-5):
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_half_the_scale_keeps_the_kind_of_outputs(name):
    model, image, small = made(name)
    before, after = run(model, image), run(small, image)
    assert type(after) is type(before) and list(after) == list(before)
    assert small._rescompress.anatomy.grid == tuple(side // 2 for side in describe(model, (image,)).grid)


def for_half_the_image(name):
    """Build a model for images of half the side; networks of any size are as they are."""
    build, side = CASES[name]
    try:
        if name == "SigLIP classifier":
            return build(vision_config=VIT | {"image_size": side // 2})
        return build(image_size=side // 2)
    except TypeError:
        return build()


BY_ARITHMETIC = {
    "Swin small": "windows of 4 x 4 do not fit the maps of the half image: no original could be counted",
    "Depth Anything dense": "its map comes back at the old size in front of the last convolutions, not behind them",
    "UperNet on Swin dense": "the original fills up windows that are larger than its maps; the compressed one's fit",
}
"""Models of which no original at half the size costs the same, and why."""


@pytest.mark.parametrize("name", CASES)
def test_cost_falls_as_predicted(name):
    """It is that of the original built for, and given, half the image, with a stem that goes on reading all of it."""
    model, image, small = made(name)
    count = count_macs(small, image).macs
    if name in BY_ARITHMETIC:
        assert count < 0.5 * count_macs(model, image).macs
        return
    at_half = count_macs(for_half_the_image(name).eval(), image[..., ::2, ::2])
    anatomy = small._rescompress.anatomy
    reader = anatomy.patch_conv if hasattr(anatomy, "patch_conv") else anatomy.first_conv
    stems = [next(row.macs for row in one.modules if row.fqn == reader) for one in (count_macs(model, image), at_half)]
    assert count == at_half.macs + stems[0] - stems[1]


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_from_before_loads_after(name):
    model, image, small = made(name)
    assert list(small.state_dict()) == list(model.state_dict())
    other = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(model.state_dict())
    assert_same(run(other, image), run(small, image))


@pytest.mark.parametrize("name", CASES)
def test_zero_reduction_changes_nothing(name):
    model, image, small = made(name)
    for step in (rc.InputResize(scale=1.0), next(iter(rc.spec_of(small))).identity()):
        assert_same(run(rc.compress(model, step, example_input=image), image), run(model, image), 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_comes_back_compressed(name, tmp_path):
    _, image, small = made(name)
    small.save_pretrained(tmp_path)
    back = type(small).from_pretrained(tmp_path)
    assert rc.spec_of(back) == rc.spec_of(small) and back._rescompress.anatomy == small._rescompress.anatomy
    assert back.config.quantization_config == small.config.quantization_config and not back.is_quantized
    assert_same(run(back, image), run(small, image))


@pytest.mark.parametrize("name", DENSE)
def test_dense_predictions_keep_their_size(name):
    model, image, small = made(f"{name} dense")
    before, after = run(model, image)[0], run(small, image)[0]
    assert before.ndim in (3, 4) and after.shape == before.shape
    assert not torch.equal(before, after) and bool(after.isfinite().all())


@pytest.mark.parametrize("name", VITS)
def test_a_resized_vit_is_the_vit_of_larger_patches(name):
    """Positions, rotary angles, buffers and numbers in the config are those of a model built with these patches."""
    _, image, small = made(name)
    native = VITS[name](patch_size=16).eval()
    assert small.config.patch_size == 16 and small.config.image_size == 32
    native.load_state_dict(small.state_dict())
    assert_same(run(small, image), run(native, image))


ASKED = ["ViT", "DeiT", "CLIP", "SigLIP", "BLIP-2", "ViTMSN"]


@pytest.mark.parametrize("name", ASKED)
def test_positions_are_interpolated_when_asked_and_only_then(name):
    _, _, small = made(name)
    native = VITS[name](patch_size=16).eval()
    native.load_state_dict(small.state_dict())
    larger = images(48, width=64)
    with pytest.raises((ValueError, RuntimeError), match=r"Input image size|must match"):
        run(small, larger)
    ours = run(small, larger, interpolate_pos_encoding=True)
    assert ours.last_hidden_state.shape[1] in (12, 13, 14)
    assert_same(ours, run(native, larger, interpolate_pos_encoding=True))


@pytest.mark.parametrize("name", ["ViT", "CLIP", "DINOv2", "DINOv3"])
def test_an_input_resize_follows_images_of_any_size(name):
    model, image, _ = made(name)
    small = rc.compress(model, rc.InputResize(scale=0.5), example_input=image)
    inner = VITS[name](image_size=16).eval()
    inner.load_state_dict(small.state_dict())
    asked = {"interpolate_pos_encoding": True} if name in ASKED else {}
    for given in (image, images(64, width=48)):
        shrunk = F.interpolate(given, scale_factor=0.5, mode="bilinear", antialias=True)
        assert_same(run(small, given, **asked), run(inner, shrunk, **asked))


def test_swin_windows_shrink_with_their_tables():
    model, _, small = made("Swin small")
    for stage, window in zip(small.encoder.layers, (4, 4, 2), strict=True):
        assert {block.window_size for block in stage.blocks} == {window}
    table = "encoder.layers.2.blocks.1.attention.relative_position_bias.relative_position_bias_table"
    expected = resample_table(model.state_dict()[table], "relative", (4, 4), (2, 2))
    torch.testing.assert_close(small.state_dict()[table], expected)
    positions = "embeddings.position_embeddings"
    expected = resample_table(model.state_dict()[positions], "tokens", (16, 16), (8, 8))
    torch.testing.assert_close(small.state_dict()[positions], expected)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_still_has_a_gradient(name):
    model, image, small = made(name)

    def trained(one):
        one = copy.deepcopy(one).train()
        sum(tensor.square().sum() for tensor in tensors(one(image))).backward()
        found = {name for name, parameter in one.named_parameters() if parameter.grad is not None}
        assert all(one.get_parameter(name).grad.isfinite().all() for name in found)
        return {name.replace("inner.", "") for name in found}

    assert trained(small) == trained(model)


EXPORTED = ["ViT classifier", "DINOv2", "CLIP", "Swin small", "SegFormer dense"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EXPORTED else pytest.mark.slow) for name in CASES]
)
def test_torch_export_computes_the_same(name):
    _, image, small = made(name)
    program = torch.export.export(copy.deepcopy(small), (image,)).module()
    assert_same(program(image), run(small, image))


@pytest.mark.parametrize("name", ["ViT classifier", "BEiT relative", "SigLIP", "DINOv3", "Swin"])
def test_eager_attention_computes_the_same_and_gives_its_maps(name):
    model, image, small = made(name)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    eager = rc.compress(eager, scale=0.5, example_input=image)
    outputs = run(eager, image, output_attentions=True, output_hidden_states=True)
    assert_same(outputs[0], run(small, image)[0])
    maps = outputs.attentions[0]
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert len(outputs.hidden_states) == len(run(model, image, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("name", ["ViT", "Swin", "ResNet"])
def test_pickles(name):
    build, side = CASES[name]
    small, image = rc.compress(build().eval(), scale=0.5, example_input=images(side)), images(side)
    assert_same(run(pickle.loads(pickle.dumps(small)), image), run(small, image))


def test_half_precision_weights():
    model, image, _ = made("DINOv2")
    small = rc.compress(copy.deepcopy(model).bfloat16(), scale=0.5, example_input=image.bfloat16())
    assert {tensor.dtype for tensor in tensors(run(small, image.bfloat16()))} == {torch.bfloat16}


def test_steps_follow_each_other(tmp_path):
    model, _, _ = made("ViT")
    image = images(32)
    once = rc.compress(model, rc.PatchResize(scale=0.5), example_input=image)
    twice = rc.compress(once, rc.TokenMerge(r=1), example_input=image)
    twice.save_pretrained(tmp_path)
    back = hf.ViTModel.from_pretrained(tmp_path)
    assert [step.kind for step in rc.spec_of(back)] == ["patch_resize", "token_merge"]
    assert_same(run(back, image), run(twice, image))


def test_a_two_tower_model_is_compressed_whole(tmp_path):
    torch.manual_seed(0)
    model = randomize(hf.CLIPModel(hf.CLIPConfig(**TWO))).eval()
    example = {"input_ids": torch.tensor([[1, 5, 2], [1, 7, 2]]), "pixel_values": images(32)}
    small = rc.compress(model, scale=0.5, example_input=example)
    assert small._rescompress.anatomy.host == "vision_model" and small.config.vision_config.patch_size == 16
    torch.testing.assert_close(run(small, example).text_embeds, run(model, example).text_embeds)
    small.save_pretrained(tmp_path)
    assert_same(run(hf.CLIPModel.from_pretrained(tmp_path), example), run(small, example))


def llava():
    torch.manual_seed(0)
    language = hf.LlamaConfig(**TEXT, num_key_value_heads=2)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT), text_config=language, image_token_index=98, vision_feature_layer=-1
    )
    return randomize(hf.LlavaForConditionalGeneration(config)).eval()


def prompt(image_tokens):
    return {"input_ids": torch.tensor([[1, *[98] * image_tokens, 5]]), "pixel_values": images(32, 1)}


def test_the_tower_of_a_language_model_is_compressed_on_its_own(tmp_path):
    model = llava()
    with pytest.raises(rc.UnsupportedModelError, match="Image features and image tokens do not match"):
        rc.compress(model, scale=0.5, example_input=prompt(16))  # its prompt has a token for each patch
    rc.compress_(model.model.vision_tower, scale=0.5)
    huggingface.write_config(model)
    model.save_pretrained(tmp_path)
    back = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert rc.spec_of(back.model.vision_tower) == rc.spec_of(model.model.vision_tower)
    assert_same(run(back, prompt(4)).logits, run(model, prompt(4)).logits)


def test_write_config_asks_for_something_compressed():
    with pytest.raises(rc.SpecError, match="nothing in this ViTModel"):
        huggingface.write_config(VITS["ViT"]())
    with pytest.raises(rc.UnsupportedModelError, match="no model of transformers"):
        huggingface.write_config(torch.nn.Linear(1, 1))


def test_the_log_says_that_the_processor_goes_on():
    _, _, small = made("ViT")
    assert (
        small._rescompress.log[-1].startswith("image processor: goes on as before")
        and "32 x 32" in (small._rescompress.log[-1])
    )


def test_low_precision_is_not_saved(tmp_path):
    model, image, _ = made("ViT")
    small = rc.compress(model, rc.Spec.of(rc.PatchResize(scale=0.5), rc.Quantize(scheme="w8")), example_input=image)
    with pytest.raises(rc.ExportError, match="layers of low precision"):
        small.save_pretrained(tmp_path)


def test_the_original_and_its_config_stay(tmp_path):
    model, _, _ = made("DINOv3 backbone")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["patch_size"] == 8 and "quantization_config" not in written


def test_without_the_integration_transformers_says_so(tmp_path, monkeypatch, caplog):
    _, image, _ = made("ViT")
    small = rc.compress(made("ViT")[0], rc.InputResize(scale=0.5), example_input=image)
    small.save_pretrained(tmp_path)
    auto = hf.quantizers.auto
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "rescompress")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    hf.utils.logging.set_verbosity_warning()
    with caplog.at_level("WARNING"), pytest.raises(RuntimeError, match=r"size|mismatch"):
        hf.ViTModel.from_pretrained(tmp_path)
    assert "Unknown quantization type, got rescompress" in caplog.text


def test_command_line_reads_a_folder(tmp_path, capsys):
    model = randomize(OTHERS["ViT classifier"][0](num_labels=5)).eval()
    model.save_pretrained(tmp_path / "net")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": True}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": True, "resample": 3}
    (tmp_path / "net" / "preprocessor_config.json").write_text(json.dumps(processor))
    code = main(["compress", f"hf:{tmp_path / 'net'}", "--scale", "0.5", "--quick", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    told = json.loads(captured.out)
    assert told["input_size"] == [32, 32] and told["spec"]["steps"] == [{"kind": "patch_resize", "scale": 0.5}]
    assert any(line.startswith("image processor") for line in told["log"])


def test_command_line_normalises_as_the_processor_does(tmp_path):
    from PIL import Image

    from rescompress.cli.models import Request, load_model

    OTHERS["ViT classifier"][0]().save_pretrained(tmp_path)
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    loaded = load_model(Request(reference=f"hf:{tmp_path}"))
    grey = Image.new("RGB", (50, 40), (51, 51, 51))  # 0.2
    torch.testing.assert_close(loaded.transform(grey), torch.full((3, 32, 32), (0.2 - 0.5) / 0.25))
    assert loaded.preprocessing == {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }


def test_the_recorders_of_hidden_states_survive_merging():
    model = randomize(VITS["DINOv2 backbone"]()).eval()
    image = images(32)
    merged = rc.compress(model, rc.TokenMerge(r=2), example_input=image)
    same = rc.compress(model, rc.TokenMerge(r=0), example_input=image)
    assert_same(run(same, image), run(model, image))
    assert [tensor.shape for tensor in tensors(run(merged, image))] == [
        tensor.shape for tensor in tensors(run(model, image))
    ]


SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def test_a_host_that_computes_with_values_comes_back_compressed(tmp_path):
    """DETR asks whether its mask is full, which no model can answer whose weights are still to come."""
    torch.manual_seed(0)
    width = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5}
    config = hf.DetrConfig(
        backbone_config=hf.ResNetConfig(**SMALL_RESNET, out_features=["stage2"]),
        backbone=None,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        **width,
    )
    model, image = randomize(hf.DetrForObjectDetection(config)).eval(), images(64)
    small = rc.compress(model, scale=0.5, example_input=image)
    small.save_pretrained(tmp_path)
    back = hf.DetrForObjectDetection.from_pretrained(tmp_path)
    assert rc.spec_of(back) == rc.spec_of(small)
    assert_same(run(back, image).logits, run(small, image).logits)


def test_what_is_folded_is_not_saved(tmp_path):
    model, image = hf.ResNetForImageClassification(hf.ResNetConfig(**SMALL_RESNET)).eval(), images(64)
    small = rc.compress(model, scale=0.5, example_input=image)
    folded = rc.fold(small, image)
    with pytest.raises(rc.ExportError, match=r"has been folded for deployment.*save the model that it was folded from"):
        folded.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    assert_same(run(hf.ResNetForImageClassification.from_pretrained(tmp_path), image).logits, run(small, image).logits)


def test_depth_of_every_pixel_is_refused_where_its_size_would_be_lost():
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    model = hf.GLPNForDepthEstimation(hf.GLPNConfig(**sizes, decoder_hidden_size=8)).eval()
    small = rc.compress(model, scale=0.5, example_input=images(128))
    assert run(small, images(192)).predicted_depth.shape == run(model, images(192)).predicted_depth.shape
    with pytest.raises(ValueError, match="would not come back at a side of 24"):
        run(small, images(96))
