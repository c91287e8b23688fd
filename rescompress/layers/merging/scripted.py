"""The merging blocks of timm's and torchvision's plain Vision Transformers, which TorchScript reads."""

from typing import Any, Optional, Tuple  # noqa: UP035  TorchScript reads these

from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.layers.merge import proportional_bias
from rescompress.layers.merging.base import MergingBlock


class MergeAttention(nn.Module):
    """timm's self-attention that also weighs keys by token size and returns its mean key as a metric.

    Args:
        attn: `timm.layers.attention.Attention`; its children are adopted, not copied.

    Shape:
        - x: (B, N, C)
        - size: (B, N, 1) or None
        - Output: (B, N, C) and the metric (B, N, head_dim)
    """

    __constants__ = ["attn_dim", "head_dim", "num_heads"]

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads: int = attn.num_heads
        self.head_dim: int = attn.head_dim
        self.attn_dim: int = attn.attn_dim
        self.qkv: nn.Module = attn.qkv
        self.q_norm: nn.Module = attn.q_norm
        self.k_norm: nn.Module = attn.k_norm
        self.attn_drop: nn.Dropout = attn.attn_drop
        self.norm: nn.Module = attn.norm
        self.gate: nn.Module | None = getattr(attn, "gate", None)
        self.proj: nn.Module = attn.proj
        self.proj_drop: nn.Module = attn.proj_drop

    def forward(self, x: Tensor, size: Optional[Tensor]) -> Tuple[Tensor, Tensor]:  # noqa: UP006, UP045
        B, N, _ = x.shape
        gate: Optional[Tensor] = None  # noqa: UP045
        if self.gate is not None:
            gate = self.gate(x).sigmoid()
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=proportional_bias(size), dropout_p=self.attn_drop.p if self.training else 0.0
        )
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x)), k.mean(dim=1)


class MergeMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` as self-attention that weighs keys by token size and returns its mean key.

    Args:
        attn: a batch-first one; its parameters are shared, not copied.

    Shape:
        - x: (B, N, C)
        - size: (B, N, 1) or None
        - Output: (B, N, C) and the metric (B, N, head_dim)
    """

    __constants__ = ["dropout", "head_dim", "num_heads"]

    def __init__(self, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads: int = attn.num_heads
        self.head_dim: int = attn.head_dim
        self.dropout: float = float(attn.dropout)
        self.in_proj_weight: nn.Parameter = attn.in_proj_weight
        self.in_proj_bias: nn.Parameter | None = attn.in_proj_bias
        self.out_proj: nn.Module = attn.out_proj

    def forward(self, x: Tensor, size: Optional[Tensor]) -> Tuple[Tensor, Tensor]:  # noqa: UP006, UP045
        B, N, C = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=proportional_bias(size), dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(x.transpose(1, 2).reshape(B, N, C)), k.mean(dim=1)


class TimmMergeBlock(MergingBlock):
    """timm's pre-norm block with merging: LayerScale, qk-norm, gates and drop-path are the old block's own.

    Shape:
        - Input: (B, P + N, C), or with more channels where sizes travel with the tokens
        - Output: (B, P + N - r, C), or with more channels

    Raises:
        RuntimeError: in forward, when the host passes an attention mask, which has no meaning for merged tokens.
    """

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        if attn_mask is not None or is_causal:
            raise RuntimeError("token_merge has no meaning under an attention mask; call the model without one")
        x, size, place, source = self.enter(x)
        y, metric = self.attn(self.norm1(x), size)
        x = x + self.drop_path1(self.ls1(y))
        x, size, place, source = self.merge((x, size, place, source), metric)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return self.leave((x, size, place, source))


class TimmPostNormMergeBlock(MergingBlock):
    """timm's block with a norm behind attention and MLP, with merging.

    Shape:
        - Input: (B, P + N, C), or with more channels where sizes travel with the tokens
        - Output: (B, P + N - r, C), or with more channels

    Raises:
        RuntimeError: in forward, when the host passes an attention mask, which has no meaning for merged tokens.
    """

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        if attn_mask is not None or is_causal:
            raise RuntimeError("token_merge has no meaning under an attention mask; call the model without one")
        x, size, place, source = self.enter(x)
        y, metric = self.attn(x, size)
        x = x + self.drop_path1(self.norm1(y))
        x, size, place, source = self.merge((x, size, place, source), metric)
        x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return self.leave((x, size, place, source))


class TorchvisionMergeBlock(MergingBlock):
    """torchvision's encoder block with merging.

    Shape:
        - Input: (B, P + N, C), or with more channels where sizes travel with the tokens
        - Output: (B, P + N - r, C), or with more channels
    """

    def forward(self, x: Tensor) -> Tensor:
        x, size, place, source = self.enter(x)
        y, metric = self.self_attention(self.ln_1(x), size)
        x = x + self.dropout(y)
        x, size, place, source = self.merge((x, size, place, source), metric)
        x = x + self.mlp(self.ln_2(x))
        return self.leave((x, size, place, source))
