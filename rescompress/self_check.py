"""Prove on clones that a spec does to a model what it says and nothing else, before anything is returned.

Clones share the model's weights. At zero reduction a clone must give the model's own outputs; as asked for, it must
run, call every module that was put in, cost less, and give outputs of the same kind.
"""

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from rescompress import surgery
from rescompress.anatomy import Anatomy, ConvAnatomy, Grid, ViTAnatomy
from rescompress.errors import RescompressWarning, SmallerGridError, SpecError, UnsupportedModelError, one_line
from rescompress.families._base import image_of
from rescompress.families._tables import TableReads, read_in_part
from rescompress.layers.wrap import RestoredMap
from rescompress.outputs import are_detections, compare_kinds, difference, refuse_empty_outputs, tensors_in
from rescompress.spec import Samples, Spec, Stage, Step

Call = tuple[tuple[Any, ...], dict[str, Any]]

_TO_A_FAMILY = "describe it by a family: docs/how-to/add-a-family.md (one file)"
_FIXED_GRID = f"; its positions may be laid out for one grid; {_TO_A_FAMILY}"


def self_check(
    model: nn.Module,
    spec: Spec,
    anatomy: Anatomy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    samples: Samples | None = None,
) -> list[str]:
    """Try a spec on clones: at zero reduction, then as it is. Return what the caller should be warned of.

    Raises:
        SpecError: a step does not fit this model or changes nothing in it.
        UnsupportedModelError: the outputs at zero reduction differ from the model's own, or the reduced model fails.
    """
    name, kinds, call = type(model).__name__, " + ".join(step.kind for step in spec), (args, kwargs)
    image = image_of(model, args, kwargs)
    _refuse_empty_example(image, name)
    given = Samples(call) if samples is None else samples
    visible = _visible_weights(model)
    original = _clone(model, visible)
    reference, cost_before, read_before = _run(original, call, "the model itself does not run on its example input")
    if not tensors_in(reference):
        raise UnsupportedModelError(f"this {name} returns no tensors that could be compared")
    refuse_empty_outputs(reference, name)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RescompressWarning)
        reduced = _clone(model, visible)
        before = list(reduced.modules())  # kept alive: a new module might get the identity of one that is gone
        smaller, _ = apply_steps(reduced, spec, anatomy, given)
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, RescompressWarning)]
    identity = _clone(model, visible)
    unchanged, _ = apply_steps(identity, spec.identity(), anatomy, given)

    same, *_ = _run(identity, call, f"{kinds} at zero reduction breaks this {name}")
    apart = difference(reference, same)
    if apart is not None and difference(reference, _run(original, call, "the model itself")[0]) is not None:
        raise UnsupportedModelError(
            f"this {name} gives other outputs from call to call, so nothing can be proved of it"
        )
    if apart is not None:  # rounding or a real change? In double precision they are far apart
        apart = _difference_in_double(_clone(model, visible), spec.identity(), anatomy, call)
    if apart is not None:
        raise UnsupportedModelError(
            f"{kinds} at zero reduction changes what this {name} computes ({apart}); "
            "it is refused rather than returned wrong"
        )
    resizes = any(step.stage < Stage.PRECISION and step != step.identity() for step in spec)
    called = _watch_new_modules(reduced, before)
    where = "on the smaller grid of" if resizes else "after"
    failing = SmallerGridError if resizes else UnsupportedModelError
    small, cost_after, read_after = _run(reduced, call, f"this {name} does not work {where} {kinds}", failing)
    idle = [fqn for fqn, was_called in called.items() if not was_called]
    if idle:
        raise UnsupportedModelError(
            f"{kinds} would change nothing: the forward of this {name} never calls its module {idle[0]!r}, but reaches "
            "what it does in another way"
        )
    # Pooled tokens read the entries of a table for the distances of their windows, and so fewer of them.
    pools = any(step.stage == Stage.TOKENS for step in spec)
    if anatomy.grid is not None and smaller.grid is not None and not pools:
        _refuse_lost_positions(read_before, read_after, (anatomy.grid, smaller.grid), kinds, name)
    # keep=1.0 is no step of zero reduction by its options, and yet reduces nothing. The cost of a detector hangs on how
    # many things it finds.
    counts = not are_detections(reference)
    is_vit = isinstance(anatomy, ViTAnatomy)
    # Smaller patches cost a ViT more, and may be asked for.
    saves = cost_after != cost_before if is_vit else cost_after < cost_before
    if counts and resizes and smaller != unchanged and not saves and _has_body(model, anatomy):
        remedy = "; shorten the sequence in front of blocks that compute on it" if is_vit else ""
        raise UnsupportedModelError(
            f"{kinds} saves nothing in this {name}: {cost_before / 2e6:.2f} MMACs before, {cost_after / 2e6:.2f} after"
            f"{remedy}"
        )
    if counts and resizes and _has_body(model, anatomy):
        _refuse_idle_steps(model, spec, anatomy, given)
    return messages + compare_kinds(reference, small, image.shape[2:], kinds, name)


