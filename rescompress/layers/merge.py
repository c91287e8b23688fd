"""Merge the most similar tokens of a sequence: bipartite soft matching and proportional attention.

Bolya et al., "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461, written from the paper.

Between blocks the number of patches that each token stands for travels as one more channel of the sequence, so that
nothing is stored in the model during a forward pass and any host that passes tokens from block to block will do.
"""

from typing import Optional, Tuple  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor


def match_tokens(metric: Tensor, r: int, num_prefix_tokens: int) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
    """Say which patch tokens merge: the sequence is split by alternation into sets A and B; each token of A finds its
    most similar token of B by the cosine of `metric`; the `r` best pairs are merged.

    Shape:
        - metric: (B, P + N, D), 1 <= r <= N // 2
        - Output: which of A are kept (B, A - r), which are merged (B, r), and into which of B (B, r)
    """
    # Position p of the whole sequence is in A when p is even, as in the paper, wherever the patches begin.
    first_a = num_prefix_tokens + num_prefix_tokens % 2
    first_b = num_prefix_tokens + 1 - num_prefix_tokens % 2
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(1e-6)
    similarity = metric[:, first_a::2] @ metric[:, first_b::2].transpose(-1, -2)
    best_score, best_b = similarity.max(dim=-1)
    order = best_score.argsort(dim=-1, descending=True)
    merged_a = order[:, :r]
    kept_a = order[:, r:].sort(dim=-1)[0]
    return kept_a, merged_a, best_b.gather(1, merged_a)


def merge_matched(
    x: Tensor,
    size: Tensor,
    match: Tuple[Tensor, Tensor, Tensor],  # noqa: UP006
    num_prefix_tokens: int,
) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """Merge matched tokens, each pair into the size-weighted mean of its members.

    The order is kept: prefix, the rest of A, then B.

    Shape:
        - x: (B, P + N, C)
        - size: (B, P + N, 1)
        - Output: (B, P + N - r, C) and (B, P + N - r, 1)
    """
    prefix = num_prefix_tokens
    first_a = prefix + prefix % 2
    first_b = prefix + 1 - prefix % 2
    kept_a, merged_a, target_b = match[0].unsqueeze(-1), match[1].unsqueeze(-1), match[2].unsqueeze(-1)
    weighted = torch.cat([x * size, size], dim=-1)
    width = weighted.shape[-1]
    a, b = weighted[:, first_a::2], weighted[:, first_b::2]
    b = b.scatter_add(1, target_b.expand(-1, -1, width), a.gather(1, merged_a.expand(-1, -1, width)))
    patch_sums = torch.cat([a.gather(1, kept_a.expand(-1, -1, width)), b], dim=1)
    new_size = patch_sums[..., -1:]
    patch_means = patch_sums[..., :-1] / new_size
    return torch.cat([x[:, :prefix], patch_means], dim=1), torch.cat([size[:, :prefix], new_size], dim=1)


def keep_matched(place: Tensor, match: Tuple[Tensor, Tensor, Tensor], num_prefix_tokens: int) -> Tensor:  # noqa: UP006
    """Return the rows of the tokens that stay, in the order of `merge_matched`: a merged token has that of its B.

    Shape:
        - Input: (B, P + N, D)
        - Output: (B, P + N - r, D)
    """
    prefix = num_prefix_tokens
    kept_a = match[0].unsqueeze(-1).expand(-1, -1, place.shape[-1])
    a, b = place[:, prefix + prefix % 2 :: 2], place[:, prefix + 1 - prefix % 2 :: 2]
    return torch.cat([place[:, :prefix], a.gather(1, kept_a), b], dim=1)


