"""numba and nothing else: a volume of regions, averaged over each cell of a crop.

Of 8 regions in 6^3 cells of 64 samples: 1.0 ms on one core, region by region with scipy's map_coordinates 11.4 ms.
"""

import numpy as np

from spade3d.kernel_cache import compiled

_F, _U = np.float32, np.uintp


@compiled(nogil=True, error_model="numpy")
def pool(values, to_volume, at_i, at_j, at_k, out):
    """out[p, q, r] = the sum of `values` over the samples of a cell: trilinear, 0 beyond the volume's faces.

    values     uint8 (i, j, k, region), C order: the regions of a voxel follow each other, so that where a sample lies
               is found once for all of them, and they become vector instructions
    to_volume  (4, 4) float64: voxels of the crop -> voxels of `values`
    at_i ...   float64 (cell, sample): where the samples of each cell lie along an axis of the crop, in its voxels
    out        float32 (p, q, r, region)
    """
    ni, nj, nk, regions = values.shape
    flat = values.reshape(-1)
    step_i, step_j, step_k = nj * nk * regions, nk * regions, regions
    # The lower corner is at most the last but one voxel; along an axis of one voxel its corners coincide.
    last_i, last_j, last_k = max(ni - 2, 0), max(nj - 2, 0), max(nk - 2, 0)
    up_i, up_j, up_k = _U(step_i if ni > 1 else 0), _U(step_j if nj > 1 else 0), _U(step_k if nk > 1 else 0)
    a00, a01, a02, a03 = to_volume[0, 0], to_volume[0, 1], to_volume[0, 2], to_volume[0, 3]
    a10, a11, a12, a13 = to_volume[1, 0], to_volume[1, 1], to_volume[1, 2], to_volume[1, 3]
    a20, a21, a22, a23 = to_volume[2, 0], to_volume[2, 1], to_volume[2, 2], to_volume[2, 3]
    total = np.empty(regions, np.float32)
    for cell in range(at_i.shape[0] * at_j.shape[0] * at_k.shape[0]):
        p, q, r = cell // (at_k.shape[0] * at_j.shape[0]), cell // at_k.shape[0] % at_j.shape[0], cell % at_k.shape[0]
        total[:] = 0
        for sample in range(at_i.shape[1] * at_j.shape[1] * at_k.shape[1]):
            i = at_i[p, sample // (at_k.shape[1] * at_j.shape[1])]
            j, k = at_j[q, sample // at_k.shape[1] % at_j.shape[1]], at_k[r, sample % at_k.shape[1]]
            x = a00 * i + a01 * j + a02 * k + a03
            y = a10 * i + a11 * j + a12 * k + a13
            z = a20 * i + a21 * j + a22 * k + a23
            inside = (x >= -0.5) & (x <= ni - 0.5) & (y >= -0.5) & (y <= nj - 0.5) & (z >= -0.5) & (z <= nk - 0.5)
            if not inside:
                continue
            x, y, z = min(max(x, 0.0), ni - 1.0), min(max(y, 0.0), nj - 1.0), min(max(z, 0.0), nk - 1.0)
            i0, j0, k0 = min(int(x), last_i), min(int(y), last_j), min(int(z), last_k)
            u, v, w = _F(x - i0), _F(y - j0), _F(z - k0)
            c00, c01, c10, c11 = (_F(1) - u) * (_F(1) - v), (_F(1) - u) * v, u * (_F(1) - v), u * v
            # Unsigned, because Python's negative indices would be asked for.
            b00 = _U(i0 * step_i + j0 * step_j + k0 * step_k)
            b01, b10 = b00 + up_j, b00 + up_i
            b11 = b10 + up_j
            for region in range(regions):
                n = _U(region)
                low = c00 * _F(flat[b00 + n]) + c01 * _F(flat[b01 + n])
                low += c10 * _F(flat[b10 + n]) + c11 * _F(flat[b11 + n])
                n += up_k
                high = c00 * _F(flat[b00 + n]) + c01 * _F(flat[b01 + n])
                high += c10 * _F(flat[b10 + n]) + c11 * _F(flat[b11 + n])
                total[region] += low + w * (high - low)
        out[p, q, r] = total
