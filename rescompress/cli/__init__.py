"""The `rescompress` command."""

from rescompress.cli._main import main

__all__ = ["main"]
