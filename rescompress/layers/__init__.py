"""Modules that stay inside compressed models; all of them script, trace, pickle and export."""
