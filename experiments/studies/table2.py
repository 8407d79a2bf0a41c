"""The Hessian trace penalty on the middle layers only (Table 2 of the paper).

    python -m experiments.run table2 model=lenet dataset=mnist trials=5

As long as 15 trainings, less those that table1 has left beside it. The paper finds the middle layers (1/4 to 3/4 of the
depth) alone 0.01 to 0.17 points better than all; on LeNet that is less than the spread between trials.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments import tables
from experiments.arms import Config
from experiments.plan import Plan
from experiments.report import Claim

__all__ = ["Config", "draw", "plan", "run"]

ARMS = ("ce", "htr", "htr_middle")
CLAIMS = (
    Claim("htr_middle", "htr", "HTR on the middle layers does better than on all"),
    Claim("htr_middle", "ce", "HTR on the middle layers lowers the test error"),
    Claim("htr_middle", "ce", "HTR on the middle layers lowers the trace at the end", "trace"),
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
