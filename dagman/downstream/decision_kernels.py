"""numba and nothing else: logits interpolated at the voxels of another grid, and the highest of them."""

import numpy as np

from spade3d.kernel_cache import compiled

_F, _U = np.float32, np.uintp


@compiled(nogil=True, error_model="numpy")
def decide(flat, start, strides, low_i, share_i, low_j, share_j, low_k, share_k, last, out):
    """out[a, b, n] = the class of the highest logit there, the first of equals; returns whether all were finite.

    flat            float32: the memory that the logits (class, i, j, k) lie in, from `start` on; k runs fastest
    strides         (4,) int64: from one class, i, j to the next, in numbers; and how many classes there are
    low_i, share_i  along i, voxel a of `out` lies share_i[a] of the way from plane low_i[a] to the next; so j, k
    last            (3,) int64: the last plane along i, j, k
    out             uint8 (a, b, n)
    """
    classes, wide = strides[3], last[2] + 1
    row, value = np.empty(wide, np.float32), np.empty(low_k.shape[0], np.float32)
    best, spoilt = np.empty(low_k.shape[0], np.float32), np.zeros(low_k.shape[0], np.float32)
    winner = np.empty(low_k.shape[0], np.int32)
    straight = share_k.max() == 0 and low_k[-1] - low_k[0] == low_k.shape[0] - 1 and low_k.shape[0] <= wide
    for a in range(low_i.shape[0]):
        i0, u = low_i[a], share_i[a]
        up_i = strides[1] if i0 < last[0] else 0
        for b in range(low_j.shape[0]):
            j0, v = low_j[b], share_j[b]
            up_j = strides[2] if j0 < last[1] else 0
            c00, c01, c10, c11 = (_F(1) - u) * (_F(1) - v), (_F(1) - u) * v, u * (_F(1) - v), u * v
            for c in range(classes):
                # Unsigned, because Python's negative indices would be asked for.
                b00 = _U(start + c * strides[0] + i0 * strides[1] + j0 * strides[2])
                b01, b10 = b00 + _U(up_j), b00 + _U(up_i)
                b11 = b10 + _U(up_j)
                if u == 0 and v == 0:
                    for n in range(wide):
                        row[n] = flat[b00 + _U(n)]
                else:
                    for n in range(wide):
                        k = _U(n)
                        near = c00 * flat[b00 + k] + c01 * flat[b01 + k]
                        row[n] = near + c10 * flat[b10 + k] + c11 * flat[b11 + k]
                if straight:
                    for n in range(low_k.shape[0]):
                        value[n] = row[_U(low_k[0] + n)]
                else:
                    for n in range(low_k.shape[0]):
                        k = low_k[n]
                        at = row[_U(k)]
                        value[n] = at + share_k[n] * (row[_U(min(k + 1, last[2]))] - at)
                for n in range(low_k.shape[0]):
                    better = (c == 0) | (value[n] > best[n])
                    best[n] = value[n] if better else best[n]
                    winner[n] = c if better else winner[n]
                    spoilt[n] += value[n] * _F(0)  # NaN once there was NaN or Inf
            for n in range(low_k.shape[0]):
                out[a, b, n] = winner[n]
    return not np.isnan(spoilt).any()
