"""Cells of a scan: what the encoder says there, where they lie, and the same whether read from disk or made anew."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dagman.downstream.coarse_scans import CoarseScans
from dagman.downstream.one_scan import OneScan
from dagman.downstream.token_cache import TokenCache, filled, mark_of
from dagman.downstream.token_grids import (
    CELL,
    Windows,
    block_outputs,
    body_crop,
    cells_of,
    channels_of,
    encode,
    frozen,
    places_of,
    to_world,
    token_grid,
)
from spade3d.crops.crop import Crop, cut
from spade3d.faults import DataFault
from spade3d.networks.sliding import importance
from spade3d.networks.swin import SwinTransformer
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.volumes.geometry import apply_affine
from spade3d.volumes.preprocessing import Normalisation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> SwinTransformer:
    torch.manual_seed(0)
    return SwinUNETR(1, 1, feature_size=12, window=4).swinViT.eval()


def scan(shape=(40, 44, 36), *, body=None, affine=None, seed: int = 0) -> OneScan:
    """Noise; the body is all of it, or the box `body` in mm."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    low, high = apply_affine(affine, np.array([np.full(3, -0.5), np.array(shape) - 0.5]))
    body = body or (tuple(np.minimum(low, high).tolist()), tuple(np.maximum(low, high).tolist()))
    voxels = np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)
    shown = Normalisation(0.0, 1e-3, 0.0, 1.0)
    return OneScan(SimpleNamespace(affine=affine, normalisation=shown, body_box_mm=body), voxels)


def test_the_last_blocks_of_stages_3_and_4_are_read_before_the_merging(encoder):
    images = torch.rand(2, 1, 32, 32, 48)
    three, four = block_outputs(encoder, images, (3, 4))
    assert three.shape == (2, 48, 4, 4, 6) and four.shape == (2, 96, 2, 2, 3)
    merged = encoder.get_submodule("layers3.0.downsample")
    seen = []
    handle = merged.register_forward_hook(lambda _, given, gave: seen.extend([given[0], gave]))
    stages = encoder(images)
    handle.remove()
    tokens, handed_on = seen
    torch.testing.assert_close(three, F.layer_norm(tokens, tokens.shape[-1:]).movedim(-1, 1))
    torch.testing.assert_close(stages[3], F.layer_norm(handed_on, handed_on.shape[-1:]).movedim(-1, 1))
    above = F.interpolate(four, scale_factor=2, mode="trilinear")
    torch.testing.assert_close(encode(encoder, images), torch.cat([three, above], dim=1))
    assert channels_of(encoder) == 144 and not merged._forward_pre_hooks


def test_cells_hold_their_voxels():
    """A cell's centre is the mean of its voxels' centres, wherever the crop lies and however it is turned."""
    to_mm = np.array([[0, 2.0, 0, 5], [-2, 0, 0, 90], [0, 0, 3, -7], [0, 0, 0, 1]])
    cells = cells_of(Crop(0, (16, 24, 32), to_mm))
    assert cells.shape == (2, 3, 4)
    for cell in np.ndindex(2, 3, 4):
        voxels = np.stack(np.meshgrid(*(np.arange(8) + 8 * n for n in cell), indexing="ij"), -1).reshape(-1, 3)
        np.testing.assert_allclose(apply_affine(cells.to_mm, np.array(cell)), apply_affine(to_mm, voxels).mean(axis=0))


def test_the_body_is_covered_on_the_scans_own_voxels():
    body = ((11.0, 20.2, 7.0), (60.0, 55.0, 40.0))
    one = scan(body=body)
    crop = body_crop(0, one.cases[0], (2.0, 2.0, 2.0))
    assert not any(side % CELL for side in crop.shape)
    first, last = apply_affine(crop.to_mm, np.array([[0, 0, 0], np.array(crop.shape) - 1]))
    assert (first % 2 == 0).all() and (first - 1 <= body[0]).all() and (last + 1 >= body[1]).all()
    assert (first + 1 > body[0]).all() and (last + 1 - 16 < body[1]).all()  # and no more than a cell beyond
    stored = one.voxels[tuple(slice(int(a), int(a) + n) for a, n in zip(first / 2, crop.shape, strict=True))]
    shown = cut(one, crop)
    i, j, k = stored.shape
    np.testing.assert_allclose(shown[:i, :j, :k], stored * 1e-3, atol=1e-6)


