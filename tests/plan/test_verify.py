"""Wrong plans are rejected, and the error names the place of the fault."""

from __future__ import annotations

import re

import pytest

from dtrain.schedules import SCHEDULES
from dtrain.schedules.actions import Action, Point, Route
from dtrain.schedules.verify import PlanError, verify_plans

STAGES, MICROS = 4, 6
ROUTES = [Route(Point(b, "F"), Point(b + 1, "F"), "activation") for b in range(STAGES - 1)]
ROUTES += [Route(Point(b + 1, "B"), Point(b, "B"), "gradient") for b in range(STAGES - 1)]
NAMES = re.compile(
    r"(?:replica \d+ )?stage \d+|position \d+|(?:activation|gradient)(?: \d+)?|hint"
    r"|\b[FBIWU]\d+(?:\.\d+)?(?:/\d+)?"
)
"""Ranks, positions, messages and actions in an error message."""


def correct_plans() -> list[list[Action]]:
    """Return the plans of 1f1b."""
    schedule = SCHEDULES["1f1b"]()
    return [list(schedule.plan(s, range(STAGES), (MICROS,), ROUTES)) for s in range(STAGES)]


def parse(text: str, update: int = 0) -> list[Action]:
    """Return the actions of a plan that is written as text."""
    actions = []
    for word in text.split():
        block, _, micro = word[1:].partition(".")
        actions.append(Action(word[0], int(block), update, int(micro or -1)))
    return actions


def fault(*replicas: list[list[Action]], routes: list[Route] = ROUTES) -> tuple[str, str]:
    """Return the key of the error for wrong plans, and all names in its message, in order."""
    with pytest.raises(PlanError) as caught:
        verify_plans(replicas, range(len(replicas[0])), routes)
    return caught.value.key, ", ".join(NAMES.findall(str(caught.value)))


def test_correct_plans_pass() -> None:
    report = verify_plans([correct_plans(), correct_plans()], range(STAGES), ROUTES)
    assert report.peak_live == (4, 3, 2, 1)
    assert report.bubble == pytest.approx(3 / 9)


def test_a_last_stage_that_is_off_by_one() -> None:
    """torch 2.13 lists F1 .. FM for the last stage instead of F0 .. FM-1."""
    plans = correct_plans()
    plans[3] = [a._replace(micro=a.micro + 1) if a.kind == "F" else a for a in plans[3]]
    assert fault(plans) == ("plan.wrong-order", "stage 3, F3.1, position 0, F3.0")


def test_swapped_backwards() -> None:
    plans = correct_plans()
    plans[1][3], plans[1][5] = plans[1][5], plans[1][3]
    assert fault(plans) == ("plan.wrong-order", "stage 1, B1.1, position 3, B1.0")


def test_a_missing_update() -> None:
    plans = correct_plans()
    plans[2].pop()
    assert fault(plans) == ("plan.missing-action", "stage 2, U2, position 12")


def test_a_missing_forward_and_backward() -> None:
    plans = correct_plans()
    plans[2] = [action for action in plans[2] if action.micro != 5]
    assert fault(plans) == ("plan.too-early", "stage 2, U2, position 10, B2.5")


def test_an_update_that_comes_too_early() -> None:
    plans = correct_plans()
    plans[3].insert(4, plans[3].pop())
    assert fault(plans) == ("plan.too-early", "stage 3, U3, position 4, B3.2")


def test_a_backward_before_its_forward() -> None:
    plans = correct_plans()
    plans[3][0], plans[3][1] = plans[3][1], plans[3][0]
    assert fault(plans) == ("plan.too-early", "stage 3, B3.0, position 0")


def test_repeated_and_misplaced_actions() -> None:
    plans = correct_plans()
    plans[3].append(plans[3][-1])
    assert fault(plans) == ("plan.repeated-action", "stage 3, U3, position 13, U3")
    plans = correct_plans()
    plans[0].append(Action("U", 1, 0))
    assert fault(plans) == ("plan.unknown-action", "stage 0, U1, position 13")
    with pytest.raises(PlanError) as caught:
        verify_plans([correct_plans()[:3]], range(STAGES), ROUTES)
    assert caught.value.key == "plan.stage-count"


def test_a_deadlock_is_spelt_out() -> None:
    plans = [
        parse("F0.0 B0.0 F0.1 B0.1 U0"),
        parse("F1.0 F1.1 B1.0 B1.1 U1"),
    ]
    assert fault(plans, routes=[ROUTES[0], ROUTES[3]]) == (
        "plan.deadlock",
        "stage 0, B0.0, position 1, gradient 0, stage 1, F1.1, position 1, activation 1, stage 0",
    )


def test_a_send_needs_its_receive() -> None:
    """Stage 1 receives late a message that stage 0 sends early: without credits both block."""
    plans = [
        parse("F0.0 F0.1 F0.2 B0.0 B0.1 B0.2 U0"),
        parse("F1.0 F1.1 F1.2 B1.0 B1.1 B1.2 U1"),
    ]
    hint = Route(Point(0, "F"), Point(1, "B"), "hint")
    assert verify_plans([plans], range(2), [ROUTES[0]]).peak_live == (3, 3)
    assert fault(plans, routes=[ROUTES[0], hint]) == (
        "plan.deadlock",
        "stage 0, F0.1, position 1, stage 1, hint, F1.2, position 2, activation 2, stage 0",
    )


