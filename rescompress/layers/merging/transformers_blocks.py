"""An attention of transformers' vision layers that weighs keys by token size, and where the layers' parts are."""

from typing import Any

import torch
from torch import Tensor

from rescompress.layers.merging.base import MergingAttention
from rescompress.layers.merging.general import GeneralMergeBlock, Parts, rotated
from rescompress.layers.token_positions import gather_bias, gather_rotary


class TransformersAttention(MergingAttention):
    """Attention with separate projections, by scaled dot-product whatever implementation the config names.

    Rotary positions come as `position_embeddings`, a relative-position bias as `bias`. No attention weights are given.

    Shape:
        - x: (B, N, C)
        - size: (B, N, 1) or None
        - index: where the tokens stand in the whole sequence (B, N), or None where it is whole
        - Output: (B, N, C), no weights, and the mean key (B, N, head_dim)
    """

    def forward(
        self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]
    ) -> tuple[Tensor, None, Tensor]:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        metric = k.mean(dim=1)
        if given.get("position_embeddings") is not None:
            q, k = self._rotated(q, k, index, *given["position_embeddings"])
        bias = given.get("bias")
        if bias is not None and index is not None:
            bias = gather_bias(bias, index)
        dropout = _first(self, "attention_dropout", "dropout") if self.training else 0.0
        x = self.attend(q, k, v, size, bias, dropout_p=dropout, scale=_first(self, "scaling", "scale"))
        return _first(self, "o_proj", "out_proj")(x), None, metric

    def _rotated(self, q: Tensor, k: Tensor, index: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if index is not None:
            prefix = self.num_prefix_tokens
            cos, sin = (gather_rotary(table, index[:, prefix:] - prefix) for table in (cos, sin))
        prefix = q.shape[-2] - sin.shape[-2]
        turned = [torch.cat([x[:, :, :prefix], rotated(x[:, :, prefix:], sin, cos, True)], dim=2) for x in (q, k)]
        return turned[0], turned[1]


class BeitMergeLayer(GeneralMergeBlock):
    """BEiT's layer, which computes its relative-position bias itself."""

    def for_attention(self, given: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """Return the bias between all tokens of the layer's grid."""
        if self.relative_position_bias is None:
            return given
        height, width = given["resolution"]
        window = (height // self.patch_size, width // self.patch_size)
        tokens = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        return {
            "bias": self.relative_position_bias(window, bool(given.get("interpolate_pos_encoding")), dim_size=tokens)
        }


def _first(module: Any, *names: str) -> Any:
    """Return the first of these attributes that a module has: libraries name the same thing in several ways."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


_MODELS = "transformers.models."

ATTENTIONS: dict[str, type[MergingAttention]] = {
    _MODELS + name: TransformersAttention
    for name in (
        "vit.modeling_vit.ViTAttention",
        "deit.modeling_deit.DeiTAttention",
        "ijepa.modeling_ijepa.IJepaAttention",
        "vit_msn.modeling_vit_msn.ViTMSNAttention",
        "beit.modeling_beit.BeitAttention",
        "dinov2.modeling_dinov2.Dinov2Attention",
        "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention",
        "dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention",
        "clip.modeling_clip.CLIPAttention",
        "siglip.modeling_siglip.SiglipAttention",
        "siglip2.modeling_siglip2.Siglip2Attention",
    )
}

_VIT = Parts(
    attention="attention",
    norms=("layernorm_before", "layernorm_after"),
    after_attention=("dropout",),
    after_mlp=("dropout",),
)
_BEIT = Parts(
    attention="attention",
    norms=("layernorm_before", "layernorm_after"),
    after_attention=("dropout", "lambda_1", "drop_path"),
    after_mlp=("dropout", "lambda_2", "drop_path"),
    places=True,
)
_SCALES: dict[str, Any] = {"after_attention": ("layer_scale1", "drop_path"), "after_mlp": ("layer_scale2", "drop_path")}
_CLIP = Parts(attention="self_attn", norms=("layer_norm1", "layer_norm2"))

BLOCKS: dict[str, Parts] = {
    _MODELS + name: parts
    for name, parts in {
        "vit.modeling_vit.ViTLayer": _VIT,
        "deit.modeling_deit.DeiTLayer": _VIT,
        "ijepa.modeling_ijepa.IJepaLayer": _VIT,
        "vit_msn.modeling_vit_msn.ViTMSNLayer": _VIT,
        "beit.modeling_beit.BeitLayer": _BEIT,
        "dinov2.modeling_dinov2.Dinov2Layer": Parts(attention="attention", **_SCALES),
        "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": Parts(
            attention="attention", **_SCALES
        ),
        "dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": Parts(attention="attention", **_SCALES, places=True),
        "clip.modeling_clip.CLIPEncoderLayer": _CLIP,
        "siglip.modeling_siglip.SiglipEncoderLayer": _CLIP,
        "siglip2.modeling_siglip2.Siglip2EncoderLayer": _CLIP,
    }.items()
}