def _refuse_lost_positions(
    before: TableReads, after: TableReads, grids: tuple[Grid, Grid], kinds: str, name: str
) -> None:
    """Raise where the smaller map takes the first rows of a table of positions, which are those of other places.

    Raises:
        UnsupportedModelError: it does; no shape tells, and so the network runs.
    """
    (rows, columns), (fewer_rows, fewer_columns) = grids
    found = read_in_part(before, after, fewer_rows * fewer_columns / (rows * columns))
    if found is not None:
        table, read, of = found
        raise UnsupportedModelError(
            f"{kinds} would put the positions of this {name} in wrong places: on the smaller grid it reads {read} of "
            f"the {of} rows of {table!r} that it read before, where the table should be resampled; {_TO_A_FAMILY}"
        )


def _refuse_idle_steps(model: nn.Module, spec: Spec, anatomy: Anatomy, samples: Samples) -> None:
    """Raise where one of several steps makes the grid smaller and saves nothing, which the others would hide.

    Costs are counted on the meta device, or where the model does not run there, on its own.

    Raises:
        UnsupportedModelError: one does.
    """
    steps = tuple(step for step in spec if step.stage < Stage.PRECISION)
    if len(steps) < 2:
        return
    counted: list[tuple[Anatomy, int]] = []
    # A model that computes with values fails on the meta device; and where the first steps alone make a grid that does
    # not fit the network, there is nothing to count.
    for device in ("meta", None):
        with contextlib.suppress(Exception):
            counted = counted or _costs(model, steps, anatomy, samples, device)
    is_vit = isinstance(anatomy, ViTAnatomy)
    for step, (old, before), (new, after) in zip(steps, counted, counted[1:], strict=False):
        saves = after != before if is_vit else after < before
        if new != old and not saves:
            raise UnsupportedModelError(
                f"{step.to_dict()} saves nothing in this {type(model).__name__}: {before / 2e6:.2f} MMACs before this "
                f"step, {after / 2e6:.2f} after; leave it out, or take a smaller grid"
            )


def _costs(
    model: nn.Module, steps: tuple[Step, ...], anatomy: Anatomy, samples: Samples, device: str | None
) -> list[tuple[Anatomy, int]]:
    """Return the anatomy and the floating-point operations of the model before any step and after each."""
    call: Call = samples.example or ((), {})
    if device is not None:
        call = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, call)
        samples = Samples(call)
    found = []
    for count in range(len(steps) + 1):
        clone, reached = surgery.clone_shared(model, device).eval(), anatomy
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RescompressWarning)  # given already
            if count:
                reached, _ = apply_steps(clone, Spec(steps[:count]), anatomy, samples)
        found.append((reached, _run(clone, call, "counting costs")[1]))
    return found


def _refuse_empty_example(image: Tensor, name: str) -> None:
    """Raise where an example can prove nothing: whatever a model does to NaN or to no image, the outcome is the same.

    Raises:
        UnsupportedModelError: the batch is empty, or holds no finite value.
    """
    if image.numel() == 0:
        raise UnsupportedModelError(
            f"the example input of this {name} holds no image: its shape is {tuple(image.shape)}, so nothing can be "
            "proved with it; give an example_input of one image or more"
        )
    if not image.is_meta and not bool(image.isfinite().any()):
        raise UnsupportedModelError(
            f"the example input of this {name} holds no finite value, so nothing can be proved with it; give an "
            "example_input like real images, such as torch.rand"
        )


