"""Runs with ranks as threads, which share what their plans count."""

from tests.counts import counted_once

__all__ = ["counted_once"]
