"""Slices of a volume as pictures: resampled to their true proportions, outlined, written as PNG inside the page.

Arrays are (i, j, k) = (R, A, S). Pictures follow the radiological convention: the patient's right is at the left,
anterior or superior at the top; a sagittal slice looks to the left.
"""

import base64
import colorsys
import struct
import zlib
from collections.abc import Mapping

import numpy as np

from spade3d.training.page import Html, tag

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis that a plane is perpendicular to
PIXELS = 360  # of the longer side: sharp at the size the page shows it, also on dense screens


def colour(label: int) -> tuple[int, int, int]:
    """Of a class, as red, green, blue: hues a golden angle apart, so that any number of classes differ, all bright
    enough to be seen on grey."""
    turn = (label - 1) * 0.381966
    rgb = colorsys.hls_to_rgb((0.49 + turn) % 1.0, 0.60 if label % 2 else 0.68, 0.85)
    return tuple(round(255 * c) for c in rgb)


def css(rgb: tuple[int, int, int]) -> str:
    """A colour as style sheets write it."""
    return "#" + "".join(f"{c:02x}" for c in rgb)


def slice_of(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Slice `index` across `axis` as picture rows and columns (row, column): left is R or A, top is A or S."""
    return np.take(array, index, axis=axis).T[::-1, ::-1]


def fullest(labels: np.ndarray, axis: int) -> int:
    """The slice across `axis` that holds most labelled voxels; the middle one where nothing is labelled."""
    area = (labels > 0).sum(axis=tuple(a for a in range(3) if a != axis))
    return int(area.argmax()) if area.any() else labels.shape[axis] // 2


def display_shape(shape: tuple[int, int], spacing: tuple[float, float], pixels: int = PIXELS) -> tuple[int, int]:
    """(rows, columns) of a picture in which a millimetre is as long down as across."""
    extent = np.array(shape) * np.array(spacing)
    return tuple(int(n) for n in np.maximum(np.rint(extent / extent.max() * pixels), 1))


def enlarge(picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A picture (row, column) at another size: linear between voxel centres, averaged where it shrinks."""
    rows, columns = (_weights(n, m) for n, m in zip(picture.shape, shape))
    return rows @ picture.astype(np.float64) @ columns.T


def _weights(size: int, displayed: int) -> np.ndarray:
    """(displayed, size) weights of the voxels in each pixel: a triangle one voxel, or one pixel, wide."""
    centre = (np.arange(displayed) + 0.5) * size / displayed - 0.5
    near = 1 - np.abs(np.clip(centre, 0, size - 1)[:, None] - np.arange(size)) / max(1.0, size / displayed)
    near = np.clip(near, 0, None)
    return near / near.sum(axis=1, keepdims=True)


def enlarge_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Labels (row, column) at another size: each pixel takes the voxel it lies in, so edges are voxel edges."""
    rows, columns = (((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(labels.shape, shape))
    return labels[np.ix_(rows, columns)]


def outline(labels: np.ndarray, width: int = 2) -> np.ndarray:
    """True on the labelled pixels within `width` of another label: the inner edge of every structure."""
    padded = np.pad(labels, width, mode="edge")
    rows, columns = labels.shape
    edge = np.zeros(labels.shape, bool)
    for step in range(1, width + 1):
        for down, right in ((step, 0), (-step, 0), (0, step), (0, -step)):
            edge |= padded[width + down : width + down + rows, width + right : width + right + columns] != labels
    return edge & (labels > 0)


def overlaid(grey: np.ndarray, labels: np.ndarray | None, tint: float = 0.22) -> np.ndarray:
    """Grey (row, column) in 0..1 with its labels tinted and outlined -> uint8 (row, column, 3)."""
    rgb = np.repeat(np.clip(grey, 0, 1)[..., None] * 255, 3, axis=2)
    if labels is not None:
        edge = outline(labels)
        for label in np.unique(labels[labels > 0]):
            inside, paint = labels == label, np.array(colour(int(label)))
            rgb[inside] = (1 - tint) * rgb[inside] + tint * paint
            rgb[inside & edge] = paint
    return np.rint(rgb).astype(np.uint8)


def png(rgb: np.ndarray) -> bytes:
    """A uint8 picture (row, column, 3) as a PNG file. Rows are stored as the difference to the row above, which for
    scans halves the size."""
    height, width, _ = rgb.shape
    rows = rgb.reshape(height, width * 3)
    rows = np.concatenate([rows[:1], rows[1:] - rows[:-1]])  # uint8 wraps, as filter type 2 ("up") asks
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), rows], axis=1)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, colour type 2 = RGB
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filtered.tobytes())) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def data_url(rgb: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(rgb)).decode("ascii")


def picture(rgb: np.ndarray, alt: str, caption: str = "") -> Html:
    """A picture with its caption, for a grid of class `slices`."""
    height, width, _ = rgb.shape
    image = tag("img", src=data_url(rgb), alt=alt, width=width, height=height)
    return tag("figure", image, tag("figcaption", caption) if caption else None)


def marked_picture(rgb: np.ndarray, points: Mapping[str, tuple[float, float, float]], alt: str, caption: str) -> Html:
    """A picture with named points (row, column, opacity) in pixels; pixel centres are at integers."""
    height, width, _ = rgb.shape
    size = max(height, width) / 22
    marks = [
        tag(
            "g",
            tag(
                "circle", cx=f"{x + 0.5:.1f}", cy=f"{y + 0.5:.1f}", r=f"{size / 3:.1f}", style=f"fill:{css(colour(n))}"
            ),
            tag(
                "text",
                name,
                x=f"{x + size / 2:.1f}",
                y=f"{y - size / 4:.1f}",
                class_="match",
                style=f"font-size:{size:.0f}px",
            ),
            opacity=f"{opacity:.2f}",
        )
        for n, (name, (y, x, opacity)) in enumerate(points.items(), start=1)
    ]
    image = tag("image", href=data_url(rgb), width=width, height=height)
    svg = tag("svg", image, *marks, viewBox=f"0 0 {width} {height}", role="img", aria_label=alt)
    return tag("figure", svg, tag("figcaption", caption))


def grid(pictures: list[Html], across: int) -> Html:
    """Pictures in rows of `across`."""
    return tag("div", *pictures, class_="slices", style=f"--across:{across}")
