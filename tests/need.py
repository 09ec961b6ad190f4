"""Skipping a test for what the machine lacks, or failing it where the lack is not allowed.

Invariant: `DTRAIN_REQUIRE`, a list such as "cluster,data", names what must be there; a test that
lacks it fails instead of being skipped, so that a skip cannot hide on the machine that is set up
to run everything.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lack(what: str, reason: str) -> NoReturn:
    """End the running test: skipped with its reason, or failed where `what` is required."""
    required = os.environ.get("DTRAIN_REQUIRE", "").split(",")
    if what in required:
        pytest.fail(f"{reason} (and DTRAIN_REQUIRE names {what})", pytrace=False)
    pytest.skip(reason)
