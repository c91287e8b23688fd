"""Transformer blocks that merge tokens between attention and MLP; each adopts the children of the block it replaces.

Bolya et al., "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461, written from the paper.
"""

from typing import Any, Optional, Self, Tuple  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.layers.merge import merge_tokens, pack_size, proportional_bias, unpack_size
from rescompress.layers.wrap import Wrapped


class MergeAttention(nn.Module):
    """timm's self-attention that also weighs keys by token size and returns its mean key as a metric.

    Shape:
        - x: (B, N, C)
        - size: (B, N, 1) or None
        - Output: (B, N, C) and the metric (B, N, head_dim)
    """

    __constants__ = ["attn_dim", "head_dim", "num_heads"]

    @classmethod
    def from_attention(cls, attn: nn.Module) -> "MergeAttention":
        """Build from `timm.layers.attention.Attention`; its children are adopted, not copied."""
        return cls(attn)

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

    Shape:
        - x: (B, N, C)
        - size: (B, N, 1) or None
        - Output: (B, N, C) and the metric (B, N, head_dim)
    """

    __constants__ = ["dropout", "head_dim", "num_heads"]

    @classmethod
    def from_attention(cls, attn: nn.MultiheadAttention) -> "MergeMultiheadAttention":
        """Build from a batch-first self-attention; parameters are shared, not copied."""
        return cls(attn)

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


class _MergeBlock(nn.Module):
    """What the merging blocks have in common: how many pairs they merge, and whether sizes travel with the tokens."""

    __constants__ = ["num_prefix_tokens", "r", "size_comes_in", "size_goes_out"]

    @classmethod
    def from_block(
        cls, block: nn.Module, r: int, num_prefix_tokens: int, size_comes_in: bool, size_goes_out: bool
    ) -> Self:
        """Build from the block to be replaced; its children are adopted, not copied."""
        new = cls(block)
        new.r = r
        new.num_prefix_tokens = num_prefix_tokens
        new.size_comes_in = size_comes_in
        new.size_goes_out = size_goes_out
        return new.train(block.training)

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.r: int = 0
        self.num_prefix_tokens: int = 0
        self.size_comes_in: bool = False
        self.size_goes_out: bool = False

    def extra_repr(self) -> str:
        return f"r={self.r}"


class TimmMergeBlock(_MergeBlock):
    """timm's pre-norm block with merging: LayerScale, qk-norm, gates and drop-path are the old block's own.

    Shape:
        - Input: (B, P + N, C), or (B, P + N, C + 1) when sizes travel with the tokens
        - Output: (B, P + N - r, C), or with C + 1 channels

    Raises:
        RuntimeError: in forward, when the host passes an attention mask, which has no meaning for merged tokens.
    """

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        # In the order of the old block, so that state dicts list the same names in the same order.
        self.norm1: nn.Module = block.norm1
        self.attn = MergeAttention.from_attention(block.attn)
        self.ls1: nn.Module = block.ls1
        self.drop_path1: nn.Module = block.drop_path1
        self.norm2: nn.Module = block.norm2
        self.mlp: nn.Module = block.mlp
        self.ls2: nn.Module = block.ls2
        self.drop_path2: nn.Module = block.drop_path2

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        if attn_mask is not None or is_causal:
            raise RuntimeError("token_merge has no meaning under an attention mask; call the model without one")
        size: Optional[Tensor] = None  # noqa: UP045
        if self.size_comes_in:
            x, size = unpack_size(x)
        y, metric = self.attn(self.norm1(x), size)
        x = x + self.drop_path1(self.ls1(y))
        if self.r > 0:
            x, size = merge_tokens(x, size, metric, self.r, self.num_prefix_tokens)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if self.size_goes_out and size is not None:
            x = pack_size(x, size)
        return x


class TorchvisionMergeBlock(_MergeBlock):
    """torchvision's encoder block with merging.

    Shape:
        - Input: (B, P + N, C), or (B, P + N, C + 1) when sizes travel with the tokens
        - Output: (B, P + N - r, C), or with C + 1 channels
    """

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.ln_1: nn.Module = block.ln_1
        self.self_attention = MergeMultiheadAttention.from_attention(block.self_attention)
        self.dropout: nn.Module = block.dropout
        self.ln_2: nn.Module = block.ln_2
        self.mlp: nn.Module = block.mlp

    def forward(self, x: Tensor) -> Tensor:
        size: Optional[Tensor] = None  # noqa: UP045
        if self.size_comes_in:
            x, size = unpack_size(x)
        y, metric = self.self_attention(self.ln_1(x), size)
        x = x + self.dropout(y)
        if self.r > 0:
            x, size = merge_tokens(x, size, metric, self.r, self.num_prefix_tokens)
        x = x + self.mlp(self.ln_2(x))
        if self.size_goes_out and size is not None:
            x = pack_size(x, size)
        return x


class MeanOfMerged(Wrapped):
    """The norm behind the last block, for heads that average: weighs each patch token by the patches it stands for.

    The plain mean that the head takes over its output is then the mean over all original patches.

    Shape:
        - Input: (B, P + N, C + 1), sizes in the last channel
        - Output: (B, P + N, C)
    """

    __constants__ = ["num_prefix_tokens"]

    def __init__(self, inner: nn.Module, num_prefix_tokens: int) -> None:
        super().__init__(inner)
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        x, size = unpack_size(x)
        x = self.inner(x)
        patches = size[:, self.num_prefix_tokens :]
        weight = patches / patches.mean(dim=1, keepdim=True)
        return torch.cat([x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :] * weight], dim=1)


MERGE_BLOCKS: dict[str, type[TimmMergeBlock] | type[TorchvisionMergeBlock]] = {
    "timm.models.vision_transformer.Block": TimmMergeBlock,
    "torchvision.models.vision_transformer.EncoderBlock": TorchvisionMergeBlock,
}
"""Block classes that can be adopted, by dotted name of the class itself: a subclass may compute something else."""

ATTENTIONS = ("timm.layers.attention.Attention", "torch.nn.modules.activation.MultiheadAttention")
"""Attention classes that the blocks above know how to adopt."""
