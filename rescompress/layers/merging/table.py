"""Which classes of blocks and attentions can merge tokens, and how a merging block is made from one."""

from collections.abc import Callable
from typing import Any

from torch import nn

from rescompress.layers.adopt import adopt, class_name
from rescompress.layers.merging import mmseg_blocks, timm_blocks, transformers_blocks
from rescompress.layers.merging.base import MergingBlock
from rescompress.layers.merging.general import GeneralMergeBlock, Parts
from rescompress.layers.merging.scripted import (
    MergeAttention,
    MergeMultiheadAttention,
    TimmMergeBlock,
    TimmPostNormMergeBlock,
    TorchvisionMergeBlock,
)
from rescompress.layers.token_positions import SEVERAL_SEQUENCES, argument_names

_SCRIPTED: dict[str, tuple[type[MergingBlock], str]] = {
    "timm.models.vision_transformer.Block": (TimmMergeBlock, "attn"),
    "timm.models.vision_transformer.ResPostBlock": (TimmPostNormMergeBlock, "attn"),
    "torchvision.models.vision_transformer.EncoderBlock": (TorchvisionMergeBlock, "self_attention"),
}
_SCRIPTED_ATTENTIONS: dict[str, Callable[[Any], nn.Module]] = {
    "timm.layers.attention.Attention": MergeAttention,
    "torch.nn.modules.activation.MultiheadAttention": MergeMultiheadAttention,
}
_PARTS: dict[str, Parts] = timm_blocks.BLOCKS | transformers_blocks.BLOCKS | mmseg_blocks.BLOCKS
_ATTENTIONS = timm_blocks.ATTENTIONS | transformers_blocks.ATTENTIONS | mmseg_blocks.ATTENTIONS
_OWN_KINDS: dict[str, type[GeneralMergeBlock]] = {
    "transformers.models.beit.modeling_beit.BeitLayer": transformers_blocks.BeitMergeLayer,
    "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionLayer": transformers_blocks.Data2VecMergeLayer,
    "transformers.models.dpt.modeling_dpt.DPTViTLayer": transformers_blocks.NestedMergeLayer,
    "mmseg.models.backbones.vit.TransformerEncoderLayer": mmseg_blocks.MmsegMergeLayer,
}

BLOCKS = (*_SCRIPTED, *_PARTS)
"""Classes of blocks that can be adopted, by dotted name of the class itself: a subclass may compute something else."""

ATTENTIONS = (*_SCRIPTED_ATTENTIONS, *_ATTENTIONS)
"""Classes of their attentions."""

REFUSED = SEVERAL_SEQUENCES | {
    "timm.models.vision_transformer.ParallelScalingBlock": "attention and MLP run side by side on the same tokens, so "
    "that there is no place between them to merge",
    "timm.models.vision_transformer.DiffParallelScalingBlock": "attention and MLP run side by side on the same tokens, "
    "so that there is no place between them to merge",
    "timm.models.vision_transformer.ParallelThingsBlock": "several attentions run side by side, each with keys of its "
    "own",
    "timm.models.xcit.XCABlock": "a convolution over the grid of tokens follows the attention, and merging dissolves "
    "the grid; token_pool keeps it",
}
"""Classes of blocks that cannot merge, and why."""


def attention_of(block: nn.Module) -> nn.Module | None:
    """Return the attention of a block of a known class."""
    name = class_name(block)
    return getattr(block, _SCRIPTED[name][1] if name in _SCRIPTED else _PARTS[name].attention, None)


def needs_places(block: nn.Module) -> bool:
    """Whether a block of a known class has positions of its own."""
    name = class_name(block)
    return name in _PARTS and _PARTS[name].places


def merging_block(block: nn.Module, num_prefix_tokens: int) -> MergingBlock:
    """Return the block that merges in the place of one of a known class, with its attributes of merging still unset."""
    name = class_name(block)
    new: Any
    if name in _SCRIPTED:
        kind, where = _SCRIPTED[name]
        new = adopt(kind, block)
        attention: nn.Module = _SCRIPTED_ATTENTIONS[class_name(getattr(block, where))](getattr(block, where))
    else:
        parts = _PARTS[name]
        new, where = adopt(_OWN_KINDS.get(name, GeneralMergeBlock), block), parts.attention
        new.parts = parts
        new.argument_names = argument_names(block)
        for side in ("tokens_before", "tokens_after"):
            if not hasattr(block, side):
                setattr(new, side, nn.Identity())
        if not hasattr(block, "host_stride"):
            new.host_stride = (1, 1)
        old = getattr(block, where)
        attention = adopt(_ATTENTIONS[class_name(old)], old)
        if not hasattr(old, "num_prefix_tokens"):
            attention.num_prefix_tokens = num_prefix_tokens  # type: ignore[assignment]
    setattr(new, where, attention.train(block.training))
    return new  # type: ignore[no-any-return]