def _has_body(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether the model computes on the grid, so that a smaller one must cost less.

    A resized side branch, such as one that only predicts a crop, leaves the cost of the network as it was, and so does
    a pooling behind the last block; a single convolution has nothing behind it.
    """
    if isinstance(anatomy, ConvAnatomy):
        return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1
    return isinstance(anatomy, ViTAnatomy)


def apply_steps(
    model: nn.Module, spec: Spec, anatomy: Anatomy, samples: Samples | None = None
) -> tuple[Anatomy, tuple[str, ...]]:
    """Apply a spec in place and return the new anatomy and what each step did, a line or more.

    Raises:
        SpecError: a step does not fit this model or changes nothing in it, or needs samples that are not there.
        UnsupportedModelError: a method does not fit this kind of model.
    """
    log: list[str] = []
    for step in spec:
        before = surgery.fingerprint(model)
        _alive = [*model.modules(), *model.parameters()]  # so that nothing new gets the identity of what is gone
        applied = step.apply_with(model, anatomy, Samples() if samples is None else samples)
        if surgery.fingerprint(model) == before:
            raise SpecError(f"{step.to_dict()} changed nothing in this {type(model).__name__}")
        told = applied.notes or (_change(anatomy, applied.anatomy),)
        log.extend(f"{step.kind}: {line}" for line in told)
        anatomy = applied.anatomy
    return anatomy, tuple(log)


def _change(before: Anatomy, after: Anatomy) -> str:
    """Say in one line what a step did to the grid."""
    if isinstance(before, ViTAnatomy) and isinstance(after, ViTAnatomy) and before.grids[0] == after.grids[0]:
        return f"{before.num_patch_tokens[-1]} -> {after.num_patch_tokens[-1]} patch tokens leave the last block"
    old, new = before.grid, after.grid
    if old is None or new is None:
        return "the grid is dissolved"
    return f"grid {old[0]} x {old[1]} -> {new[0]} x {new[1]}, scale {(new[0] * new[1] / (old[0] * old[1])) ** 0.5:.4g}"


def _visible_weights(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return stand-ins for weights so near to zero that they would hide errors from the check, by identity.

    Fresh models have heads of zeros and LayerScale of 1e-5: whatever their blocks do, the outputs stay the same.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for parameter in model.parameters():
        hidden = parameter.is_floating_point() and not parameter.is_meta and parameter.numel() > 0
        if hidden and type(parameter) is nn.Parameter and bool(parameter.detach().abs().max() < 1e-3):
            value = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim < 2 else 0.02)
            found[id(parameter)] = nn.Parameter(value.to(parameter), requires_grad=parameter.requires_grad)
    return found


def _clone(model: nn.Module, visible: dict[int, nn.Parameter]) -> nn.Module:
    try:
        return surgery.clone_shared(model, replaced=visible).eval()
    except Exception as error:  # whatever a foreign __deepcopy__ raises
        raise UnsupportedModelError(
            f"this {type(model).__name__} cannot be copied, so nothing can be tried on it: {one_line(error)}; use "
            "torch.nn.utils.parametrizations instead of the old weight_norm or prune, and keep no locks in modules"
        ) from error


class _CountProducts(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products by torch's own formulas.

    FlopCounterMode itself also tracks modules, which fails where a parameter is the input of one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _run(
    model: nn.Module, call: Call, failing: str, kind: type[UnsupportedModelError] = UnsupportedModelError
) -> tuple[Any, int, TableReads]:
    """Run a clone; return its outputs, the floating-point operations of its matrix products and what tables it read."""
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the products, and rounds otherwise than plain attention
    try:
        with torch.no_grad(), same_random_numbers(), _CountProducts() as counter, TableReads(model) as reads:
            outputs = model(*args, **kwargs)
    except Exception as error:  # the host's own code runs here and may raise anything
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
        reason = one_line(error) if str(error).strip() else _where(error)
        remedy = _FIXED_GRID if kind is SmallerGridError else ""
        raise kind(f"{failing} (inputs {shapes}): {type(error).__name__}: {reason}{remedy}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return outputs, counter.flops, reads


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Let every run draw the same random numbers, for hosts that start from some in each call; the user's go on."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)
        if devices:
            torch.cuda.manual_seed_all(0)
        yield


def _where(error: BaseException) -> str:
    """Return the line of the host's code that raised, for errors without a message."""
    frames = traceback.extract_tb(error.__traceback__)
    library = Path(torch.__file__).parent  # torch._assert raises in its own file: the host's line is the one above
    hosts = [frame for frame in frames[1:] if library not in Path(frame.filename).parents]
    frame = (hosts or frames)[-1]
    return f"{frame.line} ({Path(frame.filename).name}, line {frame.lineno})"


def _watch_new_modules(model: nn.Module, before: list[nn.Module]) -> dict[str, bool]:
    """Return, by FQN, whether each module that surgery put in gets called; filled in while the clone runs."""
    known = {id(module) for module in before}
    new = [
        fqn
        for fqn, module in model.named_modules()
        # One without a forward is a table: its host reads it in another way. A restored map changes a size at most, and
        # mmseg calls the forward of its heads past all hooks.
        if id(module) not in known
        and type(module).forward is not nn.Module.forward
        and not isinstance(module, RestoredMap)
    ]
    outermost = [fqn for fqn in new if surgery.split(fqn)[0] not in new]
    called = dict.fromkeys(outermost, False)
    for fqn in outermost:
        # A hook on the clone only: it is thrown away.
        surgery.get(model, fqn).register_forward_hook(lambda *_, fqn=fqn: called.update({fqn: True}))
    return called


def _difference_in_double(model: nn.Module, identity: Spec, anatomy: Anatomy, call: Call) -> str | None:
    def double(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    failing = f"this {type(model).__name__} does not run in double precision"
    # A copy: double() of a shared clone would convert the model's own weights.
    clone = surgery.deep_copy(model).double()
    reference, *_ = _run(clone, tree_map(double, call), failing)
    apply_steps(clone, identity, anatomy, Samples(tree_map(double, call)))
    return difference(reference, _run(clone, tree_map(double, call), failing)[0])
