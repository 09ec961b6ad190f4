"""CheckpointWriter: the checkpoints of a session, and the best weights."""

from __future__ import annotations

from pathlib import Path
from typing import final

from torch import Tensor

from dtrain.callbacks import callback_keys
from dtrain.checkpoint import store
from dtrain.checkpoint.async_save import AsyncSaver
from dtrain.checkpoint.run_folder import BEST_FOLDER, CHECKPOINT_FOLDER
from dtrain.data.statistics.standardise import Standardised
from dtrain.session.evaluator import Evaluator
from dtrain.session.folder_lock import FolderLock
from dtrain.session.opening import OpenRun


@final
class CheckpointWriter:
    """Writes checkpoints. Methods are collective over all ranks.

    Parameters
    ----------
    run : OpenRun
        The run.
    lock : FolderLock
        The lock of the run folder; a run that lost it writes nothing.
    evaluator : Evaluator
        The weights that are saved beside the state of training.
    """

    def __init__(self, run: OpenRun, lock: FolderLock, evaluator: Evaluator) -> None:
        self._run = run
        self._lock = lock
        self._evaluator = evaluator
        self.saved_update = run.restored_update
        settings = run.job.plan.run.checkpoint
        self._saver: AsyncSaver | None = None
        if settings.asynchronous:
            self._saver = AsyncSaver(run.job.groups.control, lock.check)

    @property
    def is_asynchronous(self) -> bool:
        """Whether checkpoints are written behind the training."""
        return self._saver is not None

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps for checkpoints."""
        return 0 if self._saver is None else self._saver.nbytes

    @property
    def write_s(self) -> float | None:
        """Seconds of the last asynchronous save, from the copy to the commit."""
        return None if self._saver is None else self._saver.write_s

    def poll(self) -> None:
        """Advance an asynchronous save; never wait. Local."""
        if self._saver is not None:
            self._saver.poll()

    def finish(self) -> None:
        """Wait until all checkpoints are complete."""
        if self._saver is not None:
            self._saver.finish()

    def discard(self) -> None:
        """End an asynchronous save that is not complete, since the run has failed. Local."""
        if self._saver is not None:
            self._saver.discard()

    def save(self, at_once: bool = False) -> None:
        """Write a checkpoint, from which the next start resumes.

        Parameters
        ----------
        at_once : bool
            Write it before this returns, though the run has asynchronous checkpoints.
        """
        run, job = self._run, self._run.job
        engine, replica = job.engine, job.position.replica
        weights = self._evaluator.weights()
        tensors = store.collect_tensors(engine.blocks, engine.syncs, weights, replica)
        keep = job.plan.run.checkpoint.keep
        self._write(run.out / CHECKPOINT_FOLDER, tensors, keep, None if at_once else self._saver)
        self.saved_update = run.totals.update

    def save_best(self) -> None:
        """Keep the evaluated weights in ``checkpoints/best``, in the place of earlier ones."""
        tensors = {f"model/{name}": tensor for name, tensor in self._evaluator.tensors().items()}
        self._write(self._run.out / CHECKPOINT_FOLDER / BEST_FOLDER, tensors, keep=1)

    def _write(
        self, folder: Path, tensors: dict[str, Tensor], keep: int, saver: AsyncSaver | None = None
    ) -> None:
        """Write tensors, averaged weights and states into a checkpoint; keep `keep` of them."""
        self._lock.check()
        if saver is None:
            self.finish()
        run, job, position = self._run, self._run.job, self._run.job.position
        train_split = job.plan.data.train
        if position.replica == 0 and run.ema is not None:
            for index in job.engine.blocks:
                averages = run.ema.weights(index).items()
                tensors |= {f"ema/{name}": tensor for name, tensor in averages}
        if position.replica == position.stage == 0 and isinstance(train_split, Standardised):
            statistics = train_split.statistics()
            tensors |= {f"statistics/{name}": tensor for name, tensor in statistics.items()}
        state = run.totals.state() | {"tied_names": dict(job.plan.layout.model.tied_names)}
        states = {key: each.state() for key, each in callback_keys(run.callbacks).items()}
        state |= {"callbacks": states} if states else {}
        shard, table = f"replica-{position.replica}-stage-{position.stage}", job.plan.run.to_table()
        if saver is None:
            control = job.groups.control
            store.save(folder, shard, tensors, table, state, control, keep, run.fingerprint)
            return
        content = store.manifest_content(table, state, run.fingerprint)
        checkpoint = store.NewCheckpoint(folder, state["update"])
        saver.begin(checkpoint, shard, tensors, content, keep)
