"""How what is behind the blocks reads merged tokens, so that each one counts as often as the patches it stands for."""

import warnings

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ViTAnatomy
from rescompress.errors import RescompressWarning
from rescompress.layers.adopt import class_name, host_class

TOKEN = "prefix tokens only"
MEAN = "the mean of the patch tokens"
ALL = "all tokens, in another way"
UNKNOWN = "unknown"

_LIBRARIES = ("timm", "torchvision", "transformers", "mmseg", "torch")
_READERS = {"forward", "forward_head", "pool"}
"""Methods of hosts that read the tokens behind the last block."""

_OWN = "as the host inside says"
_MODELS = "transformers.models."
_HEADS = {
    _MODELS + name: reading
    for name, reading in {
        "vit.modeling_vit.ViTForImageClassification": TOKEN,
        "deit.modeling_deit.DeiTForImageClassification": TOKEN,
        "deit.modeling_deit.DeiTForImageClassificationWithTeacher": TOKEN,
        "vit_msn.modeling_vit_msn.ViTMSNForImageClassification": TOKEN,
        "beit.modeling_beit.BeitForImageClassification": _OWN,
        "data2vec.modeling_data2vec_vision.Data2VecVisionForImageClassification": _OWN,
        "dinov2.modeling_dinov2.Dinov2ForImageClassification": MEAN,
        "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersForImageClassification": MEAN,
        "ijepa.modeling_ijepa.IJepaForImageClassification": MEAN,
        "clip.modeling_clip.CLIPForImageClassification": MEAN,
        "clip.modeling_clip.CLIPModel": TOKEN,
        "clip.modeling_clip.CLIPVisionModelWithProjection": TOKEN,
        "altclip.modeling_altclip.AltCLIPModel": TOKEN,
        "chinese_clip.modeling_chinese_clip.ChineseCLIPModel": TOKEN,
        "metaclip_2.modeling_metaclip_2.MetaClip2ForImageClassification": MEAN,
        "metaclip_2.modeling_metaclip_2.MetaClip2Model": TOKEN,
        "metaclip_2.modeling_metaclip_2.MetaClip2VisionModelWithProjection": TOKEN,
        "siglip.modeling_siglip.SiglipForImageClassification": MEAN,
        "siglip.modeling_siglip.SiglipModel": _OWN,
    }.items()
}
"""What the forward of a class around a host reads of the host's tokens."""


def reading_of(model: nn.Module, anatomy: ViTAnatomy) -> str:
    """Return what is read of the tokens behind the last block: TOKEN, MEAN, ALL or UNKNOWN.

    UNKNOWN is a host inside a model of an unknown class that is given the host's tokens, not what the host made of
    them, and a host whose class somebody has derived from a library's to read them in another way.
    """
    own = ALL if anatomy.pools_all else MEAN if anatomy.mean_pooled else TOKEN
    if _reads_in_its_own_way(surgery.get(model, anatomy.host)):
        own = UNKNOWN
    if not anatomy.host:
        return own
    path = anatomy.host.split(".")
    for depth in reversed(range(len(path))):
        outer = surgery.get(model, ".".join(path[:depth])) if depth else model
        if class_name(outer) in _HEADS:
            found = _HEADS[class_name(outer)]
            return own if found == _OWN else found
    host = surgery.get(model, anatomy.host)
    gives_tokens = class_name(host).startswith(_MODELS) or getattr(host, "global_pool", None) == ""
    return UNKNOWN if gives_tokens else own


def _reads_in_its_own_way(host: nn.Module) -> bool:
    for base in host_class(host).__mro__:
        if base.__module__.partition(".")[0] in _LIBRARIES:
            return False
        if not _READERS.isdisjoint(vars(base)):
            return True
    return False


def warn_of_readers(model: nn.Module, anatomy: ViTAnatomy, reading: str) -> None:
    """Name what is not weighed, or is not where it was, and cannot be put right from inside the model."""
    host = class_name(surgery.get(model, anatomy.host) if anatomy.host else model)
    if reading == UNKNOWN:
        warnings.warn(
            f"token_merge: {class_name(model)} reads the tokens of {host}, fewer than before, in a way that is not "
            "known: a merged token counts once there, not as often as the patches it stands for, so "
            "a mean over the tokens is not the mean over the patches; train on, or use token_pool, whose tokens all "
            "stand for equally many",
            RescompressWarning,
            stacklevel=2,
        )
    elif reading == ALL and not anatomy.host and host.startswith(_MODELS):
        warnings.warn(
            f"token_merge: {host} pools all tokens and gives them as last_hidden_state as well: there each merged "
            "token stands as often as the patches it stands for, and not in their places, so it is no map",
            RescompressWarning,
            stacklevel=2,
        )
