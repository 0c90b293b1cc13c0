"""b-tables as scanners and converters write them: what is accepted with a note, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dipy.data import get_fnames

from dsiprep.errors import GradientError
from dsiprep.io.b_tables import BTable, read_b_table
from dsiprep.io.number_tables import read_numbers
from dsiprep.ops.qspace.sampling_scheme import recognise
from dsiprep.phantom.schemes import gradient_table


def directions(count: int = 55) -> np.ndarray:
    vectors = np.random.default_rng(5).normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def read(folder: Path, bvals: np.ndarray, bvecs: np.ndarray) -> BTable:
    np.savetxt(folder / "a.bval", np.atleast_2d(bvals))
    np.savetxt(folder / "a.bvec", bvecs.T)
    return read_b_table(folder / "a.bval", folder / "a.bvec", len(bvals))


@pytest.mark.parametrize(
    "text",
    [
        "0 1000 2000\n",
        "0,1000,2000\n",
        "0, 1000; 2000",
        "0\t1000\t2000\r\n",
        "0\r1000\r2000\r",
        "# made by hand\n0 1000 2000 # s/mm2\n\n",
        "\ufeff0 1e3 2000.0\n",
        "0\n1000\n2000\n",
    ],
)
def test_tables_are_read_as_editors_write_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.bval").write_bytes(text.encode())
    np.testing.assert_array_equal(read_numbers(tmp_path / "a.bval").ravel(), [0, 1000, 2000])


def test_nan_vectors_of_b0_volumes_are_zero(tmp_path: Path) -> None:
    vectors = np.vstack([np.full(3, np.nan), directions(20)])
    table = read(tmp_path, np.r_[0, np.full(20, 1000.0)], vectors)
    np.testing.assert_array_equal(table.vectors[0], 0)
    np.testing.assert_allclose(table.vectors[1:], vectors[1:])
    assert "were read as 0 0 0" in table.notes[0]


def test_lengths_of_vectors_carry_the_amplitude_of_one_nominal_b_value(tmp_path: Path) -> None:
    true = np.r_[0, np.full(20, 1000.0), np.full(35, 3000.0)]
    unit = np.vstack([[0, 0, 0], directions(55)])
    table = read(tmp_path, np.where(true > 0, 3000.0, 0), unit * np.sqrt(true / 3000)[:, None])
    np.testing.assert_allclose(table.bvals, true, rtol=1e-6)
    np.testing.assert_allclose(table.vectors, unit, atol=1e-9)
    assert "3000 |g|²" in table.notes[0]
    scheme = recognise(table.bvals, table.vectors)
    assert scheme.description == "Multi-shell, 55 directions: 20 at b 1000, 35 at b 3000"


def test_lengths_of_vectors_beside_their_own_b_values_are_ignored(tmp_path: Path) -> None:
    """A table as DSI sequences write it, nominal (b at all volumes, b=0 included) and with b-values."""
    bvals, unit = gradient_table("dsi257")
    amplitude = np.sqrt(bvals / bvals.max())
    own = read(tmp_path, bvals, unit * amplitude[:, None])
    nominal = read(tmp_path, np.full(len(bvals), bvals.max()), unit * amplitude[:, None])
    for table in (own, nominal):
        np.testing.assert_allclose(table.bvals, bvals, atol=1e-6 * bvals.max())
        np.testing.assert_allclose(table.vectors[bvals > 0], unit[bvals > 0], atol=1e-9)
        assert recognise(table.bvals, table.vectors).description == recognise(bvals, unit).description
        assert len(table.notes) == 1


def test_table_of_dipy_whose_lengths_are_proportional_to_b(tmp_path: Path) -> None:
    rows = np.loadtxt(Path(get_fnames(name="small_101D")[0]).with_name("grad_514.txt"))
    table = read(tmp_path, rows[:, 0], rows[:, 1:])
    np.testing.assert_array_equal(table.bvals, rows[:, 0])
    np.testing.assert_allclose(np.linalg.norm(table.vectors[1:], axis=1), 1)
    assert "only the directions were used" in table.notes[0]


def changed(volumes: dict[int, float], bvals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unit = np.vstack([[0, 0, 0], directions(len(bvals) - 1)])
    for volume, length in volumes.items():
        unit[volume] *= length
    return bvals, unit


ONE_B = np.r_[0, np.full(55, 1000.0)]


@pytest.mark.parametrize(
    ("bvals", "vectors", "message"),
    [
        (*changed({3: 0.7}, ONE_B), r"volume 3 .* length 0\.7, which neither is 1 nor follows the b-values"),
        (*changed(dict.fromkeys(range(1, 56), 0.7), ONE_B), r"length 0\.7"),
        (*changed({3: 0.0}, ONE_B), "volume 3 .* zero although b > 0"),
        (*changed({3: np.nan}, ONE_B), "volume 3 .* not a finite number although b > 0"),
        (*changed({}, ONE_B / 1000), "largest b-value is 1, not above the b=0 threshold of 100.*multiplied by 1000"),
        (*changed({}, np.r_[0, np.linspace(0.3, 10, 55)]), "largest b-value is 10.*multiplied by 1000"),
        (*changed({}, ONE_B * 1e5), r"is 1e\+08; expected at most 1e\+06 s/mm²"),
        (*changed({}, np.where(ONE_B > 0, np.inf, 0)), "negative or not a number"),
        (*changed({3: np.inf}, ONE_B), "volume 3 .* not a finite number"),
        (*changed({3: 1e308}, ONE_B), "volume 3 .* not a finite number"),
    ],
)
def test_ambiguous_tables_are_refused(bvals: np.ndarray, vectors: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(GradientError, match=message):
        read(tmp_path, bvals, vectors)


def test_b0_series_have_small_b_values_and_no_directions(tmp_path: Path) -> None:
    table = read(tmp_path, np.full(8, 5.0), np.zeros((8, 3)))
    np.testing.assert_array_equal(table.bvals, 5)


@pytest.mark.parametrize("text", ["0 1e400 5", "0 -1e400 5", "0 nan 5", "0 1_000 5 6", "0 1000 xx"])
def test_numbers_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.bval").write_text(text)
    (tmp_path / "a.bvec").write_text("0 1 0\n0 0 1\n0 0 0\n")
    with pytest.raises(GradientError, match=r"a\.bval"):
        read_b_table(tmp_path / "a.bval", tmp_path / "a.bvec", 3)
