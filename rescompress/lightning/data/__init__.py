"""DataModules: ImageNet as folders and as shards, Cityscapes, MedMNIST, and Fashion-MNIST and ELPV as small ones."""

from rescompress.lightning.data._base import ImageData
from rescompress.lightning.data.check import Check
from rescompress.lightning.data.cityscapes import Cityscapes
from rescompress.lightning.data.elpv import ELPV
from rescompress.lightning.data.fashion_mnist import FashionMNIST
from rescompress.lightning.data.folders import ImageFolders
from rescompress.lightning.data.medmnist import MedMNIST
from rescompress.lightning.data.shards import ImageShards

__all__ = ["ELPV", "Check", "Cityscapes", "FashionMNIST", "ImageData", "ImageFolders", "ImageShards", "MedMNIST"]
