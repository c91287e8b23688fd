"""The two networks of the small recipe: minutes on two CPU cores, and yet with the parts that compression works on."""

from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


def small_resnet(num_classes: int = 10, in_chans: int = 1, width: int = 16, blocks: int = 1) -> "SmallResNet":
    """Build a residual network of three stages with random weights."""
    return SmallResNet(num_classes, in_chans, width, blocks)


def small_vit(num_classes: int = 10, in_chans: int = 1, img_size: int = 32, depth: int = 4) -> VisionTransformer:
    """Build a ViT with patches of 4 x 4 pixels, 48 channels and 3 heads, with random weights."""
    return VisionTransformer(
        img_size=img_size,
        patch_size=4,
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=48,
        depth=depth,
        num_heads=3,
        dynamic_img_size=True,  # mixed resolutions give it images of several sizes
    )


class SmallResNet(nn.Module):
    """The CIFAR network of He et al., https://arxiv.org/abs/1512.03385, 6 * blocks + 2 layers deep.

    Shape:
        - Input: (B, in_chans, H, W)
        - Output: (B, num_classes)
    """

    def __init__(self, num_classes: int, in_chans: int, width: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.stages = nn.Sequential(
            *(
                ResidualBlock(before if block == 0 else after, after, stride if block == 0 else 1)
                for before, after, stride in stages
                for block in range(blocks)
            )
        )
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: (B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
