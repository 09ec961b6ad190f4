"""The functions of `import dtrain`: plan, train, evaluate, export and more on one `Run`.

Invariant: the command line calls these functions and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from numpy.typing import NDArray
from torch import Tensor

from dtrain.checkpoint.export import export as _export
from dtrain.checkpoint.export import load_state_dict
from dtrain.comm.agree import all_or_none
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.evaluation import SplitName, evaluate_run
from dtrain.paths import expand_path, expand_text
from dtrain.planning import report as plan_report
from dtrain.planning.cost_file import CostFile, read_cost_file
from dtrain.planning.plan import Plan, make_plan
from dtrain.prediction import predict_run
from dtrain.rank_process import init, writes_files
from dtrain.run import Run
from dtrain.session.measured_cuts import settle_cuts
from dtrain.session.session import Callback, Session, run_of_folder
from dtrain.training import train_session


@final
class RunPlan:
    """The plan of a run; printing it shows blocks, schedule, memory, messages and times.

    Attributes
    ----------
    table : dict
        The same as plain values.
    """

    def __init__(self, plan: Plan, costs: CostFile | None = None) -> None:
        self._plan = plan
        self._costs = costs

    @property
    def table(self) -> dict[str, Any]:
        """What the plan says, as plain values."""
        return plan_report.plan_table(self._plan, self._costs)

    def svg(self) -> str:
        """Return a drawing of the timeline."""
        return plan_report.plan_svg(self._plan, self._costs)

    def __str__(self) -> str:
        return plan_report.plan_text(self._plan, self._costs)

    __repr__ = __str__


@final
class Result:
    """The end of a training.

    Attributes
    ----------
    rank : int
        This rank.
    out : Path
        The run folder.
    summary : dict
        The contents of `summary.json`.
    history : list of dict
        One per epoch, over all starts of the run.
    """

    def __init__(
        self, rank: int, out: Path, summary: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        self.rank = rank
        self.out = out
        self.summary = summary
        self.history = history

    @property
    def test_accuracy(self) -> float | None:
        """The metric "accuracy" of the test split; None where the task has none."""
        accuracy: float | None = (self.summary["metrics"] or {}).get("accuracy")
        return accuracy

    @property
    def digest(self) -> str:
        """The SHA-256 of the trained model."""
        return str(self.summary["digest"])

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the trained tensors under the names of the user's module; rank 0 alone has
        them."""
        return None if self.rank else load_state_dict(self.out)

    def plot(self, path: str | Path) -> None:
        """Draw losses and metrics over the epochs into a `.png` or `.svg` file, on rank 0.

        Raises
        ------
        ConfigError
            matplotlib is not installed, or the file cannot be written.
        """
        from dtrain.run_report.charts import plot_history  # matplotlib is optional

        if self.rank == 0:
            plot_history(self.history, Path(path))

    def __repr__(self) -> str:
        status, metrics = self.summary["status"], self.summary["metrics"]
        return f"Result({str(self.out)!r}, {status}, metrics={metrics})"


