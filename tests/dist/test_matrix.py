"""A slice of the matrix: every engine on both sides, every variant and kind of state, and the cells that must refuse."""

import pytest

from benchmarks import matrix
from benchmarks.pool import Pools

REFUSED = [
    matrix.Cell(matrix.Config("fsdp2", 1), matrix.Config("zero1", 2), unused=True),
    matrix.Cell(matrix.Config("zero1", 2), matrix.Config("single", 1), optimizer="factored"),
]
FURTHER = matrix.covering(matrix.further_cells())
SLICE = list(dict.fromkeys([*[cell for cell in matrix.quick_cells() if cell not in FURTHER][::3], *FURTHER, *REFUSED]))


@pytest.mark.timeout(300)
def test_a_slice_of_the_matrix_shows_what_was_expected(pools: Pools, tmp_path):
    rows = matrix.run_cells(SLICE, pools, str(tmp_path))
    assert [row for row in rows if not row["as_expected"]] == []
    engines = {row["source"].split("×")[0] for row in rows} & {row["target"].split("×")[0] for row in rows}
    assert set(matrix.ENGINES) - {"single"} <= engines
    assert matrix.figures(rows)["cells_refused"] >= len(REFUSED)


def test_the_table_of_expectations_covers_every_pair():
    cells = {matrix.Cell(a, b) for a in matrix.configs() for b in matrix.configs()}
    assert len(cells) == 625
    assert cells <= set(matrix.all_cells())
    assert all(matrix.expected(cell) != "refused" for cell in cells)
    bf16 = matrix.bf16_cells()
    engines = {(c.source.engine, c.target.engine) for c in bf16}
    assert len(engines) == 64
    assert {(c.source.world_size, c.target.world_size) for c in bf16} == {(a, b) for a in matrix.WORLD_SIZES for b in matrix.WORLD_SIZES}
    assert len(matrix.quick_cells()) >= 60


def test_every_variant_and_kind_of_state_is_in_the_quick_slice():
    cells, further = matrix.quick_cells(), matrix.further_cells()
    compiled = {"zero2_cpu_adam", "zero3_cpu_adam"}  # its op takes too long to build for a test
    assert {c.engine for cell in cells for c in (cell.source, cell.target)} == matrix.VARIANTS.keys() - compiled
    for kind in ("dtype", "optimizer", "ema", "unused"):
        assert {getattr(cell, kind) for cell in cells} == {getattr(cell, kind) for cell in matrix.all_cells()}
    for name in matrix.VARIANTS.keys() - set(matrix.ENGINES) - compiled - {"zero1_master"}:
        sides = [{cell.source.engine for cell in further}, {cell.target.engine for cell in further}]
        assert all(name in side for side in sides), f"{name} is saved and loaded"
    assert sum(matrix.expected(cell) == "refused" for cell in further) >= 8
