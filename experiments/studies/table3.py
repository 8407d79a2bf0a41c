"""The Hessian trace penalty together with L2 (Table 3 of the paper), and the L2 alone that the paper lacks.

    python -m experiments.run table3 model=lenet dataset=mnist trials=5

As long as 20 trainings, less those that table1 has left beside it. The paper finds HTR with L2 better than HTR; whether
the penalty has a part in that only the comparison with L2 alone can tell.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments import tables
from experiments.arms import Config
from experiments.plan import Plan
from experiments.report import Claim

__all__ = ["Config", "draw", "plan", "run"]

ARMS = ("ce", "htr", "l2", "htr_l2")
CLAIMS = (
    Claim("htr_l2", "htr", "HTR with L2 does better than HTR alone"),
    Claim("htr_l2", "ce", "HTR with L2 lowers the test error"),
    Claim("htr_l2", "l2", "HTR with L2 does better than L2 alone (not in the paper)"),
    Claim("l2", "ce", "L2 alone lowers the test error (not in the paper)"),
    Claim("htr_l2", "l2", "HTR with L2 lowers the trace below that of L2 alone", "trace"),
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
