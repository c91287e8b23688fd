"""Attentions of timm's Vision Transformers that weigh keys by token size, and where the parts of their blocks are."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rescompress.layers.merging.base import MergingAttention
from rescompress.layers.merging.general import Parts, rotated
from rescompress.layers.token_positions import ROTARY_PARTS, gather_bias, gather_rotary

Seen = tuple[Tensor, None, Tensor]
"""What a merging attention returns: its output (B, N, C), no weights, and its mean key (B, N, head_dim)."""


class PlainAttention(MergingAttention):
    """Attention over the output of one projection `qkv`, without positions.

    Shape:
        - x: (B, N, C), the patch and prefix tokens
        - size: (B, N, 1) or None
        - index: where the tokens stand in the whole sequence (B, N), or None where it is whole
        - given: the block's arguments
    """

    def forward(self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]) -> Seen:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        x = self.attend(q, k, v, size, None, dropout_p=dropout)
        return self.proj_drop(self.proj(x)), None, k.mean(dim=1)


class RotaryAttention(MergingAttention):
    """timm's EvaAttention and AttentionRope: fused and separate projections, grouped keys, gates, rotary positions.

    The metric is the mean key before it is rotated: tokens are compared by what they show, not by where they are.
    """

    def forward(self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]) -> Seen:
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        metric = k.mean(dim=1)
        if given.get("rope") is not None:
            table, prefix = given["rope"], self.num_prefix_tokens
            if index is not None:
                table = gather_rotary(table, index[:, prefix:] - prefix)
            sin, cos = table.chunk(2, dim=-1)
            half = bool(getattr(self, "rotate_half", False))
            q = torch.cat([q[:, :, :prefix], rotated(q[:, :, prefix:], sin, cos, half)], dim=2).type_as(v)
            k = torch.cat([k[:, :, :prefix], rotated(k[:, :, prefix:], sin, cos, half)], dim=2).type_as(v)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        x = self.norm(self.attend(q, k, v, size, None, dropout_p=self.attn_drop.p if self.training else 0.0))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x)), None, metric

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is None:
            projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)
        qkv = _biased_qkv(self, x) if getattr(self, "q_bias", None) is not None else self.qkv(x)
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[no-any-return]


class GemmaAttention(MergingAttention):
    """Gemma 4's attention: normed queries, keys and values, half of whose channels turns with each axis."""

    def forward(self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]) -> Seen:
        q, k, v = (
            norm(project(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
            for project, norm in ((self.q_proj, self.q_norm), (self.k_proj, self.k_norm), (self.v_proj, self.v_norm))
        )
        metric = k.mean(dim=1)
        sin, cos = (given[name].unsqueeze(1) for name in ROTARY_PARTS)
        if index is not None:
            sin, cos = gather_rotary(sin, index), gather_rotary(cos, index)
        q, k = _turned_by_axis(q, sin, cos), _turned_by_axis(k, sin, cos)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        dropout = self.attn_drop.p if self.training else 0.0
        x = self.attend(q, k, v, size, None, dropout_p=dropout, scale=1.0)
        return self.proj_drop(self.o_proj(x)), None, metric


def _turned_by_axis(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    halves = zip(x.chunk(2, dim=-1), sin.chunk(2, dim=-1), cos.chunk(2, dim=-1), strict=True)
    return torch.cat([rotated(part, part_sin, part_cos, True) for part, part_sin, part_cos in halves], dim=-1)


class RelPosAttention(MergingAttention):
    """timm's attention with a relative-position bias of its own, or one that all blocks share."""

    def forward(self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]) -> Seen:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = self.rel_pos.get_bias() if self.rel_pos is not None else given.get("shared_rel_pos")
        if bias is not None and index is not None:
            bias = gather_bias(bias, index)
        x = self.attend(q, k, v, size, bias, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(x)), None, k.mean(dim=1)


class BeitAttention(MergingAttention):
    """BEiT's attention: separate biases of queries and values, a table of relative positions, one that is shared."""

    def forward(self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]) -> Seen:
        qkv = self.qkv(x) if self.q_bias is None else _biased_qkv(self, x)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = given.get("shared_rel_pos_bias")
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        if bias is not None and index is not None:
            bias = gather_bias(bias, index)
        x = self.attend(q, k, v, size, bias, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(x)), None, k.mean(dim=1)


class TalkingHeadsAttention(MergingAttention):
    """CaiT's attention, which mixes the heads before and after the softmax, so that no fused kernel computes it."""

    def forward(self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]) -> Seen:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        logits = self.proj_l(((q * self.scale) @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        weights = logits.softmax(dim=-1).permute(0, 2, 3, 1)
        if size is None:
            weights = self.proj_w(weights)
        else:
            # The heads are mixed with a bias for each key: for one patch's share of the token's weight, then for all.
            share = size[:, None]
            weights = self.proj_w(weights / share) * share
        weights = weights.permute(0, 3, 1, 2)
        x = (self.attn_drop(weights) @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x)), None, k.mean(dim=1)


def _biased_qkv(attn: Any, x: Tensor) -> Tensor:
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if attn.qkv_bias_separate:
        return attn.qkv(x) + bias  # type: ignore[no-any-return]
    return F.linear(x, attn.qkv.weight, bias)


ATTENTIONS: dict[str, type[MergingAttention]] = {
    "timm.layers.attention.AttentionRope": RotaryAttention,
    "timm.models.eva.EvaAttention": RotaryAttention,
    "timm.models.vision_transformer_relpos.RelPosAttention": RelPosAttention,
    "timm.models.beit.Attention": BeitAttention,
    "timm.models.cait.TalkingHeadAttn": TalkingHeadsAttention,
    "timm.models.convit.MHSA": PlainAttention,
    "timm.models.gemma4_vit.Gemma4Attention": GemmaAttention,
}

_DROPS: dict[str, Any] = {"after_attention": ("drop_path1",), "after_mlp": ("drop_path2",)}
_GAMMAS: dict[str, Any] = {"after_attention": ("gamma_1", "drop_path1"), "after_mlp": ("gamma_2", "drop_path2")}
_POST_NORMS: dict[str, Any] = {
    "norms": None,
    "after_attention": ("norm1", "drop_path1"),
    "after_mlp": ("norm2", "drop_path2"),
}

BLOCKS: dict[str, Parts] = {
    "timm.models.eva.EvaBlock": Parts(**_GAMMAS, places=True),
    "timm.models.eva.EvaBlockPostNorm": Parts(**_POST_NORMS, places=True),
    "timm.models.deepseek_vit.DeepseekVitBlock": Parts(**_DROPS, places=True),
    "timm.models.beit.Block": Parts(**_GAMMAS, places=True),
    "timm.models.vision_transformer_relpos.RelPosBlock": Parts(
        after_attention=("ls1", "drop_path1"), after_mlp=("ls2", "drop_path2"), places=True
    ),
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": Parts(**_POST_NORMS, places=True),
    "timm.models.cait.LayerScaleBlock": Parts(
        after_attention=("gamma_1", "drop_path"), after_mlp=("gamma_2", "drop_path")
    ),
    "timm.models.convit.Block": Parts(after_attention=("drop_path",), after_mlp=("drop_path",)),
    "timm.models.gemma4_vit.Gemma4Block": Parts(
        norms=("norm1", "norm3"), after_attention=("norm2", "drop_path"), after_mlp=("norm4", "drop_path"), places=True
    ),
}
