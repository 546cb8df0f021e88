"""The learned frame: where in the body a crop lies, learned from the set itself, and each scan placed by a vote.

A small network f gives a crop a place (3,) in mm. It is taught by pairs of crops of one scan, whose distance is known
(relative position regression: Lei et al., "Contrastive learning of relative position regression for one-shot object
localization in 3D medical images", MICCAI 2021):

    | f(a) - f(b) - (centre of a - centre of b) |,  Huber's, over all pairs of the crops of a scan

Theirs bounds the offset by tanh and finds an organ from one labelled example; ours leaves f free, and a scan is placed
by the robust fit of f over many of its crops:  f(crop) = scale * centre + shift  along each axis. Two things tie f of
two scans together: one network serves all, so that like anatomy gives like places; and f is pulled weakly to the place
in the crop's own field of view, since a few scans can be learned by heart, each at a place of its own. Brightness is
changed at random, and inverted where the set has several modalities. The network is not kept.

Votes of one scan agree also where all of them are wrong, so few scans are refused: on our sets, none.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spade3d.volumes.body_frame import BodyFrame, Progress, of_typical_size
from spade3d.volumes.coarse_scan import CoarseScan, cell_mm, coarse_scan
from spade3d.volumes.geometry import apply_affine, stretch

CROP = 24  # cells a side, of the 56 of a typical scan
STEPS = 600
SCANS, CROPS = 4, 8  # of a step
UNIT = 20.0  # cells in a unit of the network's output
PULL = 0.03  # weight of  | f(a) - (centre of a - centre of its scan) |,  beside a loss of about 0.1
VOTES = 256
SLACK_CELLS = 2.0  # cells: how far the crops of a scan must spread before their votes change its scale
MOST_STRETCH = 4 / 3
NEAR, LEAST_AGREEMENT = 5.0, 0.5  # cells; and the share of the votes that must be so near to what is fitted


def learned_frames(
    store, cases: Sequence[int], *, seed: int = 0, progress: Progress, steps: int = STEPS
) -> dict[int, BodyFrame | None]:
    """The frame of each case, None where too few of its crops agree; the same seed gives the same frames."""
    if not cases:
        return {}
    rng, mm = np.random.default_rng(seed), cell_mm(store, cases)
    scans = {i: coarse_scan(store, i, mm) for i in cases}
    invert = len({store.cases[i].modality for i in cases}) > 1
    network = _trained(list(scans.values()), steps, invert, rng, progress)
    placed = {i: _voted(network, scan, rng) for i, scan in scans.items()}
    return of_typical_size(placed)


class PlaceNet(nn.Sequential):
    """Crops (b, 1, CROP, CROP, CROP) of brightness 0..1 -> places (b, 3), in units of UNIT cells."""

    def __init__(self, width: int = 16):
        widths = [1, width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], (2, 2, 2, 1), strict=True):
            layers += [nn.Conv3d(before, after, 3, stride, 1), nn.GroupNorm(4, after), nn.GELU()]
        side = CROP // 8
        super().__init__(*layers, nn.Flatten(), nn.Linear(4 * width * side**3, 128), nn.GELU(), nn.Linear(128, 3))


def relative_position_loss(
    places: Float[Tensor, "scan crop 3"], centres: Float[Tensor, "scan crop 3"]
) -> Float[Tensor, ""]:
    """Huber's loss (quadratic below 0.1) of  f(a) - f(b) - (c(a) - c(b)),  mean over the pairs of each scan."""
    off = places - centres
    apart = off[:, :, None] - off[:, None]
    return F.smooth_l1_loss(apart, torch.zeros_like(apart), beta=0.1)


def _trained(
    scans: Sequence[CoarseScan], steps: int, invert: bool, rng: np.random.Generator, progress: Progress
) -> PlaceNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        network = PlaceNet()
    unit_mm = UNIT * scans[0].cell_mm
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    for step in range(steps):
        drawn = [scans[n] for n in rng.choice(len(scans), SCANS, replace=len(scans) < SCANS)]
        crops, in_view = zip(*(_crops(scan, CROPS, rng) for scan in drawn), strict=True)
        images = np.concatenate([_coloured(of_scan, invert, rng) for of_scan in crops])
        in_view = [centres - scan.centre_mm for centres, scan in zip(in_view, drawn, strict=True)]
        centres = torch.from_numpy(np.stack(in_view) / unit_mm).float()
        places = network(torch.from_numpy(images)).view(SCANS, CROPS, 3)
        loss = relative_position_loss(places, centres) + PULL * (places - centres).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress(step + 1, steps, "learned frame")
    return network.eval()


def _crops(scan: CoarseScan, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random crops (count, 1, CROP, CROP, CROP) and their centres (count, 3) in mm; unseen cells are black.

    Along an axis on which the scan is smaller than a crop it lies in the crop's middle.
    """
    missing = [max(0, CROP - side) for side in scan.values.shape]
    values = np.pad(np.maximum(scan.values, 0), [(m // 2, m - m // 2) for m in missing])
    starts = np.stack([rng.integers(0, side - CROP + 1, count) for side in values.shape], axis=1)
    crops = np.stack([values[i : i + CROP, j : j + CROP, k : k + CROP] for i, j, k in starts])
    index = starts - np.array(missing) // 2 + (CROP - 1) / 2
    return crops[:, None], apply_affine(scan.affine, index)


def _coloured(crops: np.ndarray, invert: bool, rng: np.random.Generator) -> np.ndarray:
    """Crops of one scan, each with its own gamma, perhaps all inverted."""
    gamma = np.exp(rng.uniform(-0.5, 0.5, (len(crops), 1, 1, 1, 1))).astype(np.float32)
    crops = np.clip(crops, 0, 1) ** gamma
    return 1 - crops if invert and rng.random() < 0.5 else crops


def _voted(network: PlaceNet, scan: CoarseScan, rng: np.random.Generator) -> tuple[np.ndarray, float] | None:
    """(to_frame, share of the votes that agree); None below LEAST_AGREEMENT."""
    crops, centres = _crops(scan, VOTES, rng)
    with torch.inference_mode():
        places = network(torch.from_numpy(crops)).double().numpy() * UNIT * scan.cell_mm
    scale, shift = robust_line(centres, places, SLACK_CELLS * scan.cell_mm)
    off = np.linalg.norm(places - (scale * centres + shift), axis=1)
    agreement = float((off < NEAR * scan.cell_mm).mean())
    return (stretch(scale, shift), agreement) if agreement >= LEAST_AGREEMENT else None


def robust_line(x: np.ndarray, y: np.ndarray, slack: float) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) of  y = scale * x + shift  along each column of (n, 3), whatever a minority of the rows says.

    Reweighted least squares with Cauchy's weights at twice the robust standard deviation; the scale is drawn to 1 as
    if the points had slack more spread, and bounded.
    """
    weight = np.ones_like(y)
    for _ in range(30):
        total = weight.sum(axis=0)
        mean_x, mean_y = (weight * x).sum(axis=0) / total, (weight * y).sum(axis=0) / total
        prior = total * slack**2
        covariance, variance = ((weight * (x - mean_x) * other).sum(axis=0) for other in (y - mean_y, x - mean_x))
        scale = np.clip((covariance + prior) / (variance + prior), 1 / MOST_STRETCH, MOST_STRETCH)
        shift = mean_y - scale * mean_x
        off = y - (scale * x + shift)
        spread = 1.4826 * np.median(np.abs(off), axis=0) + 1e-9
        weight = 1 / (1 + (off / (2 * spread)) ** 2)
    return scale, shift
