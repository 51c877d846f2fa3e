"""A slice of the matrix: every engine on both sides, every world size, bf16, and the cells that must refuse."""

import pytest

from benchmarks import matrix
from benchmarks.pool import Pools

REFUSED = matrix.Cell(matrix.Config("fsdp2", 1), matrix.Config("zero1", 2), unused=True)
SLICE = list(dict.fromkeys([*matrix.quick_cells()[::3], REFUSED]))


@pytest.mark.timeout(300)
def test_a_slice_of_the_matrix_shows_what_was_expected(pools: Pools, tmp_path):
    rows = matrix.run_cells(SLICE, pools, str(tmp_path))
    assert [row for row in rows if not row["as_expected"]] == []
    engines = {row["source"].split("×")[0] for row in rows} & {row["target"].split("×")[0] for row in rows}
    assert set(matrix.ENGINES) - {"single"} <= engines
    assert matrix.figures(rows)["cells_refused"] >= 1


def test_the_table_of_expectations_covers_every_pair():
    cells = {cell for cell in matrix.all_cells() if cell.dtype == "fp32" and not cell.unused}
    assert len(cells) == len(matrix.configs()) ** 2 == 625
    assert all(matrix.expected(cell) != "refused" for cell in cells)
    bf16 = [cell for cell in matrix.all_cells() if cell.dtype == "bf16"]
    engines = {(c.source.engine, c.target.engine) for c in bf16}
    assert len(engines) == 64
    assert {(c.source.world_size, c.target.world_size) for c in bf16} == {(a, b) for a in matrix.WORLD_SIZES for b in matrix.WORLD_SIZES}
    assert len(matrix.quick_cells()) >= 60
