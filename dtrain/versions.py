"""Versions: the weights that one block shows while it computes, and those that it keeps for it.

Invariant: outside `forward` and `backward` the parameters hold the present weights, which alone are
updated, averaged, saved and evaluated; nothing is kept beyond a segment.

::

    forward    parameters hold: the present weights | an older version | foretold ones
    backward   the present weights | those of its forward | foretold ones
    step       keeps a copy of the present version where somebody needs it, then moves on
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

from torch import Tensor

from dtrain.block import Block, Rule
from dtrain.foretell import foretold, spiked
from dtrain.saved import Saved
from dtrain.schedules.action import Action
from dtrain.schedules.policy import Policy, Shelf


@final
class Versions:
    """One block's weights through a segment.

    Parameters
    ----------
    block : Block
        Whose weights they are.
    policy : Policy or None
        With which weights it computes; None: no update comes between forward and learning.
    saved : Saved
        Told which tensors stand in for parameters.
    """

    def __init__(self, block: Block, policy: Policy | None, saved: Saved) -> None:
        self.block, self.policy, self.saved = block, policy, saved
        self.copies = 0
        self.open()

    def open(self) -> None:
        """Start a segment; the one before has left nothing in flight."""
        self._older: dict[int, list[Tensor]] = {}
        self._foretold: dict[Action, list[Tensor]] = {}
        self._before: list[Tensor] | None = None
        self._shelf = Shelf(self.policy, self.block.index) if self.policy else None

    @contextmanager
    def forward(self, action: Action, last: bool) -> Iterator[None]:
        """Hold the weights of a forward; `last` says whether it is its update's last one."""
        policy, shelf = self.policy, self._shelf
        if policy is None or shelf is None or not self.block.trained:
            yield
            return
        key = action._replace(kind="B", pass_=0)
        if action.pass_:
            shown = self._foretold.get(key)
            version = shelf.backward(key)
        else:
            version, shown = shelf.forward(key, action.update, last), None
            steps = policy.ahead(self.block.index, action.update, "F")
            if steps:
                shown = self._ahead(steps)
                if policy.stash:
                    self._foretold[key] = shown
        self.copies = max(self.copies, shelf.most)
        with self._showing(shown or self._older.get(shelf.now if version is None else version)):
            yield

    @contextmanager
    def backward(self, action: Action) -> Iterator[None]:
        """Hold the weights of a backward."""
        policy, shelf = self.policy, self._shelf
        if policy is None or shelf is None or not self.block.trained:
            yield
            return
        key = action._replace(kind="B")
        version = shelf.backward(key)
        shown = self._foretold[key] if version is None else self._older.get(version)
        steps = policy.ahead(self.block.index, action.update, "B")
        with self._showing(self._ahead(steps) if steps else shown):
            yield

    def learnt(self, action: Action) -> None:
        """Let go of what only this micro-batch needed."""
        if self._shelf is not None:
            key = action._replace(kind="B")
            self._shelf.learnt(key)
            self._foretold.pop(key, None)
            self._sweep()

    def step(self, update: int, moves: bool, rule: Rule | None = None) -> None:
        """Go on to the next version: update the block, where it `moves` at all, by a `rule` if
        one is given."""
        policy, shelf, block = self.policy, self._shelf, self.block
        if policy is None or shelf is None or block.optimizer is None:
            if moves:
                block.update(rule)
            return
        now = shelf.now
        if shelf.update():
            self._older[now] = self._copy()
        if policy.prediction == "difference":
            self._before = self._older.get(now) or self._copy()
        self._sweep()
        self.copies = max(self.copies, shelf.most)
        delay = policy.delay(block.index, update) if policy.spikes else 0
        if moves and delay:
            block.update(lambda optimizer: spiked(optimizer, delay))
        elif moves:
            block.update(rule)

    @property
    def peak_bytes(self) -> int:
        """The most bytes of copies so far."""
        return self.copies * sum(parameter.nbytes for parameter in self.block.trained)

    def _ahead(self, steps: float) -> list[Tensor]:
        assert self.policy is not None
        assert self.block.optimizer is not None
        return foretold(self.policy.prediction, self.block.optimizer, steps, self._before)

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.block.trained]

    def _sweep(self) -> None:
        assert self._shelf is not None
        for version in self._older.keys() - self._shelf.kept:
            del self._older[version]

    @contextmanager
    def _showing(self, shown: Sequence[Tensor] | None) -> Iterator[None]:
        """Let the parameters hold the memory of others while the body runs."""
        if shown is None:
            yield
            return
        own = [(parameter, parameter.data) for parameter in self.block.trained]
        try:
            for (parameter, _), other in zip(own, shown, strict=True):
                parameter.data = other
                self.saved.stands(other, parameter)
            yield
        finally:
            for (parameter, data), other in zip(own, shown, strict=True):
                parameter.data = data
                self.saved.leaves(other)
