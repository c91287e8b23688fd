"""Lets `python -m rescompress.cli` do what `rescompress` does."""

import sys

from rescompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
