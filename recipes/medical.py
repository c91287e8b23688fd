"""Train classifiers of biomedical images (MedMNIST) with one resolution or several, and test them at several.

python recipes/medical.py fit --config recipes/configs/medical/cnn_mixed.yaml
"""

from rescompress.lightning import Classifier, ImageData, main

if __name__ == "__main__":
    main(Classifier, ImageData, subclass_mode_data=True)
