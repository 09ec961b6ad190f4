"""The licences of dependencies: no package of the GPL family is needed."""

from __future__ import annotations

import pytest

from tests.licences import closure, is_copyleft, problems, requirements


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("GPL-3.0-or-later", True),
        ("GNU Lesser General Public License v3 (LGPLv3)", True),
        ("AGPL-3.0-only", True),
        ("BSD-3-Clause AND LGPL-2.1-or-later", True),
        ("BSD-3-Clause", False),
        ("MIT OR GPL-2.0-only", False),
        ("MIT AND GPL-3.0-with-GCC-exception", True),
        ("MIT AND GPL-3.0-or-later WITH GCC-exception-3.1", False),
        ("Mozilla Public License 2.0 (MPL 2.0)", False),
    ],
)
def test_a_licence_of_the_gpl_family_is_known_by_its_name(licence: str, expected: bool) -> None:
    assert is_copyleft(licence) == expected


def test_a_package_of_the_gpl_family_or_without_a_licence_is_a_problem() -> None:
    assert problems({"a": "GPL-3.0-only", "b": "unknown", "c": None, "d": "MIT"}) == [
        "a: GPL-3.0-only",
        "b: unknown",
    ]


def test_no_dependency_has_a_licence_of_the_gpl_family() -> None:
    licences = closure(requirements())
    assert {"torch", "numpy", "h5py", "mpi4py"} <= {n for n, text in licences.items() if text}
    assert problems(licences) == []
