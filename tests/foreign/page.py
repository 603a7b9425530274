"""Write ``docs/covered.md`` from the table: ``PYTHONPATH=tests python -m foreign.page``."""

from support.runs import REPO

from foreign.base import Row
from foreign.table import TABLE

PAGE = REPO / "docs" / "covered.md"

HEAD = """# What is covered

Ways to use Lightning, and how lockstep trains them. `make pages` generates this page from the table in `tests/foreign/`.
A test trains each row five times:

- with Lightning's plain Trainer, and with lockstep on one rank: weights and metrics are equal bit for bit;
- on two ranks: weights and metrics equal those of one rank within rounding (a relative 2e-5), because gradients are summed in
  another order;
- on two ranks, of which one is killed in mid-epoch, and resumed: weights and rows of metrics equal those of the undisturbed run
  on two ranks bit for bit. This holds for every row that is not refused.

Every finished run has a checkpoint whose weights have the checksum in `result.json`. If a column does not say *equal*, it says
why the values differ.
"""


def page() -> str:
    """The page, as Markdown."""
    return HEAD + "".join(f"\n## {area}\n\n{_table(rows)}" for area, rows in TABLE.items())


def _table(rows: tuple[Row, ...]) -> str:
    lines = ["| use | one rank vs. plain Trainer | two ranks vs. one | resumed vs. undisturbed |", "|---|---|---|---|"]
    return "".join(f"{line}\n" for line in [*lines, *map(_line, rows)])


def _line(row: Row) -> str:
    if row.fails:
        return f"| {row.use} | not covered yet: {row.fails} | | |"
    if row.refused:
        return f"| {row.use} | refused: “{row.refused}” | | |"
    if row.refused_late:
        return f"| {row.use} | refused at the step where it happens, on several ranks: “{row.refused_late}” | | |"
    two_ranks = row.per_rank or (f"equal weights; {row.logged_per_rank}" if row.logged_per_rank else "equal")
    return f"| {row.use} | {row.own_order or 'equal'} | {two_ranks} | equal |"


if __name__ == "__main__":
    PAGE.write_text(page())
