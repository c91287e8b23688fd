"""Transformer blocks that merge tokens between attention and MLP; each adopts the block that it replaces.

Bolya et al., "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461, written from the paper.

`scripted` holds the blocks that TorchScript reads, `general` the block for all others, which is told the names of a
class's parts; `timm_blocks`, `transformers_blocks` and `mmseg_blocks` hold those names and the attentions of these
libraries.
"""
