"""What several tests of export make: a small model, and a copy of a file with something else in it."""

import zipfile

from torch import nn
from torchvision.models.vision_transformer import VisionTransformer


def small_vit():
    """Return torchvision's ViT for images of 32 pixels and 10 classes, and that side."""
    vit = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    # A head of zeros, torchvision's own start, would make every comparison of outputs succeed.
    nn.init.normal_(vit.heads.head.weight, std=0.1)
    return vit, 32


def rewrite(source, target, change=lambda name, data: data, add=()):
    """Copy an archive, checksums and all, with members changed (to what `change` gives), left out (None) or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data, info.compress_type)
        for name, data in add:
            new.writestr(f"small/{name}", data)
    return target
