"""Runs with ranks as threads: a rank computes with one thread, and ends at once when it fails."""

from tests.single import no_report_delay, one_thread

__all__ = ["no_report_delay", "one_thread"]
