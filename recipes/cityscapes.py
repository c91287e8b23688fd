"""Train segmentors on Cityscapes, as they are or compressed, and score them on 19 classes at 1024 x 2048.

python recipes/cityscapes.py fit --config recipes/configs/cityscapes/regseg_stem_1_2.yaml
"""

from rescompress.lightning import ImageData, Segmenter, main

if __name__ == "__main__":
    main(Segmenter, ImageData, subclass_mode_data=True)
