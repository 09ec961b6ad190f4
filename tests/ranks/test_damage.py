"""Damaged checkpoints: always named, never loaded; a resumed run takes the one before."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dtrain.checkpoint.export import load_state_dict
from dtrain.checkpoint.manifest import checkpoint_names, read_manifest
from dtrain.checkpoint.shard_file import SHARD_HASH, hash_file
from dtrain.cli import main
from dtrain.errors import CheckpointError
from tests import tiny
from tests.harness import train_in_threads
from tests.manifests import edit_manifest
from tests.refusals import refuses

SHARD = "replica-0-stage-0.h5"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of two stages with two checkpoints."""
    out = tmp_path_factory.mktemp("run") / "out"
    train_in_threads(tiny.run(), out, 2)
    return out


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def newest(out: Path) -> Path:
    """Return the folder of the newest checkpoint."""
    return out / "checkpoints" / "update-00000008"


def test_every_flipped_bit_of_a_manifest_is_named(run_folder: Path) -> None:
    path = newest(run_folder) / "manifest.json"
    content, rng = path.read_bytes(), random.Random(0)
    for position in rng.sample(range(8 * len(content)), 120):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with refuses(CheckpointError, "checkpoint.manifest-damaged") as caught:
            read_manifest(newest(run_folder))
        assert str(path) in caught.value.message


def test_a_manifest_that_is_cut_short_is_named(run_folder: Path) -> None:
    path = newest(run_folder) / "manifest.json"
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with refuses(CheckpointError, "checkpoint.manifest-damaged"):
            read_manifest(newest(run_folder))


