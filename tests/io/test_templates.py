"""Templates: names, geometry, and no downloads unless requested."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dsiprep.data.template import Template
from dsiprep.errors import InputError
from dsiprep.io import templates
from dsiprep.io.bundled_template import read_displacement
from dsiprep.io.templates import load_template
from dsiprep.ops.image.displacement_field import compose, invert, jacobian_determinant

TRUE_DEFAULT = Path(__file__).parents[3] / "shared" / "data" / "templates" / "tpl-MNI152NLin2009cAsym"
SERVER_IS_REACHABLE = templates._server_is_reachable  # before tests are cut off from the network


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty TemplateFlow folder, and sockets that refuse to connect."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "templateflow"))
    return tmp_path / "templateflow"


def _write_cache(home: Path, name: str, resolution: str = "01", cohort: str = "") -> np.ndarray:
    affine = np.diag([-1.0, 2, 3, 1])
    folder, stem = home / f"tpl-{name}", f"tpl-{name}"
    if cohort:
        folder, stem = folder / f"cohort-{cohort}", f"{stem}_cohort-{cohort}"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    mask = np.zeros((6, 7, 8), np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    values = {"T1w": rng.uniform(50, 100, mask.shape), "desc-brain_mask": mask}
    values |= {f"label-{t}_probseg": np.full(mask.shape, p) for t, p in (("CSF", 0.2), ("GM", 0.5), ("WM", 0.3))}
    for ending, data in values.items():
        image = nib.Nifti1Image(np.asarray(data, np.float32), affine)
        nib.save(image, folder / f"{stem}_res-{resolution}_{ending}.nii.gz")
    return affine


def test_bundled_template_has_mni_geometry_and_its_own_name(no_network):
    template = load_template("MNI152NLin2009aSym")
    assert template.name == "MNI152NLin2009aSym"
    assert (template.origin, template.note) == ("nilearn", "")
    assert not no_network.exists()
    assert np.allclose(template.brain.grid.affine[:3, 3], [-98, -134, -72])
    _check_brain(template)


def test_default_template_without_templateflow_is_the_bundled_one_in_its_space(no_network):
    template = load_template()
    assert template.name == "MNI152NLin2009cAsym"
    assert "MNI152NLin2009aSym, which nilearn ships" in template.note
    assert template.brain.grid.shape == (193, 229, 193)
    assert np.allclose(template.brain.grid.affine[:3, 3], [-96, -132, -78])
    assert load_template("MNI152NLin2009cAsym").note == template.note
    _check_brain(template)


def _check_brain(template: Template) -> None:
    assert np.allclose(template.brain.grid.voxel_sizes, 1)
    inside = template.mask.numpy() > 0.5
    assert 1.5e6 < inside.sum() < 2.2e6
    assert float(template.brain.data[~(template.mask.data > 0.5)].abs().max()) == 0
    total = template.tissue.sum(0).numpy()
    assert np.allclose(total[inside], 1, atol=0.05)
    assert np.all(total[~inside] == 0)


@pytest.mark.skipif(not TRUE_DEFAULT.is_dir(), reason="needs MNI152NLin2009cAsym in shared/data/templates")
def test_bundled_template_in_default_space_matches_the_default_template(no_network):
    template = load_template()
    mask = nib.load(next(TRUE_DEFAULT.glob("*res-01_desc-brain_mask.nii.gz")))
    true, found = np.asarray(mask.dataobj) > 0.5, template.mask.numpy() > 0.5
    assert 2 * (true & found).sum() / (true.sum() + found.sum()) > 0.985
    image = nib.load(next(TRUE_DEFAULT.glob("*res-02_desc-brain_T1w.nii.gz")))
    data, affine = np.asarray(image.dataobj), np.asarray(image.affine)
    brain = np.argwhere(data > 0.1 * data.max())
    points = brain @ affine[:3, :3].T + affine[:3, 3]
    here = ndimage.map_coordinates(template.brain.numpy(), template.brain.grid.to_voxels(points).T, order=1)
    assert np.corrcoef(here, data[tuple(brain.T)])[0, 1] > 0.95  # 0.88 with the symmetric template as it is


def test_displacement_between_template_spaces_is_invertible(no_network):
    field = read_displacement()
    assert float(jacobian_determinant(field).min()) > 0.05
    round_trip = compose(field, invert(field)).data.norm(dim=0)
    assert float(round_trip.mean()) < 0.05


def test_bundled_template_is_symmetric_about_the_midsagittal_plane(no_network):
    template = load_template("MNI152NLin2009aSym")
    voxels = template.brain.grid.to_voxels([[0.0, 0, 0]])[0]
    middle = int(voxels[0])
    data = template.brain.numpy()
    right, left = data[middle + 1 : middle + 60], data[middle - 1 : middle - 60 : -1]
    assert np.corrcoef(right.ravel(), left.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("name", ["", "MNI152NLin2009aSym"])
def test_bundled_tissue_priors_match_anatomy(no_network, name):
    template = load_template(name)
    points = {0: (6, -8, 22), 1: (12, 12, 8), 2: (26, -20, 32)}  # lateral ventricle, caudate, corona radiata
    for tissue, point in points.items():
        i, j, k = np.round(template.brain.grid.to_voxels(np.array(point, float))).astype(int)
        assert int(template.tissue[:, i, j, k].argmax()) == tissue


@pytest.mark.parametrize("resolution", ["01", "1"])
def test_templateflow_files_take_precedence(no_network, resolution):
    affine = _write_cache(no_network, "MNI152NLin2009cAsym", resolution)
    template = load_template()
    assert (template.name, template.origin) == ("MNI152NLin2009cAsym", "TemplateFlow")
    assert np.allclose(template.brain.grid.affine, affine)
    assert np.count_nonzero(template.brain.numpy()) == 27
    assert np.allclose(template.tissue.amax((1, 2, 3)).numpy(), [0.2, 0.5, 0.3], atol=1e-6)


def test_empty_templateflow_placeholders_are_ignored(no_network):
    _write_cache(no_network, "MNI152NLin2009cAsym")
    next((no_network / "tpl-MNI152NLin2009cAsym").glob("*GM*")).write_bytes(b"")
    assert load_template().origin != "TemplateFlow"


def test_truncated_file_raises(no_network):
    _write_cache(no_network, "MNI152NLin2009cAsym")
    file = next((no_network / "tpl-MNI152NLin2009cAsym").glob("*_T1w*"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="T1w"):
        load_template()


def test_unavailable_template_raises(no_network):
    with pytest.raises(InputError, match="MNI152NLin6Asym"):
        load_template("MNI152NLin6Asym")


def test_templates_are_downloaded_only_on_request(no_network, monkeypatch):
    downloads = []

    def download(name: str, cohort: str) -> None:
        downloads.append(name)
        _write_cache(no_network, name)

    monkeypatch.setattr(templates, "_download", download)
    assert load_template().origin != "TemplateFlow"
    assert not downloads
    assert load_template(allow_network=True).origin == "TemplateFlow"
    assert downloads == ["MNI152NLin2009cAsym"]


def test_loading_imports_neither_nilearn_nor_templateflow(tmp_path):
    code = (
        "import sys; from dsiprep.io.templates import load_template; load_template(); "
        "assert not {'nilearn', 'templateflow'} & set(sys.modules)"
    )
    environment = {"TEMPLATEFLOW_HOME": str(tmp_path / "none"), "PATH": "", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_no_download_is_tried_if_the_server_cannot_be_reached(no_network, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(templates, "_server_is_reachable", SERVER_IS_REACHABLE)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setitem(sys.modules, "templateflow", None)  # an import would raise
    assert load_template(allow_network=True).origin != "TemplateFlow"


def test_note_if_the_default_template_is_unavailable(no_network):
    assert "MNI152NLin2009cAsym is not in" in load_template().note
    assert load_template("MNI152NLin2009aSym").note == ""
    _write_cache(no_network, "MNI152NLin2009cAsym")
    assert load_template().note == ""


@pytest.mark.parametrize("name", ["MNIInfant+2", "MNIInfant:cohort-2"])
def test_cohort_of_a_template(no_network, name):
    _write_cache(no_network, "MNIInfant", "1", cohort="2")
    template = load_template(name)
    assert template.name == "MNIInfant+2"
    assert len(template.files) == 5
    with pytest.raises(InputError, match="MNIInfant"):
        load_template("MNIInfant+3")


def test_t2w_is_used_if_the_template_has_one(no_network):
    _write_cache(no_network, "Baby")
    folder = no_network / "tpl-Baby"
    assert load_template("Baby", "T2w").files[-1].name == "tpl-Baby_res-01_T1w.nii.gz"
    (folder / "tpl-Baby_res-01_T2w.nii.gz").write_bytes((folder / "tpl-Baby_res-01_T1w.nii.gz").read_bytes())
    assert load_template("Baby", "T2w").files[-1].name == "tpl-Baby_res-01_T2w.nii.gz"
    assert load_template("Baby", "T1w").files[-1].name == "tpl-Baby_res-01_T1w.nii.gz"


def test_custom_template(no_network):
    _write_cache(no_network, "Macaque")
    folder = no_network / "tpl-Macaque"
    head = folder / "tpl-Macaque_res-01_T1w.nii.gz"
    template = load_template(str(head))
    assert (template.name, template.origin, template.note) == ("Macaque", str(folder), "")
    assert template.tissue is not None
    assert np.count_nonzero(template.brain.numpy()) == 27
    for prior in folder.glob("*_probseg.nii.gz"):
        if "CSF" in prior.name:
            continue
        prior.unlink()
    with pytest.raises(InputError, match="label-GM_probseg"):
        load_template(str(head))
    next(folder.glob("*CSF*")).unlink()
    assert load_template(str(head)).tissue is None
    next(folder.glob("*mask*")).unlink()
    with pytest.raises(InputError, match="desc-brain_mask"):
        load_template(str(head))
    with pytest.raises(InputError, match="no such file"):
        load_template(str(folder / "tpl-Ape_T1w.nii.gz"))


def test_custom_template_may_not_have_a_standard_name(no_network):
    _write_cache(no_network, "MNI152NLin2009cAsym")
    with pytest.raises(InputError, match="rename"):
        load_template(str(no_network / "tpl-MNI152NLin2009cAsym" / "tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz"))
