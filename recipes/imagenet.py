"""Train classifiers on ImageNet, from folders or shards of images, as they are or compressed.

python recipes/imagenet.py fit --config recipes/configs/imagenet/resnet50_stem_056.yaml
"""

from rescompress.lightning import Classifier, ImageData, main

if __name__ == "__main__":
    main(Classifier, ImageData, subclass_mode_data=True)
