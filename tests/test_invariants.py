"""The eight invariants of the design, for every model and method of the zoo."""

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rescompress as rc
from rescompress.families import describe
from rescompress.measure.macs import count_macs
from rescompress.self_check import self_check
from rescompress.surgery import fingerprint
from tests.zoo import MODELS, PAIRS, REFUSED, STEPS, build, image, why_not


@dataclass
class Pair:
    """A model of the zoo, compressed by one step, with what was known of it before."""

    name: str
    step: rc.Step
    original: nn.Module
    small: nn.Module
    x: Tensor
    expected: Tensor
    before: dict[str, int]
    state_before: dict[str, Tensor]


@pytest.fixture(scope="module", params=PAIRS, ids=[f"{model}-{step}" for model, step in PAIRS])
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(*request.param)


def make_pair(name: str, kind: str) -> Pair:
    """Compress a model of the zoo by one step."""
    model = build(name)
    x = image(name)
    with torch.no_grad():
        expected = model(x)
    before = fingerprint(model)
    state_before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()  # a user's model may be in any mode
    step = STEPS[kind]()
    small = rc.compress(model, step, example_input=x)
    assert small.training and model.training
    return Pair(name, step, model.eval(), small.eval(), x, expected, before, state_before)


def test_identity(pair: Pair) -> None:
    same = rc.compress(pair.original, pair.step.identity(), example_input=pair.x)
    with torch.no_grad():
        tolerance = 1e-6 * max(1.0, pair.expected.abs().max().item())
        torch.testing.assert_close(same(pair.x), pair.expected, rtol=0, atol=tolerance)
        # and the reduction itself is no identity: the check above can fail
        assert (pair.small(pair.x) - pair.expected).abs().max() > 1e-3


def test_names_survive(pair: Pair) -> None:
    assert list(pair.small.state_dict()) == list(pair.state_before)
    loaded = copy.deepcopy(pair.small)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(pair.state_before)  # a checkpoint from before
    with torch.no_grad():
        torch.testing.assert_close(loaded(pair.x), pair.small(pair.x), rtol=1e-5, atol=1e-5)
    loaded.load_state_dict(pair.small.state_dict())  # and one from after
    with torch.no_grad():
        torch.testing.assert_close(loaded(pair.x), pair.small(pair.x), rtol=0, atol=0)


