"""Train small classifiers on Fashion-MNIST: every idea of the large recipes, in minutes on two CPU cores.

python recipes/small.py fit --config recipes/configs/small/resnet_stem_050_distilled.yaml
"""

from rescompress.lightning import Classifier, ImageData, main

if __name__ == "__main__":
    main(Classifier, ImageData, subclass_mode_data=True)
