"""Families say where the parts of a model are: one file each, found by name, and a probe for the rest."""

from rescompress.families._base import Family, describe, families, register

__all__ = ["Family", "describe", "families", "register"]
