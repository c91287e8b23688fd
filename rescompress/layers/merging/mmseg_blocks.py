"""Attentions of mmseg's Vision Transformers that weigh keys by token size, and where the parts of their blocks are."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rescompress.layers.merging.base import MergingAttention
from rescompress.layers.merging.general import GeneralMergeBlock, Parts
from rescompress.layers.token_positions import gather_bias


class MmcvAttention(MergingAttention):
    """mmcv's wrapper of `nn.MultiheadAttention`, without what it adds of its input.

    Shape:
        - x: (B, N, C)
        - size: (B, N, 1) or None
        - Output: (B, N, C), no weights, and the mean key (B, N, head_dim)
    """

    def forward(
        self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]
    ) -> tuple[Tensor, None, Tensor]:
        inner = self.attn
        qkv = F.linear(x, inner.in_proj_weight, inner.in_proj_bias).unflatten(-1, (3, inner.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = inner.out_proj(self.attend(q, k, v, size, None, dropout_p=inner.dropout if self.training else 0.0))
        return self.dropout_layer(self.proj_drop(x)), None, k.mean(dim=1)


class BeitAttention(MergingAttention):
    """mmseg's attention of BEiT and MAE: a table of relative positions, separate biases of queries and values."""

    def forward(
        self, x: Tensor, size: Tensor | None, index: Tensor | None, given: dict[str, Any]
    ) -> tuple[Tensor, None, Tensor]:
        if self.bias == "qv_bias":
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
            qkv = F.linear(x, self.qkv.weight, bias)
        else:
            qkv = self.qkv(x)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        positions = None
        if self.relative_position_bias_table is not None:
            positions = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
            if index is not None:
                positions = gather_bias(positions, index)
        dropout = self.attn_drop.p if self.training else 0.0
        x = self.attend(q, k, v, size, positions, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x)), None, k.mean(dim=1)


class MmsegMergeLayer(GeneralMergeBlock):
    """mmseg's layer: its MLP may add its input by itself."""

    def mlp_output(self, x: Tensor) -> Tensor:
        """Return what the MLP adds."""
        return self.ffn.dropout_layer(self.ffn.gamma2(self.ffn.layers(x)))  # type: ignore[no-any-return]


ATTENTIONS: dict[str, type[MergingAttention]] = {
    "mmcv.cnn.bricks.transformer.MultiheadAttention": MmcvAttention,
    "mmseg.models.backbones.beit.BEiTAttention": BeitAttention,
    "mmseg.models.backbones.mae.MAEAttention": BeitAttention,
}

_BEIT = Parts(mlp="ffn", after_attention=("gamma_1", "drop_path"), after_mlp=("gamma_2", "drop_path"), places=True)

BLOCKS: dict[str, Parts] = {
    "mmseg.models.backbones.vit.TransformerEncoderLayer": Parts(mlp="ffn"),
    "mmseg.models.backbones.beit.BEiTTransformerEncoderLayer": _BEIT,
    "mmseg.models.backbones.mae.MAETransformerEncoderLayer": _BEIT,
}