def source_of_matched(
    length: int,
    match: Tuple[Tensor, Tensor, Tensor],  # noqa: UP006
    num_prefix_tokens: int,
) -> Tensor:
    """Say for every token of a sequence of `length` where it is after `merge_matched`: (B, length)."""
    prefix = num_prefix_tokens
    kept_a, merged_a, target_b = match
    batch, kept = kept_a.shape[0], kept_a.shape[1]
    device = kept_a.device
    first_b = prefix + kept
    of_a = torch.empty([batch, kept + merged_a.shape[1]], dtype=torch.long, device=device)
    of_a = of_a.scatter(1, kept_a, torch.arange(prefix, first_b, device=device).expand(batch, -1))
    of_a = of_a.scatter(1, merged_a, first_b + target_b)
    source = torch.arange(length, device=device).repeat(batch, 1)
    even = torch.arange(prefix + prefix % 2, length, 2, device=device)
    odd = torch.arange(prefix + 1 - prefix % 2, length, 2, device=device)
    source = source.scatter(1, even.expand(batch, -1), of_a)
    of_b = torch.arange(first_b, first_b + odd.shape[0], device=device)
    return source.scatter(1, odd.expand(batch, -1), of_b.expand(batch, -1))


def repeat_merged(x: Tensor, size: Tensor, num_patch_tokens: int, num_prefix_tokens: int) -> Tensor:
    """Return each patch token as often as the patches it stands for, one after the other.

    Whatever does not depend on the order of the tokens makes of them what it would make of all patches.

    Shape:
        - x: (B, P + M, C)
        - size: (B, P + M, 1), whose patch tokens stand for `num_patch_tokens` patches together
        - Output: (B, P + num_patch_tokens, C)
    """
    ends = size[:, num_prefix_tokens:, 0].float().round().cumsum(1)
    places = torch.arange(num_patch_tokens, device=x.device)
    index = (ends[:, None, :] <= places[None, :, None]).sum(-1).clamp(max=ends.shape[1] - 1)
    patches = x[:, num_prefix_tokens:].gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :num_prefix_tokens], patches], dim=1)


def weigh_merged(x: Tensor, size: Tensor, num_prefix_tokens: int) -> Tensor:
    """Scale patch tokens so that their plain mean is the mean over the patches that they stand for.

    Shape:
        - x: (B, P + M, C)
        - size: (B, P + M, 1)
        - Output: (B, P + M, C)
    """
    patches = size[:, num_prefix_tokens:]
    weight = patches / patches.mean(dim=1, keepdim=True)
    return torch.cat([x[:, :num_prefix_tokens], x[:, num_prefix_tokens:] * weight], dim=1)


def proportional_bias(size: Optional[Tensor]) -> Optional[Tensor]:  # noqa: UP045
    """Return log(size) as an additive attention mask, so that a merged token weighs as much as its members.

    Shape:
        - Input: (B, N, 1)
        - Output: (B, 1, 1, N)
    """
    if size is None:
        return None
    return size.log()[:, None, None, :, 0]


def unpack(x: Tensor, width: int) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """Split the last `width` channels, which travel with a sequence, off it: (B, N, C + W) to (B, N, C), (B, N, W)."""
    return x[..., :-width].contiguous(), x[..., -width:]


def places_of(grid: Tuple[int, int], num_prefix_tokens: int, like: Tensor) -> Tensor:  # noqa: UP006
    """Return the row and the column of every token of a whole grid, 0 for prefix tokens.

    Two channels and not one: bfloat16 holds whole numbers up to 256 only.

    Shape:
        - like: (B, P + H * W, C)
        - Output: (B, P + H * W, 2)
    """
    patches = torch.arange(grid[0] * grid[1], device=like.device)
    places = torch.stack([patches // grid[1], patches % grid[1]], dim=-1)
    prefix = torch.zeros([num_prefix_tokens, 2], dtype=places.dtype, device=like.device)
    return torch.cat([prefix, places]).to(like.dtype).expand(like.shape[0], -1, -1)


def index_of(place: Tensor, grid: Tuple[int, int], num_prefix_tokens: int) -> Tensor:  # noqa: UP006
    """Return where the tokens at these places stand in the sequence of the whole grid: (B, M, 2) to (B, M)."""
    cells = place.long()
    index = num_prefix_tokens + cells[..., 0] * grid[1] + cells[..., 1]
    prefix = torch.arange(num_prefix_tokens, device=place.device).expand(place.shape[0], -1)
    return torch.cat([prefix, index[:, num_prefix_tokens:]], dim=1)
