"""The learned frame: its loss by its definition, its vote, and a set of bodies that it places."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from spade3d.volumes import learned_frame
from spade3d.volumes.learned_frame import learned_frames, relative_position_loss, robust_line
from spade3d.volumes.preprocessing import Normalisation


def test_the_loss_equals_its_definition():
    rng = np.random.default_rng(0)
    places, centres = rng.normal(0, 0.2, (2, 3, 4, 3))
    terms = []
    for s in range(3):
        for a in range(4):
            for b in range(4):
                off = np.abs(places[s, a] - places[s, b] - (centres[s, a] - centres[s, b]))
                terms += np.where(off < 0.1, off**2 / 0.2, off - 0.05).tolist()
    loss = relative_position_loss(torch.from_numpy(places).float(), torch.from_numpy(centres).float())
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_the_vote_ignores_a_minority_and_never_stretches_much():
    rng = np.random.default_rng(0)
    x = rng.uniform(-150, 150, (200, 3))
    y = x * (1.1, 0.9, 1.0) + (40, -20, 300) + rng.normal(0, 3, x.shape)
    y[:60] = rng.uniform(-200, 200, (60, 3))
    scale, shift = robust_line(x, y, 5.0)
    assert scale == pytest.approx([1.1, 0.9, 1.0], abs=0.02)
    assert shift == pytest.approx([40, -20, 300], abs=3)
    assert robust_line(x, 3 * x, 5.0)[0] == pytest.approx([4 / 3] * 3)
    assert robust_line(x, np.zeros_like(x), 1e6)[0] == pytest.approx([1] * 3, abs=1e-3)  # the prior


def bodies(in_memory, count, noise=0):
    """Scans of one smooth body, of 40 x 36 x 40 voxels each, from another start in the body and on another table.

    Behind them come scans of `noise`, which show nothing.
    """
    rng = np.random.default_rng(0)
    index, waves, phases = np.indices((56, 44, 56)), rng.normal(0, 0.12, (12, 3)), rng.uniform(0, 6, 12)
    body = sum(np.sin(np.tensordot(wave, index, 1) + phase) for wave, phase in zip(waves, phases, strict=True))
    body, images, affines, offsets = 500 + 100 * body, [], [], []
    for _ in range(count):
        start, table = rng.integers(0, (17, 9, 17)), rng.uniform(-300, 300, 3)
        images.append(
            body[tuple(slice(a, a + n) for a, n in zip(start, (40, 36, 40)))] + rng.normal(0, 10, (40, 36, 40))
        )
        affine = np.diag([4.0, 4.0, 4.0, 1.0])
        affine[:3, 3] = table
        affines.append(affine)
        offsets.append(table - 4.0 * start)
    images += [rng.normal(500, 200, (40, 36, 40)) for _ in range(noise)]
    affines += [affines[0]] * noise
    store = in_memory(images, affines=affines, normalisation=Normalisation(0.0, 1e-3, 0.0, 1.0))
    for case in store.cases:
        case.modality = "MR"
    return store, np.array(offsets)


def test_scans_are_placed_by_what_they_show_and_noise_is_not(in_memory):
    store, offsets = bodies(in_memory, 4, noise=1)
    reports = []
    frames = learned_frames(store, range(5), seed=3, progress=lambda *report: reports.append(report), steps=60)
    assert reports[-1][:2] == (60, 60)
    place = np.array([frames[i].place(offsets[i] + 100.0) for i in range(4)])  # one place of the body
    assert np.linalg.norm(place - np.median(place, axis=0), axis=1).mean() < 20
    assert np.linalg.norm(offsets - np.median(offsets, axis=0), axis=1).mean() > 200
    assert frames[4] is None, "crops of noise agree on no place"


@pytest.mark.parametrize("modalities, looks", [(("MR", "MR"), {"as it is"}), (("CT", "MR"), {"as it is", "inverted"})])
def test_brightness_is_inverted_where_the_set_has_several_modalities(in_memory, monkeypatch, modalities, looks):
    seen, coloured = set(), learned_frame._coloured

    def watched(crops, *asked):
        shown = coloured(crops, *asked)
        brighter = np.corrcoef(crops.ravel(), shown.ravel())[0, 1] > 0
        seen.add("as it is" if brighter else "inverted")
        return shown

    monkeypatch.setattr(learned_frame, "_coloured", watched)
    store, _ = bodies(in_memory, 2)
    for case, modality in zip(store.cases, modalities, strict=True):
        case.modality = modality
    learned_frames(store, range(2), seed=0, progress=lambda *report: None, steps=3)
    assert seen == looks


def test_the_same_seed_gives_the_same_frames(in_memory, monkeypatch):
    monkeypatch.setattr("spade3d.volumes.learned_frame.LEAST_AGREEMENT", 0.0)  # two steps teach nothing to agree on
    store, _ = bodies(in_memory, 1)
    frames = [learned_frames(store, [0], seed=s, progress=lambda *report: None, steps=2)[0] for s in (5, 5, 6)]
    assert (frames[0].to_frame == frames[1].to_frame).all()
    assert (frames[0].to_frame != frames[2].to_frame).any()


def test_torch_is_imported_only_for_the_learned_frame():
    code = (
        "import sys; import spade3d.volumes.body_frame, spade3d.volumes.affine_frame; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