def test_places_run_from_0_to_1_over_the_body_along_r_a_s():
    """Also where the scan's axes run the other way round."""
    for affine in (
        np.diag([2.0, 2, 2, 1]),
        np.array([[0, -2.0, 0, 100], [2, 0, 0, -30], [0, 0, -2, 10], [0, 0, 0, 1]]),
    ):
        one = scan(affine=affine)
        stored = one.cases[0]
        cells = cells_of(body_crop(0, stored, (2.0, 2.0, 2.0)))
        places, valid = places_of(stored, cells)
        low, high = map(np.array, stored.body_box_mm)
        world = apply_affine(to_world(stored, cells), np.stack(np.indices(cells.shape), -1))
        np.testing.assert_allclose(np.moveaxis(places, 0, -1), (world - low) / (high - low), atol=1e-5)
        assert valid.all()
    away = cells_of(Crop(0, (16, 16, 16), np.diag([2.0, 2, 2, 1]) + np.array([[0, 0, 0, 500.0]] + [[0] * 4] * 3)))
    assert not places_of(scan().cases[0], away)[1].any()


def test_one_window_over_all_is_what_the_encoder_says(encoder):
    one = scan((32, 32, 48))
    tokens, cells = token_grid(frozen(encoder, CPU), one, 0, Windows((32, 32, 48), (2.0, 2.0, 2.0)), CPU)
    with torch.no_grad():
        direct = encode(encoder, torch.from_numpy(cut(one, body_crop(0, one.cases[0], (2.0,) * 3)))[None, None])
    np.testing.assert_allclose(tokens, direct[0].numpy(), atol=1e-5)
    assert cells.shape == tokens.shape[1:]


def test_windows_are_blended_as_the_slow_way_does():
    """Each cell is the Gaussian mean over the windows that hold it, whatever batch they came in."""
    one = scan((40, 24, 16))
    windows = Windows((16, 16, 16), (2.0, 2.0, 2.0), overlap=0.5)

    def ask(images):  # the mean of each cell, and its window's mean: neighbours in another window differ
        cells = F.avg_pool3d(images, 8)
        return torch.cat([cells, cells.mean(dim=(2, 3, 4), keepdim=True).expand_as(cells)], dim=1)

    tokens, cells = token_grid(ask, one, 0, windows, CPU, batch=3)
    assert cells.shape == (5, 3, 2)
    total, weights = np.zeros((2, 5, 3, 2)), np.zeros((5, 3, 2))
    for i in range(4):
        for j in range(2):
            crop = one.voxels[8 * i : 8 * i + 16, 8 * j : 8 * j + 16].astype(np.float32) * 1e-3
            found = ask(torch.from_numpy(crop)[None, None])[0].numpy()
            total[:, i : i + 2, j : j + 2] += found * importance((2, 2, 2)).numpy()
            weights[i : i + 2, j : j + 2] += importance((2, 2, 2)).numpy()
    np.testing.assert_allclose(tokens, total / weights, atol=1e-5)
    again, _ = token_grid(ask, one, 0, windows, CPU, batch=1)
    np.testing.assert_allclose(tokens, again, atol=1e-6)


def test_a_body_smaller_than_a_window_lies_in_its_middle():
    one = scan((48, 48, 48), body=((40.0, 40.0, 40.0), (55.0, 55.0, 55.0)))
    seen = []

    def ask(images):
        seen.append(images)
        return F.avg_pool3d(images, 8)

    tokens, cells = token_grid(ask, one, 0, Windows((32, 32, 32), (2.0,) * 3), CPU)
    assert cells.shape == (1, 1, 1) and len(seen) == 1
    shown = one.voxels[20:28, 20:28, 20:28] * 1e-3
    assert tokens.item() == pytest.approx(shown.mean(), abs=1e-5)
    np.testing.assert_allclose(seen[0][0, 0], one.voxels[12:44, 12:44, 12:44] * 1e-3, atol=1e-5)


class OnDisk(OneScan):
    """A store that says what a cache asks for."""

    def __init__(self, voxels_seed: int = 0, fingerprint: str = "f0"):
        made = scan(seed=voxels_seed)
        super().__init__(made.cases[0], made.voxels)
        self.cases = (SimpleNamespace(**vars(self.cases[0]), name="a/b", fingerprint=fingerprint),)
        self.preprocessing = SimpleNamespace(fingerprint=lambda: "p")


