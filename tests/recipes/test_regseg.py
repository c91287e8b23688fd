"""RegSeg is the network of its paper: its size, its cost and its dilations (Gao, https://arxiv.org/abs/2111.09957)."""

import pytest
import torch
from torch.testing import assert_close

from recipes.regseg import DilatedBlock, RegSeg, regseg
from rescompress.measure import count_macs

PAPER_PARAMETERS = 3.34e6
PAPER_MACS = 39.1e9  # at 1024 x 2048
PAPER_DILATIONS = [(1, 1), (1, 2), *[(1, 4)] * 4, *[(1, 14)] * 7]  # of the 13 blocks behind the last halving
PAPER_FIELD_OF_VIEW = 3807


@pytest.fixture(scope="module")
def model() -> RegSeg:
    return regseg().eval()


def blocks_of(model: RegSeg) -> list[DilatedBlock]:
    return [module for module in model.modules() if isinstance(module, DilatedBlock)]


def dilations_of(block: DilatedBlock) -> tuple[int, ...]:
    found = tuple(conv.dilation[0] for conv in block.dilated)
    return found * 2 if len(found) == 1 else found  # one convolution is two of its dilation: a test below


def test_the_parameters_are_the_papers(model: RegSeg) -> None:
    counted = sum(parameter.numel() for parameter in model.parameters())

    assert counted == pytest.approx(PAPER_PARAMETERS, rel=0.002)  # 3,334,951


def test_the_macs_are_the_papers_less_what_fvcore_counts_besides_products(model: RegSeg) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    small = torch.zeros(1, 3, 256, 512)

    macs = count_macs(model, torch.zeros(1, 3, 1024, 2048)).macs
    analysis = fvcore.FlopCountAnalysis(model, small).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    besides = analysis.total() - count_macs(model, small).macs  # BatchNorm, interpolation, means: all go by the pixels

    assert macs == pytest.approx(38.35e9, abs=0.005e9)
    assert macs + 16 * besides == pytest.approx(PAPER_MACS, abs=0.05e9)


def test_the_dilations_are_the_papers(model: RegSeg) -> None:
    blocks = blocks_of(model)

    assert [dilations_of(block) for block in blocks[-13:]] == PAPER_DILATIONS
    assert {dilations_of(block) for block in blocks[:-13]} == {(1, 1)}


def test_the_field_of_view_is_the_papers(model: RegSeg) -> None:
    side, step = 3, 2  # of the stem

    for block in blocks_of(model):
        side += 2 * max(dilations_of(block)) * step
        step *= block.dilated[0].stride[0]

    assert side == PAPER_FIELD_OF_VIEW


def test_one_convolution_is_two_parallel_ones_of_its_dilation() -> None:
    torch.manual_seed(0)
    one, two = DilatedBlock(32, 32, (1,)).eval(), DilatedBlock(32, 32, (1, 1)).eval()
    weights = one.state_dict()
    halves = weights.pop("dilated.0.weight").chunk(2)
    two.load_state_dict({**weights, "dilated.0.weight": halves[0], "dilated.1.weight": halves[1]})
    x = torch.rand(2, 32, 9, 7)

    assert_close(two(x), one(x))


def test_an_image_of_odd_sides_gets_a_prediction_for_each_pixel(model: RegSeg) -> None:
    x = torch.rand(2, 3, 65, 99)

    with torch.no_grad():
        logits, maps = model(x), model.stage8(model.stage4(model.stem(x)))

    assert maps.shape == (2, 128, 9, 13)
    assert logits.shape == (2, 19, 65, 99)
