"""What every test may use: the real scans when they are there, scans in memory, and shapes checked at every call."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, as the commands do
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# The tests check the shapes that the signatures promise; a user's run pays nothing for them.
install_import_hook(("spade3d", "dagman"), "beartype.beartype")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans (SPADE3D_TEST_DATA, or ../shared/data); the test is skipped where it is absent."""
    folder = Path(os.environ.get("SPADE3D_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans at {folder}")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """One thread of torch while the tests of a file run: small networks are faster so, and give the same bits again."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class InMemory:
    """A store of arrays in memory: what crops and streams read of a VolumeStore, and nothing else."""

    def __init__(self, cases, images, labels, label_names):
        self.cases, self.images, self.labelled, self.label_names = tuple(cases), images, labels, label_names

    def image(self, i, box=None):
        return self.images[i] if box is None else self.images[i][tuple(map(slice, *box))]

    def labels(self, i, box=None):
        return self.labelled[i] if box is None else self.labelled[i][tuple(map(slice, *box))]


@pytest.fixture(scope="session")
def in_memory():
    """Makes a store of images (i, j, k), shown as stored: `in_memory([image, ...], spacing=..., labels=[...])`."""
    from spade3d.volumes.body_box import field_of_view
    from spade3d.volumes.geometry import spacing_of
    from spade3d.volumes.preprocessing import Normalisation

    def make(images, *, spacing=(1.0, 1.0, 1.0), affines=None, labels=None, label_names=None, normalisation=None):
        affines = affines or [np.diag([*spacing, 1.0])] * len(images)
        cases = [
            SimpleNamespace(
                name=f"scan {i}",
                subject=f"patient {i}",
                affine=affine,
                spacing=spacing_of(affine),
                shape=image.shape,
                normalisation=normalisation or Normalisation(0.0, 1.0, -1e4, 1e4),
                body_box_mm=field_of_view(image.shape, affine),
                has_labels=labels is not None,
                label_values=() if labels is None else tuple(np.unique(labels[i][labels[i] > 0]).tolist()),
            )
            for i, (image, affine) in enumerate(zip(images, affines, strict=True))
        ]
        return InMemory(cases, [image.astype(np.int16) for image in images], labels, label_names or {})

    return make


@pytest.fixture(scope="session")
def ramps(in_memory):
    """Makes, for each axis, a store of one scan whose voxels hold their own place along that axis in mm."""
    from spade3d.volumes.preprocessing import Normalisation

    def make(shape, affine):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        return [
            in_memory([index], affines=[affine], normalisation=Normalisation(0.0, float(mm), -1e4, 1e4))
            for index, mm in zip(np.indices(shape), spacing, strict=True)
        ]

    return make


@pytest.fixture
def torch_calls():
    """Makes a context whose `calls` are what torch is asked for within it: (operation, arguments), in order."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls.append((func, args))
            return func(*args, **(kwargs or {}))

    return Watch