def test_updates_synchronise_replicas() -> None:
    """Two blocks on one stage; the replicas update them in different orders."""
    place = (0, 0)
    plans = [parse("F0.0 F1.0 B0.0 B1.0 U0 U1")]
    other = [parse("F0.0 F1.0 B0.0 B1.0 U1 U0")]
    verify_plans([plans, plans], place, ROUTES[:1])
    with pytest.raises(PlanError) as caught:
        verify_plans([plans, other], place, ROUTES[:1])
    assert caught.value.key == "plan.deadlock"
    names = NAMES.findall(str(caught.value))
    assert names[:4] == ["replica 0 stage 0", "U0", "position 4", "replica 1 stage 0"]


def test_replicas_with_different_numbers_of_updates_are_rejected() -> None:
    plans = [parse("F0.0 B0.0 U0") + parse("F0.0 B0.0 U0", update=1)]
    assert fault(plans, [plans[0][:3]], routes=[]) == (
        "plan.missing-action",
        "replica 1 stage 0, U0, position 3",
    )


def test_local_messages_are_in_order() -> None:
    plans = [parse("F1.0 F0.0 B0.0 B1.0 U0 U1")]
    with pytest.raises(PlanError) as caught:
        verify_plans([plans], (0, 0), ROUTES[:1])
    assert caught.value.key == "plan.deadlock"
    names = NAMES.findall(str(caught.value))
    assert names[:5] == ["stage 0", "F1.0", "position 0", "activation 0", "stage 0"]


def test_staleness_counts_updates_between_forward_and_backward() -> None:
    plan = [Action("F", 0, 0, 0), Action("F", 0, 1, 0), Action("B", 0, 0, 0), Action("U", 0, 0)]
    plan += [Action("B", 0, 1, 0), Action("U", 0, 1)]
    report = verify_plans([[plan]], (0,), [])
    assert (report.staleness, report.peak_live) == ((1,), (2,))


def test_a_split_backward() -> None:
    """I instead of B, W after it; both in order, and U after all W."""
    routes = [ROUTES[0], ROUTES[STAGES - 1]]
    correct = parse("F1.0 I1.0 F1.1 I1.1 W1.0 W1.1 U1")
    first = parse("F0.0 F0.1 I0.0 W0.0 I0.1 W0.1 U0")
    report = verify_plans([[first, correct]], range(2), routes)
    assert (report.peak_live, report.makespan) == ((2, 2), 7)
    for text, key, names in (
        ("F1.0 W1.0 I1.0 F1.1 I1.1 W1.1 U1", "plan.too-early", "W1.0, position 1"),
        ("F1.0 I1.0 I1.1 F1.1 W1.0 W1.1 U1", "plan.too-early", "I1.1, position 2"),
        ("F1.0 I1.0 F1.1 I1.1 W1.1 W1.0 U1", "plan.wrong-order", "W1.1, position 4, W1.0"),
        ("F1.0 I1.0 F1.1 I1.1 W1.0 U1 W1.1", "plan.too-early", "U1, position 5, W1.1"),
        ("F1.0 I1.0 F1.1 I1.1 W1.0 U1", "plan.too-early", "U1, position 5, W1.1"),
        ("F1.0 I1.0 W1.0 F1.1 B1.1 U1", "plan.unknown-action", "B1.1, position 4"),
    ):
        assert fault([first, parse(text)], routes=routes) == (key, f"stage 1, {names}")


def test_every_pass_of_a_micro_batch() -> None:
    """Pass 1 after pass 0, the backward after both."""
    again = [Action("F", 0, 0, micro, 1) for micro in range(2)]
    (f0, f1, b0, b1, u) = parse("F0.0 F0.1 B0.0 B0.1 U0")
    routes = [Route(Point(0, "F"), Point(0, "F", 1), "error")]
    correct = [f0, f1, again[0], b0, again[1], b1, u]
    assert verify_plans([[correct]], (0,), routes).peak_live == (2,)
    assert [str(action) for action in correct[:3]] == ["F0.0", "F0.1", "F0.0/1"]
    for plan, key, names in (
        ([again[0], f0, f1, b0, again[1], b1, u], "plan.too-early", "F0.0/1, position 0"),
        ([f0, f1, b0, *again, b1, u], "plan.too-early", "B0.0, position 2"),
        ([f0, f1, *again[::-1], b0, b1, u], "plan.wrong-order", "F0.1/1, position 2, F0.0/1"),
        ([f0, f1, again[0], b0, b1, u], "plan.too-early", "B0.1, position 4"),
    ):
        assert fault([plan], routes=routes) == (key, f"stage 0, {names}")


def test_staleness_counts_to_the_gradient_of_the_input() -> None:
    plan = [Action("F", 0, 0, 0), Action("F", 0, 1, 0), Action("I", 0, 0, 0), Action("W", 0, 0, 0)]
    plan += [Action("U", 0, 0), Action("I", 0, 1, 0), Action("W", 0, 1, 0), Action("U", 0, 1)]
    report = verify_plans([[plan]], (0,), [])
    assert (report.staleness, report.peak_live) == ((1,), (2,))


def test_staleness_counts_from_the_first_forward() -> None:
    """A second forward after an update does not make the first one fresh."""
    plan = [Action("F", 0, 0, 0), Action("F", 0, 1, 0), Action("F", 0, 0, 0, 1)]
    plan += [Action("B", 0, 0, 0), Action("U", 0, 0), Action("F", 0, 1, 0, 1)]
    plan += [Action("B", 0, 1, 0), Action("U", 0, 1)]
    routes = [Route(Point(0, "F"), Point(0, "F", 1), "error")]
    assert verify_plans([[plan]], (0,), routes).staleness == (1,)


def test_the_key_of_an_action_is_its_micro_batch() -> None:
    assert Action("F", 3, 1, 2, pass_=1).key == Action("B", 3, 1, 2).key == (3, 1, 2)
