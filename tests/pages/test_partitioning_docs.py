"""The snippets of docs/partitioning.md are legal, and its table is that of the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtrain.config.sections import Partition
from dtrain.planning.layer_list import LayerSpec, list_layers
from dtrain.planning.plan import make_plan
from dtrain.schema import from_table
from tests import tiny
from tests.docs_reader import load_example, python_blocks

DOCS = Path(__file__).parents[2] / "docs" / "partitioning.md"
TEXT = DOCS.read_text(encoding="utf-8")
TABLES = [tomllib.loads(text)["partition"] for text in re.findall(r"```toml\n(.*?)```", TEXT, re.S)]


class Net(nn.Module):
    """The net of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU())
        self.mid, self.up = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        return self.out(torch.cat([a, self.up(self.mid(a))], 1))


def test_the_table_of_layers_is_what_the_code_prints() -> None:
    table = str(list_layers(Net(), torch.zeros(2, 1, 8, 8))).splitlines()[:-1]
    assert "\n".join(table) in TEXT


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_the_tables_are_sections(table: dict[str, object]) -> None:
    assert from_table(Partition, table, "[partition] ")


def test_the_function_of_the_docs_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = [block for block in python_blocks(DOCS) if block.startswith("# mine.py")]
    load_example("mine", code, tmp_path, monkeypatch)
    [table] = [table for table in TABLES if table.get("cuts") == "mine:by_parameters"]
    plan = make_plan(tiny.run(partition=table), 1)
    assert plan.layout.cuts == (2, 3)


def test_every_field_of_a_layer_is_documented() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", TEXT, re.M)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(LayerSpec.__dataclass_fields__) <= documented
