"""Merge the most similar tokens of a sequence: bipartite soft matching and proportional attention.

Bolya et al., "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461, written from the paper.

Between blocks the number of patches that each token stands for travels as one more channel of the sequence, so that
nothing is stored in the model during a forward pass and any host that passes tokens from block to block will do.
"""

from typing import Optional, Tuple  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor


def merge_tokens(
    x: Tensor,
    size: Optional[Tensor],  # noqa: UP045
    metric: Tensor,
    r: int,
    num_prefix_tokens: int,
) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """Merge the `r` most similar pairs of patch tokens, each into the size-weighted mean of its members.

    The sequence is split by alternation into sets A and B; each token of A finds its most similar token of B by the
    cosine of `metric`; the `r` best pairs are merged. Prefix tokens take no part. At most half of the patch tokens
    can go at a time: a larger `r` merges as many as can be. The order is kept: prefix, the rest of A, then B.

    Shape:
        - x: (B, P + N, C)
        - size: (B, P + N, 1), or None where every token still stands for one patch
        - metric: (B, P + N, D)
        - Output: (B, P + N - r, C) and (B, P + N - r, 1)
    """
    if size is None:
        size = torch.ones_like(x[..., :1])
    patches = x.shape[1] - num_prefix_tokens
    r = min(r, patches // 2)
    if r <= 0:
        return x, size

    # Position p of the whole sequence is in A when p is even, as in the paper, wherever the patches begin.
    first_a = num_prefix_tokens + num_prefix_tokens % 2
    first_b = num_prefix_tokens + 1 - num_prefix_tokens % 2
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(1e-6)
    similarity = metric[:, first_a::2] @ metric[:, first_b::2].transpose(-1, -2)
    best_score, best_b = similarity.max(dim=-1)
    order = best_score.argsort(dim=-1, descending=True)
    merged_a = order[:, :r].unsqueeze(-1)
    kept_a = order[:, r:].sort(dim=-1)[0].unsqueeze(-1)
    target_b = best_b.unsqueeze(-1).gather(1, merged_a)

    weighted = torch.cat([x * size, size], dim=-1)
    width = weighted.shape[-1]
    a, b = weighted[:, first_a::2], weighted[:, first_b::2]
    b = b.scatter_add(1, target_b.expand(-1, -1, width), a.gather(1, merged_a.expand(-1, -1, width)))
    patch_sums = torch.cat([a.gather(1, kept_a.expand(-1, -1, width)), b], dim=1)
    new_size = patch_sums[..., -1:]
    patch_means = patch_sums[..., :-1] / new_size
    prefix = num_prefix_tokens
    return torch.cat([x[:, :prefix], patch_means], dim=1), torch.cat([size[:, :prefix], new_size], dim=1)


def proportional_bias(size: Optional[Tensor]) -> Optional[Tensor]:  # noqa: UP045
    """Return log(size) as an additive attention mask, so that a merged token weighs as much as its members.

    Shape:
        - Input: (B, N, 1)
        - Output: (B, 1, 1, N)
    """
    if size is None:
        return None
    return size.log()[:, None, None, :, 0]


def unpack_size(x: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """Split the channel that carries the sizes off a sequence: (B, N, C + 1) to (B, N, C) and (B, N, 1)."""
    return x[..., :-1].contiguous(), x[..., -1:]


def pack_size(x: Tensor, size: Tensor) -> Tensor:
    """Let the sizes travel with the sequence: the inverse of `unpack_size`."""
    return torch.cat([x, size], dim=-1)
