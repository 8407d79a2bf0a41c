"""Test error with and without the Hessian trace penalty (Table 1 of the paper).

    python -m experiments.run table1 model=lenet dataset=mnist trials=5

10 trainings; with ``epochs=15`` LeNet takes some minutes for each on one CPU core, the released settings are 30 and 40
epochs. An interrupted table goes on. The paper finds 0.02 to 3.1 points less error with the penalty. Expected on
LeNet: no difference that five trials could tell from none, the released coefficients being small at one step in fifty.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments import tables
from experiments.arms import Config
from experiments.plan import Plan
from experiments.report import Claim

__all__ = ["Config", "draw", "plan", "run"]

ARMS = ("ce", "htr")
CLAIMS = (
    Claim("htr", "ce", "HTR lowers the test error"),
    Claim("htr", "ce", "HTR lowers the trace at the end", "trace"),
)


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Plan:
    """The trainings of all arms."""
    return tables.plan_table(config, ARMS, out_dir, data_dir)


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> dict[str, Any]:
    """Trains (or finds) the nets of all arms, measures them and saves the numbers; returns how they were trained."""
    return tables.run_table(config, ARMS, out_dir, data_dir)


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the table from the saved numbers."""
    tables.print_table(config, out_dir, CLAIMS)