class Metrics(dict[str, float | None]):
    """Metrics by name, and the loss as "loss".

    Attributes
    ----------
    record : dict
        What `dtrain evaluate --json` prints.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__({"loss": record["loss"], **record["metrics"]})
        self.record = record


def plan(
    run: Run, ranks: int, *, costs: str | Path | None = None, exact_mesh: bool = False
) -> RunPlan:
    """Return what a run would do on `ranks` ranks, without MPI and without training.

    Parameters
    ----------
    costs : path, optional
        A TOML file with the speeds of ranks and links, to estimate the time.
    exact_mesh : bool
        As in `Session`.

    Raises
    ------
    DtrainError
        Data, model, mesh, partition or schedule do not fit each other.
    """
    cost_file = None if costs is None else read_cost_file(expand_path(costs, "costs"))
    config = run.config if exact_mesh else run.config.fit_stages(ranks)
    config = settle_cuts(config, Comm(SingleBackend()), ranks)
    return RunPlan(make_plan(config, ranks), cost_file)


def train(
    run: Run,
    out: str | Path | None = None,
    *,
    resume: str = "auto",
    callbacks: Sequence[Callback] = (),
    exact_mesh: bool = False,
    comm: Comm | None = None,
) -> Result:
    """Train a run into a folder, or resume from its newest checkpoint. Collective over all ranks,
    or over those of `comm`.

    Parameters
    ----------
    out, resume, callbacks, exact_mesh, comm
        As in `Session`.

    Raises
    ------
    DtrainError
        The run does not fit its data or the ranks, or the training failed.
    """
    session = Session(
        run, out, resume=resume, callbacks=callbacks, exact_mesh=exact_mesh, comm=comm
    )
    train_session(session)
    return Result(session.rank, session.out, session.summary(), session.history)


def evaluate(
    folder: str | Path,
    split: SplitName = "test",
    *,
    set: Sequence[str] = (),
    run: Run | None = None,
    best: bool = False,
    ema: bool = False,
) -> Metrics:
    """Test the newest complete checkpoint of a run. Collective over all ranks; read-only.

    Parameters
    ----------
    folder : path
        The run folder.
    split : str
        "test", "train" or "validation".
    set : sequence of str
        ``KEY=VALUE`` with keys of [data], `device`, `threads` or `task.metrics`.
    run : Run, optional
        The run itself, where its model or data are objects that cannot be imported. Not needed in
        the process that trained it.
    best, ema : bool
        Test the best weights that `[checkpoint] best` has kept; the averaged weights of `[ema]`.

    Raises
    ------
    DtrainError
        There is no run, no checkpoint, or a key may not be set.
    """
    path = expand_path(folder, "folder")
    return Metrics(evaluate_run(path, init(), split, set, _config(run, path), best, ema))


def predict(
    folder: str | Path,
    data: Any,
    out: str | Path | None = None,
    *,
    set: Sequence[str] = (),
    run: Run | None = None,
) -> NDArray[Any] | None:
    """Return the model's outputs for samples, in their order, on rank 0. Collective over all ranks.

    Parameters
    ----------
    folder : path
        The run folder.
    data : array, tensor, tuple of arrays, or str
        Samples (rows, ...) as the data of the run have them, for several inputs a tuple; or a file
        of HDF5, `.npz`, `.npy`, `.csv` or IDX, with names as the test split has them; or "train" or
        "test", a split of the run. They are standardised as in the training.
    out : path, optional
        An HDF5 file for the outputs; then nothing is returned.
    set, run
        As in `evaluate`.

    Returns
    -------
    array or None
        (rows, ...): the output of the last block; the sum of all blocks' scores where the objective
        predicts by vote. None on other ranks, or where `out` is given.

    Raises
    ------
    DtrainError
        There is no run or no checkpoint, or the samples do not fit the model.
    """
    path, file = expand_path(folder, "folder"), None if out is None else expand_path(out, "out")
    data = expand_text(data, "data") if isinstance(data, str) else data
    return predict_run(path, init(), data, file, set, _config(run, path))


def export(
    folder: str | Path,
    out: str | Path,
    *,
    heads: bool = False,
    factors: bool = False,
    with_normalisation: bool = False,
    best: bool = False,
    ema: bool = False,
) -> dict[str, Tensor]:
    """Write the newest checkpoint's model as one state dict for the user's own module, on rank 0;
    return it on every rank that calls it.

    Parameters and errors are those of `dtrain.checkpoint.export.export`: `out` is a `.pt` or
    `.safetensors` file; `heads` adds the objective's own modules; `factors` writes low-rank weights
    as two factors; `with_normalisation` adds mean and deviation of the inputs; `best` and `ema`
    take the weights that `[checkpoint] best` has kept, and the averaged ones.
    """
    flags = heads, factors, with_normalisation, best, ema
    return _export(
        expand_path(folder, "folder"), expand_path(out, "out"), *flags, write_files=writes_files()
    )


def read_together(path: Path, overrides: Sequence[str], comm: Comm) -> Run:
    """Read a run file on all ranks; all raise the same error. Collective over `comm`."""
    return all_or_none(comm, lambda: Run.read(path, overrides))


def _config(run: Run | None, folder: Path) -> RunConfig | None:
    return run_of_folder(folder) if run is None else run.config
