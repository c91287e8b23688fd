"""Models by what users call them, timm:resnet50 or hf:DIRECTORY, and the weights to begin with.

One file for each library, which is imported when one of its models is asked for. Nothing is printed here.
"""