WINDOWS = Windows((32, 32, 32), (2.0, 2.0, 2.0))


def test_cached_tokens_are_those_computed_anew_and_are_computed_once(encoder, tmp_path):
    done = []
    cache = filled(encoder, OnDisk(), [0], WINDOWS, tmp_path / "tokens", CPU, lambda *what: done.append(what))
    anew, cells = token_grid(frozen(encoder, CPU), scan(), 0, WINDOWS, CPU)
    np.testing.assert_array_equal(cache.tokens(0), anew.astype(np.float16))
    np.testing.assert_allclose(cache.tokens(0).astype(np.float32), anew, atol=4e-3)  # of layer-normed numbers
    assert cache.cells(0).shape == cells.shape and done[-1] == (1, 1, "a/b")
    before = cache.path(0).stat().st_mtime_ns
    again = filled(encoder, OnDisk(), [0], WINDOWS, tmp_path / "tokens", CPU, lambda *what: done.append(what))
    assert again.path(0).stat().st_mtime_ns == before and len(done) == 2


def test_another_encoder_scan_or_window_has_another_file(encoder, tmp_path):
    torch.manual_seed(1)
    other = SwinUNETR(1, 1, feature_size=12, window=4).swinViT
    read_otherwise = SwinUNETR(1, 1, feature_size=12, window=4, monai_compatible=True).swinViT
    read_otherwise.load_state_dict(encoder.state_dict())
    marks = [mark_of(one) for one in (encoder, other, read_otherwise)]
    assert mark_of(encoder) == marks[0]
    caches = [TokenCache(OnDisk(), WINDOWS, tmp_path, mark, 144) for mark in marks]
    caches += [
        TokenCache(OnDisk(fingerprint="f1"), WINDOWS, tmp_path, marks[0], 144),
        TokenCache(OnDisk(), replace(WINDOWS, overlap=0.25), tmp_path, marks[0], 144),
    ]
    assert len({cache.path(0) for cache in caches}) == 5


def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path):
    cache = TokenCache(OnDisk(), WINDOWS, tmp_path, "", 144)
    with open(cache.path(0), "wb") as file:
        np.save(file, np.zeros((3, 2, 2, 2), np.float16))
    with pytest.raises(DataFault, match=r"float16 \(144, 5, 6, 5\) is needed; remove it"):
        cache.tokens(0)
    cache.path(0).write_bytes(b"no array")
    with pytest.raises(DataFault, match="not readable"):
        cache.tokens(0)


def test_a_side_shorter_than_a_block_is_one_block_in_its_own_middle():
    thin = CoarseScans(scan((41, 44, 3)), 8.0)  # voxels of 2 mm: the third axis holds 6 of the 8 mm
    assert thin.cases[0].shape == (10, 11, 1) and thin.cases[0].spacing == (8.0, 8.0, 6.0)
    np.testing.assert_allclose(apply_affine(thin.cases[0].affine, np.zeros(3)), [3, 3, 2])
    assert thin.image(0)[0, 0, 0] == np.rint(scan((41, 44, 3)).voxels[:4, :4].mean())


def test_coarse_scans_are_means_of_whole_blocks_in_their_place():
    one = scan((41, 44, 36))
    coarse = CoarseScans(one, 4.0)
    assert coarse.cases[0].shape == (20, 22, 18) and coarse.cases[0].spacing == (4.0, 4.0, 4.0)
    assert coarse.image(0)[3, 2, 1] == np.rint(one.voxels[6:8, 4:6, 2:4].mean())
    np.testing.assert_allclose(apply_affine(coarse.cases[0].affine, np.zeros(3)), [1, 1, 1])  # between two voxels
    np.testing.assert_array_equal(coarse.image(0, ((1, 2, 3), (4, 5, 6))), coarse.image(0)[1:4, 2:5, 3:6])
    crop = Crop(0, (4, 4, 4), np.diag([4.0, 4, 4, 1]))
    np.testing.assert_allclose(
        to_world(one.cases[0], coarse.in_source(crop)), to_world(coarse.cases[0], crop), atol=1e-9
    )
