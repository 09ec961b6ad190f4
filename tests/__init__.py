"""Tests of dtrain; a package, so that `tests.process` and `tests.cluster` mean these ones."""
