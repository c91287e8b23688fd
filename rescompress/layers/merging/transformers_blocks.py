"""An attention of transformers' vision layers that weighs keys by token size, and where the layers' parts are."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rescompress.layers.merging.base import MergingAttention
from rescompress.layers.merging.general import GeneralMergeBlock, Parts, rotated
from rescompress.layers.token_positions import BIAS_OF_FEWER, gather_bias, gather_rotary


class TransformersAttention(MergingAttention):
    """Attention by scaled dot-product, whatever implementation the config names; it gives no attention weights.

    Rotary positions come as `position_embeddings`, a relative-position bias as `bias`.

    Shape:
        - x: (B, N, C)
        - size: (B, N, 1) or None
        - index: where the tokens stand in the whole sequence (B, N), or None where it is whole
        - Output: (B, N, C), no weights, and the mean key (B, N, head_dim)
    """

    def forward(
        self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]
    ) -> tuple[Tensor, None, Tensor]:
        q, k, v = self.projected(x)
        metric = k.mean(dim=1)
        if given.get("position_embeddings") is not None:
            q, k = self._rotated(q, k, index, *given["position_embeddings"])
        bias = given.get("bias")
        if bias is not None and index is not None:
            bias = gather_bias(bias, index)
        dropout = _first(getattr(self, "attention", self), "attention_dropout", "dropout_prob", "dropout")
        share = float(getattr(dropout, "p", dropout)) if self.training else 0.0
        x = self.attend(q, k, v, size, bias, dropout_p=share)
        return self.combined(x), None, metric

    def projected(self, x: Tensor) -> Iterator[Tensor]:
        """Return queries, keys and values (B, heads, N, head_dim)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)

    def combined(self, x: Tensor) -> Tensor:
        """Return what the projection behind the heads makes of them."""
        return _first(self, "o_proj", "out_proj", "projection")(x)  # type: ignore[no-any-return]

    def _rotated(self, q: Tensor, k: Tensor, index: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if index is not None:
            prefix = self.num_prefix_tokens
            cos, sin = (gather_rotary(table, index[:, prefix:] - prefix) for table in (cos, sin))
        prefix = q.shape[-2] - sin.shape[-2]
        turned = [torch.cat([x[:, :, :prefix], rotated(x[:, :, prefix:], sin, cos, True)], dim=2) for x in (q, k)]
        return turned[0], turned[1]


class FusedAttention(TransformersAttention):
    """BLIP's attention: one projection for queries, keys and values."""

    def projected(self, x: Tensor) -> Iterator[Tensor]:
        """Return queries, keys and values (B, heads, N, head_dim)."""
        return iter(self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0))


class NestedAttention(TransformersAttention):
    """DPT's and Data2Vec's attention, whose projections are in a module inside and that of the output in another."""

    def projected(self, x: Tensor) -> Iterator[Tensor]:
        """Return queries, keys and values (B, heads, N, head_dim)."""
        inner = self.attention
        projections = (inner.query, inner.key, inner.value)
        return (project(x).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2) for project in projections)

    def combined(self, x: Tensor) -> Tensor:
        """Return what the projection behind the heads makes of them."""
        return self.output.dropout(self.output.dense(x))  # type: ignore[no-any-return]


class BeitMergeLayer(GeneralMergeBlock):
    """BEiT's layer, which computes its relative-position bias itself."""

    def for_attention(self, given: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """Return the bias between all tokens of the layer's grid."""
        if self.relative_position_bias is None:
            return given
        return {"bias": _bias_of(self, self.relative_position_bias, self.patch_size, given)}


class NestedMergeLayer(GeneralMergeBlock):
    """DPT's layer, the second half of whose MLP would add its input by itself."""

    def mlp_output(self, x: Tensor) -> Tensor:
        """Return what the MLP adds."""
        return self.output.dropout(self.output.dense(self.intermediate(x)))  # type: ignore[no-any-return]


class Data2VecMergeLayer(NestedMergeLayer):
    """Data2Vec's layer, whose attention computes a relative-position bias, or is given one that all layers share.

    Shape:
        - Output: a tuple, as the host's; its only element is that of any merging block

    Raises:
        RuntimeError: in forward, when attention weights are asked for, or the shared bias is not for the whole grid.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.argument_names, args, strict=False)) | kwargs
        if given.get("output_attentions"):
            raise RuntimeError("token_merge keeps no attention weights; call the model without output_attentions")
        return (super().forward(x, **given),)

    def for_attention(self, given: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """Return the sum of both biases between all tokens of the layer's grid."""
        inner, shared = self.attention.attention, given.get("relative_position_bias")
        if shared is not None and shared.shape[-1] != self.num_prefix_tokens + self.grid[0] * self.grid[1]:
            raise RuntimeError(BIAS_OF_FEWER)
        if not inner.has_relative_position_bias:
            return {"bias": shared}
        own = _bias_of(self, inner.relative_position_bias, inner.config.patch_size, given)
        return {"bias": own if shared is None else own + shared}


def _bias_of(block: GeneralMergeBlock, table: nn.Module, patch_size: int, given: dict[str, Any]) -> Tensor:
    """Return the bias that a table of relative positions has between all tokens of a block's grid."""
    height, width = given["resolution"]
    tokens = block.num_prefix_tokens + block.grid[0] * block.grid[1]
    interpolated = bool(given.get("interpolate_pos_encoding"))
    return table((height // patch_size, width // patch_size), interpolated, dim_size=tokens)  # type: ignore[no-any-return]


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
        "altclip.modeling_altclip.AltCLIPAttention",
        "chinese_clip.modeling_chinese_clip.ChineseCLIPVisionAttention",
        "metaclip_2.modeling_metaclip_2.MetaClip2Attention",
    )
}
ATTENTIONS |= {
    _MODELS + name: FusedAttention
    for name in (
        "blip.modeling_blip.BlipAttention",
        "blip_2.modeling_blip_2.Blip2Attention",
        "instructblip.modeling_instructblip.InstructBlipAttention",
    )
}
ATTENTIONS |= {
    _MODELS + name: NestedAttention
    for name in (
        "dpt.modeling_dpt.DPTViTAttention",
        "data2vec.modeling_data2vec_vision.Data2VecVisionAttention",
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
_DPT = Parts(attention="attention", norms=("layernorm_before", "layernorm_after"))
_DATA2VEC = replace(_DPT, after_attention=("lambda_1", "drop_path"), after_mlp=("lambda_2", "drop_path"), places=True)

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
        "altclip.modeling_altclip.AltCLIPEncoderLayer": _CLIP,
        "chinese_clip.modeling_chinese_clip.ChineseCLIPVisionLayer": _CLIP,
        "metaclip_2.modeling_metaclip_2.MetaClip2EncoderLayer": _CLIP,
        "blip.modeling_blip.BlipEncoderLayer": _CLIP,
        "blip_2.modeling_blip_2.Blip2EncoderLayer": _CLIP,
        "instructblip.modeling_instructblip.InstructBlipEncoderLayer": _CLIP,
        "dpt.modeling_dpt.DPTViTLayer": _DPT,
        "data2vec.modeling_data2vec_vision.Data2VecVisionLayer": _DATA2VEC,
    }.items()
}
