"""MACs: published numbers, counts by hand, two meters in agreement, and no trace left on the model."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rescompress.errors import MeasureError
from rescompress.measure import count_macs, crosscheck_macs

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

PUBLISHED_GMACS = {"resnet18": 1.814, "resnet50": 4.089, "vit_b_16": 17.564, "vit_b_32": 4.409}
TIMM = [
    "resnet18", "resnet50d", "resnetv2_50", "regnetx_002", "convnext_atto", "mobilenetv3_small_050",
    "tf_efficientnet_lite0", "vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224", "test_vit",
]  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_GMACS)
def test_published_counts_to_three_decimals(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    count = count_macs(model, torch.empty(1, 3, 224, 224))
    assert round(count.macs / 1e9, 3) == PUBLISHED_GMACS[name]
    assert count.uncounted == ()
    assert count.how == "meta"


def _agree(model: nn.Module, x: Tensor) -> None:
    check = crosscheck_macs(model, x)
    assert check.macs > 0
    assert check.difference <= 1e-3


@pytest.mark.parametrize("name", TIMM)
def test_two_meters_agree_on_timm(name: str) -> None:
    sizes = {"img_size": 112} if name == "vit_small_patch14_reg4_dinov2" else {}
    side = {"vit_small_patch14_reg4_dinov2": 112, "test_vit": 160}.get(name, 224)
    _agree(timm.create_model(name, **sizes), torch.zeros(1, 3, side, side))


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16"])
def test_two_meters_agree_on_torchvision(name: str) -> None:
    _agree(torchvision.models.get_model(name), torch.zeros(1, 3, 224, 224))


class Merging(nn.Module):
    """The operators of token merging: similarity, sorting, gathering and scattering."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, ::2], x[:, 1::2]
        best, partner = (a @ b.transpose(1, 2)).max(-1)
        order = best.argsort(-1, descending=True)[..., None]
        source = a.gather(1, order.expand(-1, -1, x.shape[-1]))
        target = partner[..., None].gather(1, order).expand(-1, -1, x.shape[-1])
        return b.scatter_reduce(1, target, source, reduce="mean")


def test_merging_counts_its_similarity_alone() -> None:
    x = torch.randn(2, 8, 4)
    assert count_macs(Merging(), x).macs == 2 * 4 * 4 * 4
    _agree(Merging(), x)


def test_native_attention_is_counted_by_both_meters() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    by_hand = 4 * 5 * 16 * 16 + 2 * 5 * 5 * 16 + 2 * 5 * 16 * 32
    check = crosscheck_macs(model, torch.randn(1, 5, 16))
    assert (check.macs, check.fvcore_macs) == (by_hand, by_hand)


class Products(nn.Module):
    """Products that torch's counter has no formula for."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        batch = torch.stack([a, a])
        return torch.mv(a, b).sum() + torch.dot(b, b) + torch.addmv(b, a, b).sum() + torch.addbmm(a, batch, batch).sum()


def test_products_with_vectors_and_reduced_batches_count() -> None:
    check = crosscheck_macs(Products(), (torch.randn(4, 4), torch.randn(4)))
    assert check.macs == 16 + 4 + 16 + 2 * 64
    assert check.fvcore_macs == check.macs


class Spectral(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        grid = torch.zeros(1, 4, 4, 2, device=x.device)
        return nn.functional.grid_sample(torch.fft.ifft2(torch.fft.fft2(x)).real, grid, align_corners=False)


def test_what_may_hide_products_is_named() -> None:
    count = count_macs(Spectral(), torch.randn(1, 1, 4, 4))
    assert count.macs == 0
    assert dict(count.uncounted) == {"aten::_fft_c2c": 1, "aten::_fft_r2c": 1, "aten::grid_sampler_2d": 1} or dict(
        count.uncounted
    ) == {"aten::_fft_c2c": 2, "aten::grid_sampler_2d": 1}


def test_a_custom_operator_is_named() -> None:
    @torch.library.custom_op("rescompress_tests::hidden_product", mutates_args=())
    def hidden(x: Tensor) -> Tensor:
        return x @ x

    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return hidden(x)

    count = count_macs(Custom(), torch.ones(3, 3))
    assert dict(count.uncounted) == {"rescompress_tests::hidden_product": 1}
    assert count.how == "real"  # it has no meta kernel


def test_upsampling_and_norms_are_free_and_unnamed(small: nn.Module) -> None:
    model = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), small)
    count = count_macs(model, torch.zeros(1, 3, 4, 4))
    assert count.macs == 8 * 8 * 8 * 27 + 80
    assert count.uncounted == ()


def test_modules_add_up(small: nn.Module) -> None:
    count = count_macs(small, torch.zeros(2, 3, 8, 8))
    rows = {row.fqn: row for row in count.modules}
    conv, head = 2 * 64 * 8 * 27, 2 * 80
    assert rows[""].macs == count.macs == conv + head
    assert (rows["conv"].macs, rows["conv"].parameters, rows["conv"].output_shape) == (conv, 224, (2, 8, 8, 8))
    assert (rows["head"].macs, rows["head"].kind) == (head, "Linear")
    assert rows["norm"].macs == 0


def test_a_shared_module_counts_every_call() -> None:
    layer = nn.Linear(4, 4)
    rows = {row.fqn: row for row in count_macs(nn.Sequential(layer, layer), torch.zeros(1, 4)).modules}
    assert (rows["0"].calls, rows["0"].macs, rows[""].macs) == (2, 32, 32)


def test_a_model_that_looks_at_values_is_run(branching: nn.Module) -> None:
    yes, no = count_macs(branching, torch.ones(1, 4)), count_macs(branching, -torch.ones(1, 4))
    assert (yes.how, yes.macs, no.macs) == ("real", 32, 16)


def test_int8_and_half_count_as_float_does() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    x = torch.zeros(1, 3, 160, 160)
    model = timm.create_model("test_vit").eval()
    expected = count_macs(model, x).macs
    assert count_macs(copy.deepcopy(model).half(), x.half()).macs == expected
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert count_macs(model, x).macs == expected


def test_torchscript_is_counted_as_a_whole(small: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        scripted = torch.jit.trace(small.eval(), torch.zeros(1, 3, 8, 8))
    assert count_macs(scripted, torch.zeros(1, 3, 8, 8)).macs == 64 * 8 * 27 + 80


def test_a_compiled_model_is_counted(small: nn.Module) -> None:
    compiled = torch.compile(small, backend="eager")
    assert count_macs(compiled, torch.zeros(1, 3, 8, 8)).macs == 64 * 8 * 27 + 80


class Nosy(nn.Module):
    """Counts its calls in a buffer, draws random numbers and looks at values: it runs for real."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.frozen = nn.Dropout(0.5).eval()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * torch.rand(()) if x.sum() >= 0 else x


def test_nothing_is_left_behind() -> None:
    model = Nosy().train()
    model.frozen.eval()
    model.layer(torch.ones(1, 4)).sum().backward()
    gradient = model.layer.weight.grad.clone()
    state, fast_path = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    flash = torch.backends.cuda.flash_sdp_enabled()
    count_macs(model, torch.ones(1, 4))
    with pytest.raises(MeasureError, match="Nosy does not run on the example input"):
        count_macs(model, torch.ones(1, 5))
    assert_close(model.calls, torch.zeros(()))
    assert_close(model.layer.weight.grad, gradient)
    assert (model.training, model.layer.training, model.frozen.training) == (True, True, False)
    assert model.layer.weight.requires_grad
    assert not model.layer._forward_hooks and not model.layer._forward_pre_hooks
    assert_close(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.backends.cuda.flash_sdp_enabled() == flash
