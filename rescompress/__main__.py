"""`python -m rescompress` is the `rescompress` command."""

import sys

from rescompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