def link(path: Path) -> None:
    """Put a link to a file of the same content in the place of a file."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def pipe(path: Path) -> None:
    """Put a pipe that nobody writes to in the place of a file."""
    path.unlink()
    os.mkfifo(path)


def swap(path: Path) -> None:
    """Exchange two shards."""
    other = path.with_name("replica-0-stage-1.h5")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("damage", [link, pipe, swap, Path.unlink])
def test_a_shard_that_is_no_plain_file_of_its_own_is_named(
    damage: Callable[[Path], object], run_folder: Path
) -> None:
    damage(newest(run_folder) / SHARD)
    with refuses(CheckpointError, "checkpoint.shard-damaged") as caught:
        load_state_dict(run_folder)
    assert SHARD in caught.value.message


@pytest.mark.parametrize("damage", [link, pipe, Path.unlink])
def test_a_manifest_that_is_no_plain_file_is_named(
    damage: Callable[[Path], object], run_folder: Path
) -> None:
    damage(newest(run_folder) / "manifest.json")
    with refuses(CheckpointError, "checkpoint.manifest-damaged"):
        load_state_dict(run_folder)


def test_a_manifest_without_its_hash_is_refused(run_folder: Path) -> None:
    path = newest(run_folder) / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["sha256"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with refuses(CheckpointError, "checkpoint.manifest-damaged"):
        load_state_dict(run_folder)


def leave_the_folder(content: dict[str, Any]) -> None:
    shards = content["shards"]
    shards[f"../update-00000004/{SHARD}"] = shards.pop(SHARD)


def double_a_key(content: dict[str, Any]) -> None:
    first, second = content["shards"].values()
    second["keys"].append(first["keys"][0])


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another update": lambda content: content["state"].update(update=4),
    "no update": lambda content: content["state"].pop("update"),
    "update as text": lambda content: content["state"].update(update="8"),
    "a path": leave_the_folder,
    "a key twice": double_a_key,
    "no hash": lambda content: content["shards"][SHARD].update({SHARD_HASH: None}),
    "unknown key": lambda content: content.update(extra=1),
    "no run": lambda content: content.pop("run"),
    "keys as text": lambda content: content["shards"][SHARD].update(keys="model/a"),
    "shards as list": lambda content: content.update(shards=[]),
    "replica as text": lambda content: content["shards"][SHARD].update(keys=["replica/x/a"]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edited_manifest_whose_hash_fits_is_held_to_its_schema(
    edit: Callable[[dict[str, Any]], object], run_folder: Path
) -> None:
    edit_manifest(newest(run_folder), edit)
    with refuses(CheckpointError, "checkpoint.manifest-damaged"):
        load_state_dict(run_folder)


def soft_link(shard: h5py.File, key: str, folder: Path) -> None:
    shard["hidden"] = shard.pop(key)[()]
    shard[key] = h5py.SoftLink("/hidden")


def external_link(shard: h5py.File, key: str, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = shard.pop(key)[()]
    shard[key] = h5py.ExternalLink(str(folder / "other.h5"), "/x")


def external_storage(shard: h5py.File, key: str, folder: Path) -> None:
    values = shard.pop(key)[()]
    values.tofile(folder / "raw")
    parts = [(str(folder / "raw"), 0, values.nbytes)]
    shard.create_dataset(key, values.shape, values.dtype, external=parts)


def virtual(shard: h5py.File, key: str, folder: Path) -> None:
    values = shard.pop(key)[()]
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = values
    layout = h5py.VirtualLayout(values.shape, values.dtype)
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", values.shape)
    shard.create_virtual_dataset(key, layout)


def text(shard: h5py.File, key: str, folder: Path) -> None:
    shape = shard.pop(key).shape
    shard.create_dataset(key, data=np.full(shape, b"a"))


@pytest.mark.parametrize("change", [soft_link, external_link, external_storage, virtual, text])
def test_a_shard_whose_hash_fits_reads_no_other_file(
    change: Callable[[h5py.File, str, Path], None], run_folder: Path, tmp_path: Path
) -> None:
    path = newest(run_folder) / SHARD
    with h5py.File(path, "r+") as shard:
        key = next(key for key in manifest_keys(path) if key.startswith("model/"))
        dtype = shard[key].attrs["dtype"]
        change(shard, key, tmp_path)
        if change in (external_storage, virtual, text):
            shard[key].attrs["dtype"] = dtype
    digest = hash_file(path)
    edit_manifest(
        path.parent, lambda content: content["shards"][SHARD].update({SHARD_HASH: digest})
    )
    with refuses(CheckpointError, "checkpoint.shard-unreadable") as caught:
        load_state_dict(run_folder)
    assert key in caught.value.message


def manifest_keys(shard: Path) -> list[str]:
    """Return the keys of a shard."""
    content = json.loads((shard.parent / "manifest.json").read_text())
    return list(content["shards"][shard.name]["keys"])


@pytest.mark.parametrize("damage", ["shard", "manifest"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_resumed_run_takes_the_checkpoint_before_a_damaged_one(
    damage: str, stages: int, run_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = {"shard": "replica-0-stage-1.h5", "manifest": "manifest.json"}[damage]
    path = newest(run_folder) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = train_in_threads(tiny.run(), run_folder, stages)
    assert str(path) in capsys.readouterr().out
    undisturbed = json.loads((trained / "summary.json").read_text())
    assert again["digest"] == undisturbed["digest"]
    assert again["updates"] == 8
    names = {path.name for path in (run_folder / "checkpoints").iterdir()}
    assert names == {"update-00000004", "update-00000008", "update-00000008.damaged"}


def test_without_a_whole_checkpoint_a_run_does_not_start_anew(run_folder: Path) -> None:
    for path in (run_folder / "checkpoints").glob(f"*/{SHARD}"):
        path.write_bytes(path.read_bytes()[:-1])
    with refuses(CheckpointError, "checkpoint.none-whole") as caught:
        train_in_threads(tiny.run(epochs=3), run_folder, 2)
    assert caught.value.on_all_ranks
    assert len(checkpoint_names(run_folder / "checkpoints")) == 2


def test_copies_of_checkpoints_are_neither_taken_nor_deleted(run_folder: Path) -> None:
    copies = ["update-best", "update-00000008.bak", "update-00000009-copy", "mine"]
    for name in copies:
        shutil.copytree(newest(run_folder), run_folder / "checkpoints" / name)
    assert train_in_threads(tiny.run(epochs=5), run_folder)["updates"] == 20
    names = {path.name for path in (run_folder / "checkpoints").iterdir()}
    assert names == {*copies, "update-00000016", "update-00000020"}


def test_checkpoints_may_be_links_to_folders(run_folder: Path, tmp_path: Path) -> None:
    newest(run_folder).rename(tmp_path / "elsewhere")
    newest(run_folder).symlink_to(tmp_path / "elsewhere")
    assert train_in_threads(tiny.run(epochs=4), run_folder)["updates"] == 16
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()
    assert not newest(run_folder).exists()


def checkpoint_command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any]:
    """Return exit code and JSON output of `dtrain checkpoint`."""
    capsys.readouterr()
    code = main(["checkpoint", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_command_lists_and_verifies_checkpoints(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = checkpoint_command(capsys, "ls", run_folder)
    assert code == 0
    assert [row["update"] for row in rows] == [4, 8]
    assert checkpoint_command(capsys, "verify", run_folder)[0] == 0
    (run_folder / "checkpoints" / "update-00000012.part").mkdir()
    assert checkpoint_command(capsys, "verify", run_folder)[0] == 0
    path = newest(run_folder) / SHARD
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert checkpoint_command(capsys, "ls", run_folder)[0] == 0
    code, rows = checkpoint_command(capsys, "verify", run_folder)
    assert code == CheckpointError.code
    assert [bool(row["problem"]) for row in rows] == [False, True, True]
    assert str(path) in rows[1]["problem"]
    assert main(["checkpoint", "verify", str(run_folder)]) == CheckpointError.code
    assert str(path) in capsys.readouterr().out
    assert main(["checkpoint", "ls", str(run_folder / "checkpoints")]) == 2


def test_the_command_compares_checkpoints(
    run_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, comparison = checkpoint_command(capsys, "diff", run_folder, trained)
    assert (code, comparison["equal"], comparison["tensors"]) == (0, True, [])
    older = run_folder / "checkpoints" / "update-00000004"
    code, comparison = checkpoint_command(capsys, "diff", older, run_folder)
    assert (code, comparison["state"]["update"]) == (1, [4, 8])
    assert {row["key"] for row in comparison["tensors"]} > {"model/fc1.weight"}
    assert all(0 < row["share"] <= 1 for row in comparison["tensors"])
    first, second = (read_manifest(path).load_prefix("model/") for path in (older, newest(trained)))
    largest = max(float((first[name] - second[name]).abs().max()) for name in first)
    shown = max(
        row["largest_difference"] for row in comparison["tensors"] if row["key"][:6] == "model/"
    )
    assert shown == pytest.approx(largest)
