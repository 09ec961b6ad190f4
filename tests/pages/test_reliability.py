"""The page of promises names tests that exist, and a mutation that breaks each promise."""

from __future__ import annotations

from tests.mutations import MUTATIONS, ROOT, promises


def test_every_promise_has_a_test_and_a_mutation() -> None:
    """`python -m tests.mutations` runs them: minutes."""
    tests = {test for tests in promises().values() for test in tests}
    for test in tests:
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), test
    assert tests == {mutation.test for mutation in MUTATIONS}
    assert [mutation for mutation in MUTATIONS if not mutation.fits] == []
