"""numba and nothing else: cut and colour in one pass, match feature grids, select who is near and who is far.

Each kernel has a slow twin in the tests. Arrays are (i, j, k) with k the fastest axis; affines are 4 x 4 float64.
Kernels compile once and are cached.
"""

import math

import numpy as np

from spade3d.kernel_cache import compiled


@compiled(inline="always")
def _mix(x):
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = np.uint64(x)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled(inline="always")
def _normal(seed, index):
    """Nearly Gaussian noise of a voxel, from its index alone: any order and any number of threads give the same.

    The sum of the four 16-bit words of one hash (Irwin-Hall, n = 4), scaled to variance 1: tails end at 3.46 sd.
    """
    bits = _mix(np.uint64(seed) + np.uint64(index + 1) * np.uint64(0x9E3779B97F4A7C15))
    word = np.uint64(0xFFFF)
    total = (
        np.float32(bits & word)
        + np.float32((bits >> np.uint64(16)) & word)
        + np.float32((bits >> np.uint64(32)) & word)
        + np.float32(bits >> np.uint64(48))
    )
    return (total - np.float32(131070.0)) * np.float32(2.6428996e-05)  # sqrt(12 / 4) / 65536


@compiled(inline="always")
def _coloured(x, gamma, contrast, brightness, noise, seed, index, low, high):
    """contrast * x^gamma + brightness + noise, clipped; gamma acts on x as a share of [low, high]."""
    if gamma != np.float32(1.0):
        span = high - low
        x = low + span * ((x - low) / span) ** gamma
    x = x * contrast + brightness
    if noise > np.float32(0.0):
        x += noise * _normal(seed, index)
    return min(max(x, low), high)


@compiled(nogil=True)
def resample(stored, to_stored, scaling, colours, seed, out):
    """Cut `out` (float32) from `stored` (int16) by trilinear interpolation, normalise and colour it, in one pass.

    `to_stored` takes voxels of `out` to voxels of `stored`. Inside means up to half a voxel beyond the outermost
    voxel centres (the scan's faces); beyond that lies `low`. `scaling` = offset, scale, low, high;
    `colours` = gamma, contrast, brightness, noise.
    """
    ni, nj, nk = stored.shape
    offset, scale, low, high = scaling[0], scaling[1], scaling[2], scaling[3]
    gamma, contrast, brightness, noise = colours[0], colours[1], colours[2], colours[3]
    mi, mj, mk = out.shape
    di, dj, dk = to_stored[0, 2], to_stored[1, 2], to_stored[2, 2]
    for i in range(mi):
        for j in range(mj):
            pi = to_stored[0, 0] * i + to_stored[0, 1] * j + to_stored[0, 3]
            pj = to_stored[1, 0] * i + to_stored[1, 1] * j + to_stored[1, 3]
            pk = to_stored[2, 0] * i + to_stored[2, 1] * j + to_stored[2, 3]
            for k in range(mk):
                x, y, z = pi + di * k, pj + dj * k, pk + dk * k
                value = low
                if -0.5 <= x <= ni - 0.5 and -0.5 <= y <= nj - 0.5 and -0.5 <= z <= nk - 0.5:
                    x, y, z = min(max(x, 0.0), ni - 1.0), min(max(y, 0.0), nj - 1.0), min(max(z, 0.0), nk - 1.0)
                    i0, j0, k0 = int(x), int(y), int(z)
                    i1, j1, k1 = min(i0 + 1, ni - 1), min(j0 + 1, nj - 1), min(k0 + 1, nk - 1)
                    u, v, w = np.float32(x - i0), np.float32(y - j0), np.float32(z - k0)
                    a00 = stored[i0, j0, k0] + w * (np.float32(stored[i0, j0, k1]) - stored[i0, j0, k0])
                    a01 = stored[i0, j1, k0] + w * (np.float32(stored[i0, j1, k1]) - stored[i0, j1, k0])
                    a10 = stored[i1, j0, k0] + w * (np.float32(stored[i1, j0, k1]) - stored[i1, j0, k0])
                    a11 = stored[i1, j1, k0] + w * (np.float32(stored[i1, j1, k1]) - stored[i1, j1, k0])
                    a0 = a00 + v * (a01 - a00)
                    a1 = a10 + v * (a11 - a10)
                    value = min(max((a0 + u * (a1 - a0) - offset) * scale, low), high)
                index = (i * mj + j) * mk + k
                out[i, j, k] = _coloured(value, gamma, contrast, brightness, noise, seed, index, low, high)


@compiled(nogil=True)
def resample_labels(stored, to_stored, out):
    """Cut labels by nearest neighbour; 0 outside the scan."""
    ni, nj, nk = stored.shape
    mi, mj, mk = out.shape
    for i in range(mi):
        for j in range(mj):
            for k in range(mk):
                x = to_stored[0, 0] * i + to_stored[0, 1] * j + to_stored[0, 2] * k + to_stored[0, 3]
                y = to_stored[1, 0] * i + to_stored[1, 1] * j + to_stored[1, 2] * k + to_stored[1, 3]
                z = to_stored[2, 0] * i + to_stored[2, 1] * j + to_stored[2, 2] * k + to_stored[2, 3]
                p, q, r = math.floor(x + 0.5), math.floor(y + 0.5), math.floor(z + 0.5)
                inside = 0 <= p < ni and 0 <= q < nj and 0 <= r < nk
                out[i, j, k] = stored[p, q, r] if inside else 0


