"""RegSeg, the segmentation network of the paper's Cityscapes experiment: dilated RegNetY blocks, without pretraining.

Gao, "Rethinking Dilated Convolution for Real-time Semantic Segmentation", https://arxiv.org/abs/2111.09957
Its paper says 3.34 M parameters and 39.1 G multiply-accumulates at 1024 x 2048; this one has 3.335 M and 38.35 G,
counted by `rescompress measure recipes.regseg:regseg --input-size 1024x2048`. Its code counts with fvcore, which also
takes two operations for each value that a BatchNorm gives, four for each interpolated and one for each averaged value:
0.72 G more, 39.08 G in all.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP_WIDTH = 16  # channels of one group in a 3 x 3 convolution


def regseg(num_classes: int = 19, in_chans: int = 3) -> "RegSeg":
    """Build it with random weights; in recipes it is the model reference `recipes.regseg:regseg`."""
    return RegSeg(num_classes, in_chans)


class RegSeg(nn.Module):
    """Backbone and decoder.

    Shape:
        - Input: (B, in_chans, H, W)
        - Output: (B, num_classes, H, W), logits brought up from a quarter of the size
    """

    def __init__(self, num_classes: int = 19, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = _conv(in_chans, 32, 3, stride=2)
        self.stage4 = DilatedBlock(32, 48, (1,), stride=2)
        self.stage8 = nn.Sequential(
            DilatedBlock(48, 128, (1,), stride=2), DilatedBlock(128, 128, (1,)), DilatedBlock(128, 128, (1,))
        )
        self.stage16 = nn.Sequential(
            DilatedBlock(128, 256, (1,), stride=2),
            DilatedBlock(256, 256, (1,)),
            DilatedBlock(256, 256, (1, 2)),
            *(DilatedBlock(256, 256, (1, 4)) for _ in range(4)),
            *(DilatedBlock(256, 256, (1, 14)) for _ in range(6)),
            DilatedBlock(256, 320, (1, 14)),
        )
        self.decoder = Decoder((48, 128, 320), num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        at4 = self.stage4(self.stem(x))
        at8 = self.stage8(at4)
        logits = self.decoder(at4, at8, self.stage16(at8))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


class DilatedBlock(nn.Module):
    """RegNetY's residual block, the 3 x 3 convolution split into parallel groups of different dilation ("D block").

    Shape:
        - Input: (B, in_channels, H, W)
        - Output: (B, channels, ceil(H / stride), ceil(W / stride))
    """

    def __init__(self, in_channels: int, channels: int, dilations: tuple[int, ...], stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 1)
        width = channels // len(dilations)
        self.dilated = nn.ModuleList(
            nn.Conv2d(
                width,
                width,
                3,
                stride=stride,
                padding=dilation,
                dilation=dilation,
                groups=width // GROUP_WIDTH,
                bias=False,
            )
            for dilation in dilations
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.excite = SqueezeExcite(channels, in_channels // 4)
        self.conv3 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        shortcut: list[nn.Module] = [nn.AvgPool2d(2, stride=2, ceil_mode=True)] if stride == 2 else []
        if stride == 2 or in_channels != channels:
            shortcut += [nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        parts = y.chunk(len(self.dilated), dim=1)
        y = torch.cat([conv(part) for conv, part in zip(self.dilated, parts, strict=True)], dim=1)
        y = self.conv3(self.excite(F.relu(self.bn2(y))))
        return F.relu(y + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """Weigh the channels by a small network over their means: (B, C, H, W) to the same.

    Hu et al., https://arxiv.org/abs/1709.01507
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.weights = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)


class Decoder(nn.Module):
    """Bring the map of stride 16 up to stride 4, with what the strides 8 and 4 know.

    Shape:
        - Input: (B, 48, H / 4, W / 4), (B, 128, H / 8, W / 8), (B, 320, H / 16, W / 16), sides rounded up
        - Output: (B, num_classes, H / 4, W / 4)
    """

    def __init__(self, channels: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.head4 = _conv(channels[0], 8, 1)
        self.head8 = _conv(channels[1], 128, 1)
        self.head16 = _conv(channels[2], 128, 1)
        self.conv8 = _conv(128, 64, 3)
        self.conv4 = _conv(64 + 8, 64, 3)
        self.classifier = nn.Conv2d(64, num_classes, 1)

    def forward(self, at4: Tensor, at8: Tensor, at16: Tensor) -> Tensor:
        x = self.head8(at8)
        x = self.conv8(x + F.interpolate(self.head16(at16), size=x.shape[-2:], mode="bilinear", align_corners=False))
        y = self.head4(at4)
        x = F.interpolate(x, size=y.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.conv4(torch.cat((x, y), dim=1)))


def _conv(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