def test_original_is_untouched(pair: Pair) -> None:
    assert fingerprint(pair.original) == pair.before
    for key, value in pair.original.state_dict().items():
        torch.testing.assert_close(value, pair.state_before[key], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(pair.original(pair.x), pair.expected, rtol=0, atol=0)
    shared = {p.data_ptr() for p in pair.original.parameters()} & {p.data_ptr() for p in pair.small.parameters()}
    assert not shared


def test_works_or_raises(pair: Pair) -> None:
    assert rc.spec_of(pair.small) == rc.Spec.of(pair.step)
    with pytest.raises(rc.RescompressError):
        rc.compress(pair.original, rc.Spec(), example_input=pair.x)


def test_cost_falls_as_predicted(pair: Pair) -> None:
    predicted = predicted_macs(pair)
    measured = count_macs(pair.small, pair.x).macs
    assert measured == pytest.approx(predicted, rel=1e-6)
    assert measured < count_macs(pair.original, pair.x).macs


def predicted_macs(pair: Pair) -> float:
    """Return what the arithmetic of the method says, from counts of the original at other sizes, or by formula."""
    side = pair.x.shape[-1]
    half = pair.x[..., : side // 2, : side // 2]
    if MODELS[pair.name].kind == "conv":
        at_half = count_macs(build(pair.name, side // 2), half)
        if isinstance(pair.step, rc.InputResize):
            return at_half.macs
        # everything behind the first convolution as at half the image side, the first convolution as before
        first = next(row.fqn for row in at_half.modules if row.fqn == describe(pair.original, (pair.x,)).first_conv)
        whole = count_macs(pair.original, pair.x)
        return at_half.macs - macs_of(at_half, first) + macs_of(whole, first)
    if isinstance(pair.step, rc.InputResize | rc.PatchResize):
        at_half = count_macs(build(pair.name, side // 2), half)
        if isinstance(pair.step, rc.InputResize):
            return at_half.macs
        # patches of twice the side read every pixel of the whole image once
        return at_half.macs + 3 * macs_of(at_half, describe(pair.original, (pair.x,)).patch_conv)
    return block_macs(pair)


def macs_of(count: object, fqn: str) -> int:
    return next(row.macs for row in count.modules if row.fqn == fqn)


def block_macs(pair: Pair) -> float:
    """Return the MACs of a ViT whose blocks see fewer tokens, from its dimensions alone."""
    anatomy = describe(pair.original, (pair.x,))
    merged = rc.compress(pair.original, pair.step, example_input=pair.x)._rescompress.anatomy.num_patch_tokens
    width = getattr(pair.original, "embed_dim", pair.original.get_submodule(anatomy.patch_conv).out_channels)
    block = pair.original.get_submodule(anatomy.blocks[0])
    mlp = sum(
        module.in_features * module.out_features
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and "att" not in name
    )
    heads = next(
        getattr(module, name)
        for name in ("num_heads", "num_attention_heads")
        for module in block.modules()
        if hasattr(module, name)
    )
    mixed = heads if hasattr(getattr(block, "attn", None), "proj_l") else 0  # CaiT: linear layers over the heads, twice
    batch, full = pair.x.shape[0], anatomy.num_patch_tokens[0]
    prefix = anatomy.num_prefix_tokens if anatomy.prefix_from_block == 0 else 0

    def cost(tokens_in: int, tokens_out: int) -> int:
        products = 2 * tokens_in**2 * (width + mixed**2)
        if hasattr(block, "local_mp"):  # XCiT: attention between the channels of a head, and two convolutions of 3 x 3
            products = 2 * tokens_in * width * (width // heads + 9)
        return batch * (tokens_in * 4 * width**2 + products + tokens_out * mlp)

    change = 0
    for i in range(len(anatomy.blocks)):
        if isinstance(pair.step, rc.TokenPool):
            inside = outside = merged[i] + prefix
        else:
            inside, outside = merged[i] + prefix, merged[i + 1] + prefix
            first_b = 1 - prefix % 2
            set_b = (merged[i] - first_b + 1) // 2
            change += batch * set_b * (merged[i] - set_b) * (width // heads) if merged[i] > merged[i + 1] else 0
        change += cost(inside, outside) - cost(full + prefix, full + prefix)
    # Behind the blocks, each attention of one query: keys and values of every token that is left; merged tokens are
    # repeated there as often as the patches they stand for.
    pooled = [getattr(pair.original, "attn_pool", None)]
    for name in ("blocks_token_only", "cls_attn_blocks"):
        pooled += getattr(pair.original, name, [])
    lost = full - merged[-1] if isinstance(pair.step, rc.TokenPool) else 0
    change -= sum(part is not None for part in pooled) * batch * lost * (2 * width * width + 2 * width)
    return count_macs(pair.original, pair.x).macs + change


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[subprocess.Popen[str]]:
    """A process that runs TorchScript files and has never imported rescompress."""
    code = (
        "import json, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "for line in sys.stdin:\n"
        "    path, io_path = json.loads(line)\n"
        "    saved = torch.load(io_path, weights_only=True)\n"
        "    with torch.no_grad(): y = torch.jit.load(path).eval()(saved['x'])\n"
        "    error = (y - saved['y']).abs().max().item()\n"
        "    alien = [m for m in sys.modules if m.split('.')[0] in ('rescompress', 'timm', 'torchvision')]\n"
        "    print(json.dumps([error, alien]), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


def test_export_equals_eager(pair: Pair, fresh_process: subprocess.Popen[str], tmp_path: Path) -> None:
    path, io_path = tmp_path / "small.pt", tmp_path / "io.pt"
    rc.export(pair.small, path, pair.x)
    x = image(pair.name, batch=3)  # another batch size than it was written with
    with torch.no_grad():
        y = pair.small(x)
    torch.save({"x": x, "y": y}, io_path)
    fresh_process.stdin.write(json.dumps([str(path), str(io_path)]) + "\n")
    fresh_process.stdin.flush()
    error, alien = json.loads(fresh_process.stdout.readline())
    assert error <= 1e-4 * max(1.0, y.abs().max().item())
    assert alien == []
    assert rc.read_spec(path) == rc.Spec.of(pair.step)
    weights = sum(t.numel() * t.element_size() for t in pair.small.state_dict().values())
    assert abs(path.stat().st_size - weights) <= 0.05 * weights + 600_000  # the code of the program itself
    path.unlink()


def test_spec_is_data(pair: Pair) -> None:
    spec = rc.spec_of(pair.small)
    assert rc.Spec.from_json(spec.to_json()) == spec
    assert rc.Spec.from_yaml(spec.to_yaml()) == spec
    with pytest.raises(AttributeError):
        spec.steps[0].scale = 0.1
    wrong = {**pair.step.to_dict(), "scael": 1}
    with pytest.raises(rc.SpecError, match="has no option 'scael'"):
        rc.Spec.from_dict({"steps": [wrong]})


def test_pickles_and_copies(pair: Pair) -> None:
    with torch.no_grad():
        expected = pair.small(pair.x)
        for other in (pickle.loads(pickle.dumps(pair.small)), copy.deepcopy(pair.small)):
            torch.testing.assert_close(other(pair.x), expected, rtol=0, atol=0)
            assert rc.spec_of(other) == rc.spec_of(pair.small)
            other.load_state_dict(pair.state_before)  # the state-dict hooks have come along
    stream = io.BytesIO()
    torch.save(pair.small.state_dict(), stream)
    stream.seek(0)
    assert list(torch.load(stream, weights_only=True)) == list(pair.state_before)


def test_gradients_reach_every_parameter(pair: Pair) -> None:
    had = gradients(copy.deepcopy(pair.original), pair.x)
    has = gradients(copy.deepcopy(pair.small), pair.x)
    assert {name for name, grad in had.items() if grad is not None} == {
        name for name, grad in has.items() if grad is not None
    }
    for name, grad in has.items():
        assert grad is None or (grad.isfinite().all() and grad.abs().max() > 0), name


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Return the gradient of every parameter under the name that it has in the state dict."""
    model.zero_grad()
    y = model(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    by_id = {id(p): p.grad for p in model.parameters()}
    return {name: by_id[id(p)] for name, p in model.state_dict(keep_vars=True).items() if id(p) in by_id}


def test_compiles_without_graph_breaks(pair: Pair) -> None:
    torch.compiler.reset()
    compiled = torch.compile(pair.small, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pair.x), pair.small(pair.x), rtol=1e-5, atol=1e-5)


def test_replicates(pair: Pair) -> None:
    """Copies as `nn.parallel.replicate` makes them, which needs CUDA devices itself, compute the same."""
    modules = list(pair.small.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        for key, child in module._modules.items():
            copies[module]._modules[key] = None if child is None else copies[child]
        for key, parameter in module._parameters.items():
            if parameter is None:
                copies[module]._parameters[key] = None
            else:  # replicas hold plain tensors
                setattr(copies[module], key, parameter.detach().clone())
    with torch.no_grad():
        # Not bit for bit: matrix products round by where in memory a copy begins.
        tolerance = 1e-5 * max(1.0, pair.expected.abs().max().item())
        torch.testing.assert_close(copies[pair.small](pair.x), pair.small(pair.x), rtol=1e-5, atol=tolerance)


def test_forward_keeps_no_state(pair: Pair) -> None:
    def attributes() -> dict[str, list[str]]:
        return {name: sorted(vars(module)) for name, module in pair.small.named_modules()}

    before = attributes()
    with torch.no_grad():
        first = pair.small(pair.x)
        pair.small(pair.x[:1] * 3)
        torch.testing.assert_close(pair.small(pair.x), first, rtol=0, atol=0)
    assert attributes() == before
    for module in pair.small.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize(("model", "step"), REFUSED, ids=[f"{model}-{step}" for model, step in REFUSED])
def test_unsupported_pairs_are_refused_with_a_reason(model: str, step: str) -> None:
    assert why_not(model, step)
    with pytest.raises(rc.UnsupportedModelError, match=step):
        rc.compress(build(model), STEPS[step](), example_input=image(model))


def test_a_wrong_family_is_caught_by_the_identity_check() -> None:
    """The check is no formality: a step that changes the model at zero reduction is refused."""

    class Wrong(rc.StemResize):
        kind = "wrong_for_test"

        def identity(self) -> rc.Step:
            return rc.StemResize(scale=0.5)

    model = build("resnet18")
    x = image("resnet18")
    with pytest.raises(rc.UnsupportedModelError, match="at zero reduction changes what"):
        self_check(model, rc.Spec.of(Wrong(scale=0.5)), describe(model, (x,)), (x,), {})
