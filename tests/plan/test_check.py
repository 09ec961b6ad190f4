"""Wrong plans are rejected, and the message names the place of the fault."""

from __future__ import annotations

import pytest

from dtrain.schedules import SCHEDULES
from dtrain.schedules.actions import Action, Point, Route
from dtrain.schedules.verify import PlanError, verify_plans

STAGES, MICROS = 4, 6
ROUTES = [Route(Point(b, "F"), Point(b + 1, "F"), "activation") for b in range(STAGES - 1)]
ROUTES += [Route(Point(b + 1, "B"), Point(b, "B"), "gradient") for b in range(STAGES - 1)]


def good() -> list[list[Action]]:
    """Return the right plans of 1f1b."""
    schedule = SCHEDULES["1f1b"]()
    return [list(schedule.plan(s, range(STAGES), (MICROS,), ROUTES)) for s in range(STAGES)]


def parse(words: str, update: int = 0) -> list[Action]:
    """Read a plan as it is written."""
    actions = []
    for word in words.split():
        block, _, micro = word[1:].partition(".")
        actions.append(Action(word[0], int(block), update, int(micro or -1)))
    return actions


def fault(*replicas: list[list[Action]], routes: list[Route] = ROUTES) -> str:
    """Return what `verify` says of wrong plans."""
    place = range(len(replicas[0]))
    with pytest.raises(PlanError) as error:
        verify_plans(replicas, place, routes)
    return str(error.value)


def test_right_plans_pass() -> None:
    report = verify_plans([good(), good()], range(STAGES), ROUTES)
    assert report.peak_live == (4, 3, 2, 1)
    assert report.bubble == pytest.approx(3 / 9)


def test_a_last_stage_that_is_off_by_one() -> None:
    """As torch 2.13 lists it: F1 .. FM where F0 .. FM-1 are due."""
    plans = good()
    plans[3] = [a._replace(micro=a.micro + 1) if a.kind == "F" else a for a in plans[3]]
    assert fault(plans) == "stage 3 at F3.1 of update 0 (position 0): F3.0 of update 0 comes first"


def test_swapped_backwards() -> None:
    plans = good()
    plans[1][3], plans[1][5] = plans[1][5], plans[1][3]
    assert fault(plans) == "stage 1 at B1.1 of update 0 (position 3): B1.0 of update 0 comes first"


def test_a_missing_update() -> None:
    plans = good()
    plans[2].pop()
    assert fault(plans) == "stage 2: U2 of update 0 is missing, the plan ends at position 12"


def test_a_missing_forward_and_backward() -> None:
    plans = good()
    plans[2] = [action for action in plans[2] if action.micro != 5]
    assert "stage 2 at U2 of update 0 (position 10): B2.5 has not run" in fault(plans)


def test_an_update_that_comes_too_early() -> None:
    plans = good()
    plans[3].insert(4, plans[3].pop())
    assert fault(plans) == "stage 3 at U3 of update 0 (position 4): B3.2 has not run"


def test_a_backward_before_its_forward() -> None:
    plans = good()
    plans[3][0], plans[3][1] = plans[3][1], plans[3][0]
    assert fault(plans) == "stage 3 at B3.0 of update 0 (position 0): its F has not run"


def test_what_is_done_twice_or_elsewhere() -> None:
    plans = good()
    plans[3].append(plans[3][-1])
    assert "every U3 is done already" in fault(plans)
    plans = good()
    plans[0].append(Action("U", 1, 0))
    assert "block 1 has no U on this stage" in fault(plans)
    with pytest.raises(PlanError, match="3 plans for 4 stages"):
        verify_plans([good()[:3]], range(STAGES), ROUTES)


def test_a_circle_is_spelt_out() -> None:
    plans = [
        parse("F0.0 B0.0 F0.1 B0.1 U0"),
        parse("F1.0 F1.1 B1.0 B1.1 U1"),
    ]
    routes = [ROUTES[0], ROUTES[3]]
    assert fault(plans, routes=routes) == (
        "deadlock: stage 0 waits at B0.0 of update 0 (position 1) for gradient 0 from stage 1, "
        "which waits at F1.1 of update 0 (position 1) for activation 1 from stage 0"
    )


def test_a_send_needs_its_receive() -> None:
    """Stage 1 learns late what stage 0 offers early: without a credit nobody can go on."""
    plans = [
        parse("F0.0 F0.1 F0.2 B0.0 B0.1 B0.2 U0"),
        parse("F1.0 F1.1 F1.2 B1.0 B1.1 B1.2 U1"),
    ]
    late = Route(Point(0, "F"), Point(1, "B"), "hint")
    assert verify_plans([plans], range(2), [ROUTES[0]]).peak_live == (3, 3)
    assert fault(plans, routes=[ROUTES[0], late]) == (
        "deadlock: stage 0 waits at F0.1 of update 0 (position 1) for stage 1 to take hint, "
        "which waits at F1.2 of update 0 (position 2) for activation 2 from stage 0"
    )


