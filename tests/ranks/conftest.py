"""Runs with ranks as threads; a rank computes with one."""

from tests.single import one_thread

__all__ = ["one_thread"]
