"""MLP-Mixer, ResMLP, gMLP and gMixer of timm: linear layers mix the positions of one grid.

Tolstikhin et al., "MLP-Mixer", https://arxiv.org/abs/2105.01601; Touvron et al., "ResMLP",
https://arxiv.org/abs/2105.03404; Liu et al., "Pay Attention to MLPs", https://arxiv.org/abs/2105.08050
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Grid, ViTAnatomy
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, class_names, image_of
from rescompress.families._timm import patches, sequence

MODULE = "timm.models.mlp_mixer"
MIXING = {
    f"{MODULE}.MixerBlock": {"mlp_tokens.fc1": "columns", "mlp_tokens.fc2": "rows"},
    f"{MODULE}.ResBlock": {"linear_tokens": "square"},
    f"{MODULE}.SpatialGatingUnit": {"proj": "square"},
}
"""The linear layers over positions of each class of block, and whether they read or write every position, or both."""


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes.

    Raises:
        UnsupportedModelError: its blocks mix positions in a way that is not known.
    """
    host: Any = model
    height, width = image_of(model, args, kwargs).shape[-2:]
    parts = patches(model, "stem", (height, width))
    grid = parts["pos_embed_grid"]
    mixed = _mixing(model)
    for block in host.blocks:
        if not any(module in mixed for module in block.modules()):
            raise UnsupportedModelError(
                f"this {type(model).__name__} has blocks of class {class_names(block)[0]}, and it is not known how "
                f"they mix positions; known are {', '.join(MIXING)}"
            )
    return ViTAnatomy(
        family=FAMILY.name,
        refit=refit,
        pos_embed=None,
        pos_embed_prefix_tokens=0,
        num_prefix_tokens=0,
        norm="norm",
        mean_pooled=host.global_pool == "avg",
        **parts,
        **sequence("blocks", host.blocks, grid),
    )


def refit(host: Any, anatomy: ViTAnatomy, grid: Grid) -> None:
    """Let each layer that mixes positions compute on the new grid what it computed on the old one."""
    old = anatomy.grids[0] or grid
    names = {module: fqn for fqn, module in host.named_modules()}
    for linear, layout in _mixing(host).items():
        surgery.resample(host, f"{names[linear]}.weight", layout, old, grid)
        if layout != "columns":
            linear.out_features = grid[0] * grid[1]
            if linear.bias is not None:
                surgery.resample(host, f"{names[linear]}.bias", "rows", old, grid)
        if layout != "rows":
            linear.in_features = grid[0] * grid[1]


def _mixing(host: nn.Module) -> dict[nn.Linear, str]:
    """Return the linear layers over positions and their layouts."""
    found: dict[nn.Linear, str] = {}
    for module in host.modules():
        for fqn, layout in MIXING.get(class_names(module)[0], {}).items():
            linear = surgery.get(module, fqn)
            if not isinstance(linear, nn.Linear):
                raise UnsupportedModelError(
                    f"{fqn!r} of {class_names(module)[0]} is a {type(linear).__name__}; only an nn.Linear over the "
                    "positions can be resampled"
                )
            found[linear] = layout
    return found


FAMILY = Family(
    name="mlp_mixer",
    summary="MLP-Mixer, ResMLP, gMLP and gMixer of timm: the weights over positions are resampled",
    methods=("patch_resize", "input_resize", "quantize"),
    hosts=(f"{MODULE}.MlpMixer",),
    describe=describe,
)
