"""Every row of the table holds, and the page says what the table says."""

from pathlib import Path

import pytest
from support.runs import Launch

from foreign.base import Row
from foreign.harness import check_refusal, check_row
from foreign.page import PAGE, page
from foreign.table import TABLE

pytestmark = pytest.mark.filterwarnings("default")  # people's code may warn


def _parameters() -> list[object]:
    return [
        pytest.param(row, id=row.use, marks=[pytest.mark.xfail(reason=row.fails, strict=True)] if row.fails else [])
        for rows in TABLE.values()
        for row in rows
    ]


@pytest.mark.parametrize("row", _parameters())
def test_row(
    row: Row, launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for loggers that write into folders of their own
    if row.refused or row.refused_late:
        check_refusal(row, launch, lambda: capfd.readouterr().err)
    else:
        check_row(row, launch, tmp_path)


def test_the_page_is_generated_from_the_table() -> None:
    assert PAGE.read_text() == page(), f"{PAGE} is stale: make pages"


def test_uses_have_names_of_their_own() -> None:
    uses = [row.use for rows in TABLE.values() for row in rows]
    assert len(uses) == len(set(uses)) >= 60
