"""CheckpointWriter: the checkpoints of a session, and the best weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from dtrain.callbacks import callback_keys
from dtrain.checkpoint import store
from dtrain.checkpoint.async_save import AsyncSaver
from dtrain.checkpoint.background_work import BackgroundRemoval
from dtrain.checkpoint.local_level import LocalLevel
from dtrain.checkpoint.run_folder import BEST_FOLDER, CHECKPOINT_FOLDER
from dtrain.data.statistics.standardise import Standardised
from dtrain.session.evaluator import Evaluator
from dtrain.session.folder_lock import FolderLock
from dtrain.session.opening import OpenRun


@final
@dataclass(frozen=True)
class LocalSave:
    """A checkpoint on node-local disks that is not copied yet.

    Attributes
    ----------
    update : int
        Updates that it holds.
    row : dict or None
        The row of this rank's shard, if it has one.
    content : dict
        The manifest without its shards.
    """

    update: int
    row: dict[str, Any] | None
    content: dict[str, Any]


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
        settings, control = run.job.plan.run.checkpoint, run.job.groups.control
        self._removal = BackgroundRemoval()
        self._saver: AsyncSaver | None = None
        self._local: LocalLevel | None = None
        self._uncopied: LocalSave | None = None
        if settings.asynchronous or settings.local is not None:
            self._saver = AsyncSaver(control, lock.check)
        if settings.local is not None:
            self._local = LocalLevel(settings.local, run.out, control)

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
        """Wait until the run folder has all checkpoints, and clear the node-local disks."""
        self._removal.finish()
        self._copy_newest()
        if self._saver is not None:
            self._saver.finish()
        if self._local is not None:
            self._local.remove()

    def discard(self) -> None:
        """End an asynchronous save that is not complete, since the run has failed. Local."""
        self._removal.discard()
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
        self.saved_update = run.totals.update
        folder, keep = run.out / CHECKPOINT_FOLDER, job.plan.run.checkpoint.keep
        if self._saver is None or at_once:
            if self._saver is not None:
                self._saver.finish()
                self._uncopied = None
            self._write(folder, tensors, keep)
            return
        self._lock.check()
        tensors |= self._other_tensors()
        content = store.manifest_content(job.plan.run.to_table(), self._state(), run.fingerprint)
        if self._local is None:
            checkpoint = store.NewCheckpoint(folder, self.saved_update)
            self._saver.begin(checkpoint, self._shard(), tensors, content, keep)
            return
        row = self._local.save(self.saved_update, self._shard(), tensors, content)
        self._uncopied = LocalSave(self.saved_update, row, content)
        if job.groups.control.allgather_object(self._saver.is_idle)[0]:
            self._copy_newest()

    def _copy_newest(self) -> None:
        """Begin to copy the newest node-local checkpoint that the run folder lacks, if any."""
        newest, run = self._uncopied, self._run
        if newest is None or self._saver is None or self._local is None:
            return
        checkpoint = store.NewCheckpoint(run.out / CHECKPOINT_FOLDER, newest.update)
        source = self._local.folder / checkpoint.final.name
        keep = run.job.plan.run.checkpoint.keep
        self._saver.begin_copy(checkpoint, source, newest.row, newest.content, keep)
        self._uncopied = None

    def save_best(self) -> None:
        """Keep the evaluated weights in ``checkpoints/best``, in the place of earlier ones."""
        tensors = {f"model/{name}": tensor for name, tensor in self._evaluator.tensors().items()}
        self._write(self._run.out / CHECKPOINT_FOLDER / BEST_FOLDER, tensors, keep=1)

    def _write(self, folder: Path, tensors: dict[str, Tensor], keep: int) -> None:
        """Write tensors, averaged weights and states into a checkpoint; keep `keep` of them."""
        self._lock.check()
        self._removal.finish()
        run, job = self._run, self._run.job
        old: list[Path] = []
        store.save(
            folder,
            self._shard(),
            tensors | self._other_tensors(),
            job.plan.run.to_table(),
            self._state(),
            job.groups.control,
            keep,
            run.fingerprint,
            old.append,
        )
        self._removal.start(old)

    def _shard(self) -> str:
        position = self._run.job.position
        return f"replica-{position.replica}-stage-{position.stage}"

    def _other_tensors(self) -> dict[str, Tensor]:
        """Return averaged weights and statistics of the data, on the ranks that save them."""
        run, job, position = self._run, self._run.job, self._run.job.position
        tensors: dict[str, Tensor] = {}
        train_split = job.plan.data.train
        if position.replica == 0 and run.ema is not None:
            for index in job.engine.blocks:
                averages = run.ema.weights(index).items()
                tensors |= {f"ema/{name}": tensor for name, tensor in averages}
        if position.replica == position.stage == 0 and isinstance(train_split, Standardised):
            statistics = train_split.statistics()
            tensors |= {f"statistics/{name}": tensor for name, tensor in statistics.items()}
        return tensors

    def _state(self) -> dict[str, Any]:
        """Return the counts of the run and the states of its callbacks."""
        run = self._run
        state = run.totals.state() | {"tied_names": dict(run.job.plan.layout.model.tied_names)}
        states = {key: each.state() for key, each in callback_keys(run.callbacks).items()}
        return state | ({"callbacks": states} if states else {})