def test_replicas_meet_in_updates() -> None:
    """Two blocks on one stage; the replicas update them in different orders."""
    place = (0, 0)
    one = [parse("F0.0 F1.0 B0.0 B1.0 U0 U1")]
    other = [parse("F0.0 F1.0 B0.0 B1.0 U1 U0")]
    verify_plans([one, one], place, ROUTES[:1])
    with pytest.raises(PlanError, match=r"replica 0 stage 0 waits at U0 .* replica 1 stage 0"):
        verify_plans([one, other], place, ROUTES[:1])


def test_replicas_of_unequal_updates_are_rejected() -> None:
    plans = [parse("F0.0 B0.0 U0") + parse("F0.0 B0.0 U0", update=1)]
    text = "replica 1 stage 0: U0 of update 1 is missing"
    with pytest.raises(PlanError, match=text):
        verify_plans([plans, [plans[0][:3]]], (0,), [])


def test_handovers_on_one_stage_are_in_order() -> None:
    plans = [parse("F1.0 F0.0 B0.0 B1.0 U0 U1")]
    with pytest.raises(PlanError, match=r"waits at F1.0 .* for activation 0 from stage 0"):
        verify_plans([plans], (0, 0), ROUTES[:1])


def test_staleness_counts_updates_between_forward_and_backward() -> None:
    plan = [Action("F", 0, 0, 0), Action("F", 0, 1, 0), Action("B", 0, 0, 0), Action("U", 0, 0)]
    plan += [Action("B", 0, 1, 0), Action("U", 0, 1)]
    report = verify_plans([[plan]], (0,), [])
    assert (report.staleness, report.peak_live) == ((1,), (2,))


def test_a_split_backward() -> None:
    """I in the place of B, W after it; both in order, and U after all W."""
    routes = [ROUTES[0], ROUTES[STAGES - 1]]
    right = parse("F1.0 I1.0 F1.1 I1.1 W1.0 W1.1 U1")
    first = parse("F0.0 F0.1 I0.0 W0.0 I0.1 W0.1 U0")
    report = verify_plans([[first, right]], range(2), routes)
    assert (report.peak_live, report.makespan) == ((2, 2), 7)
    for words, what in (
        ("F1.0 W1.0 I1.0 F1.1 I1.1 W1.1 U1", "at W1.0 of update 0 (position 1): its I has not run"),
        ("F1.0 I1.0 I1.1 F1.1 W1.0 W1.1 U1", "at I1.1 of update 0 (position 2): its F has not run"),
        ("F1.0 I1.0 F1.1 I1.1 W1.1 W1.0 U1", "W1.0 of update 0 comes first"),
        ("F1.0 I1.0 F1.1 I1.1 W1.0 U1 W1.1", "at U1 of update 0 (position 5): W1.1 has not run"),
        ("F1.0 I1.0 F1.1 I1.1 W1.0 U1", "W1.1 has not run"),
        ("F1.0 I1.0 W1.0 F1.1 B1.1 U1", "block 1 has no B on this stage"),
    ):
        assert what in fault([first, parse(words)], routes=routes)


def test_every_pass_of_a_micro_batch() -> None:
    """Pass 1 after pass 0, learning after both."""
    again = [Action("F", 0, 0, micro, 1) for micro in range(2)]
    (f0, f1, b0, b1, u) = parse("F0.0 F0.1 B0.0 B0.1 U0")
    routes = [Route(Point(0, "F"), Point(0, "F", 1), "error")]
    right = [f0, f1, again[0], b0, again[1], b1, u]
    assert verify_plans([[right]], (0,), routes).peak_live == (2,)
    assert [str(action) for action in right[:3]] == ["F0.0", "F0.1", "F0.0/1"]
    for plan, what in (
        ([again[0], f0, f1, b0, again[1], b1, u], "F0.0/1 of update 0 (position 0): its F has not"),
        ([f0, f1, b0, *again, b1, u], "B0.0 of update 0 (position 2): its F has not run"),
        ([f0, f1, *again[::-1], b0, b1, u], "F0.0/1 of update 0 comes first"),
        ([f0, f1, again[0], b0, b1, u], "B0.1 of update 0 (position 4): its F has not run"),
    ):
        assert what in fault([plan], routes=routes)


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