@compiled(nogil=True)
def recolour(out, colours, seed, low, high):
    """The intensity change alone, in place: for views that were blurred first."""
    flat = out.reshape(-1)
    gamma, contrast, brightness, noise = colours[0], colours[1], colours[2], colours[3]
    low, high = np.float32(low), np.float32(high)
    for index in range(flat.size):
        flat[index] = _coloured(flat[index], gamma, contrast, brightness, noise, seed, index, low, high)


@compiled(nogil=True)
def blur(out, sigma):
    """A Gaussian of `sigma` voxels, separable, truncated at 3 sigma, edges repeated; in place."""
    radius = int(math.ceil(3.0 * sigma))
    weights = np.empty(2 * radius + 1, dtype=np.float32)
    for t in range(-radius, radius + 1):
        weights[t + radius] = math.exp(-0.5 * (t / sigma) ** 2)
    weights /= weights.sum()
    ni, nj, nk = out.shape
    source = np.empty_like(out)
    source[:] = out
    for i in range(ni):
        out[i] = 0
        for t in range(-radius, radius + 1):
            plane, weight = source[min(max(i + t, 0), ni - 1)], weights[t + radius]
            for j in range(nj):
                for k in range(nk):
                    out[i, j, k] += weight * plane[j, k]
    plane = np.empty((nj, nk), dtype=np.float32)
    row = np.empty(nk + 2 * radius, dtype=np.float32)
    for i in range(ni):
        plane[:] = 0
        for j in range(nj):
            for t in range(-radius, radius + 1):
                other, weight = min(max(j + t, 0), nj - 1), weights[t + radius]
                for k in range(nk):
                    plane[j, k] += weight * out[i, other, k]
        for j in range(nj):
            row[radius : radius + nk] = plane[j]
            row[:radius] = plane[j, 0]
            row[radius + nk :] = plane[j, nk - 1]
            for k in range(nk):
                total = np.float32(0.0)
                for t in range(2 * radius + 1):
                    total += weights[t] * row[k + t]
                out[i, j, k] = total


@compiled(nogil=True)
def match_cells(a_to_b, b_to_mm, a_to_b_mm, grid_a, grid_b, cell, distance_mm):
    """For each cell of grid a: the nearest cell of grid b (flat index, -1 outside) and how far apart they lie.

    `a_to_b` takes cells of a to (fractional) cells of b, `b_to_mm` and `a_to_b_mm` cells of b and of a to one and the
    same millimetres. One affine product and a rounding a cell: O(cells of a).
    """
    gi, gj, gk = grid_a
    hi, hj, hk = grid_b
    for i in range(gi):
        for j in range(gj):
            for k in range(gk):
                n = (i * gj + j) * gk + k
                x = a_to_b[0, 0] * i + a_to_b[0, 1] * j + a_to_b[0, 2] * k + a_to_b[0, 3]
                y = a_to_b[1, 0] * i + a_to_b[1, 1] * j + a_to_b[1, 2] * k + a_to_b[1, 3]
                z = a_to_b[2, 0] * i + a_to_b[2, 1] * j + a_to_b[2, 2] * k + a_to_b[2, 3]
                p, q, r = math.floor(x + 0.5), math.floor(y + 0.5), math.floor(z + 0.5)
                if 0 <= p < hi and 0 <= q < hj and 0 <= r < hk:
                    squares = 0.0
                    for axis in range(3):
                        here = a_to_b_mm[axis, 0] * i + a_to_b_mm[axis, 1] * j + a_to_b_mm[axis, 2] * k
                        there = b_to_mm[axis, 0] * p + b_to_mm[axis, 1] * q + b_to_mm[axis, 2] * r
                        squares += (here + a_to_b_mm[axis, 3] - there - b_to_mm[axis, 3]) ** 2
                    cell[n] = (p * hj + q) * hk + r
                    distance_mm[n] = math.sqrt(squares)
                else:
                    cell[n] = -1
                    distance_mm[n] = np.inf


@compiled(nogil=True)
def boxes_alike(queries, query_space, keys, key_space, iou, out):
    """out[q, k] = the boxes (n, 6: lowest, highest corner) lie in one space and overlap by at least `iou`."""
    for q in range(len(queries)):
        a = queries[q]
        volume_a = (a[3] - a[0]) * (a[4] - a[1]) * (a[5] - a[2])
        for k in range(len(keys)):
            b = keys[k]
            shared = 1.0
            for axis in range(3):
                side = min(a[axis + 3], b[axis + 3]) - max(a[axis], b[axis])
                shared *= side if side > 0.0 else 0.0
            volume_b = (b[3] - b[0]) * (b[4] - b[1]) * (b[5] - b[2])
            enough = shared > 0.0 and shared >= iou * (volume_a + volume_b - shared)
            out[q, k] = enough and query_space[q] == key_space[k]


@compiled(nogil=True)
def places_apart(queries, query_space, keys, key_space, far_mm, out):
    """out[q, k] = the places (n, 3) lie in one space and more than `far_mm` apart."""
    limit = far_mm * far_mm
    for q in range(len(queries)):
        x, y, z, space = queries[q, 0], queries[q, 1], queries[q, 2], query_space[q]
        for k in range(len(keys)):
            dx, dy, dz = keys[k, 0] - x, keys[k, 1] - y, keys[k, 2] - z
            out[q, k] = space == key_space[k] and dx * dx + dy * dy + dz * dz > limit
