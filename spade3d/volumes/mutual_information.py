"""Normalised mutual information of two overlapping scans: numba and nothing else (slow twin in the tests).

Studholme, Hill and Hawkes (1999):  (H(a) + H(b)) / H(a, b)  over the voxels that both see. It asks only that equal
brightness means equal tissue within each scan, so it compares CT with MR, and it does not reward a small overlap the
way mutual information does.
"""

import numpy as np

from spade3d.kernel_cache import compiled


@compiled(error_model="numpy")
def normalised_mutual_information(moving, fixed, scale, shift, joint):
    """(NMI - 1, number of voxels compared); 0 where nothing is compared or nothing varies.

    moving, fixed  float32 (i, j, k): bin numbers, 0 to len(joint) - 1, interpolated between; negative is not seen
    scale, shift   (3,): moving index -> fixed index along each axis
    joint          float64 (bins, bins): workspace, the joint histogram on return
    """
    joint[:] = 0
    last_a, last_b, last_c = fixed.shape[0] - 1, fixed.shape[1] - 1, fixed.shape[2] - 1
    count = 0
    for i in range(moving.shape[0]):
        x = scale[0] * i + shift[0]
        if not 0 <= x <= last_a:
            continue
        a = min(int(x), last_a - 1)
        u = np.float32(x - a)
        for j in range(moving.shape[1]):
            y = scale[1] * j + shift[1]
            if not 0 <= y <= last_b:
                continue
            b = min(int(y), last_b - 1)
            v = np.float32(y - b)
            for k in range(moving.shape[2]):
                z = scale[2] * k + shift[2]
                if not 0 <= z <= last_c or moving[i, j, k] < 0:
                    continue
                c = min(int(z), last_c - 1)
                w = np.float32(z - c)
                p, q, r, s = fixed[a, b, c], fixed[a, b, c + 1], fixed[a, b + 1, c], fixed[a, b + 1, c + 1]
                e, f, g, h = (
                    fixed[a + 1, b, c],
                    fixed[a + 1, b, c + 1],
                    fixed[a + 1, b + 1, c],
                    fixed[a + 1, b + 1, c + 1],
                )
                if min(p, q, r, s, e, f, g, h) < 0:
                    continue
                near = (p + (q - p) * w) + ((r + (s - r) * w) - (p + (q - p) * w)) * v
                far = (e + (f - e) * w) + ((g + (h - g) * w) - (e + (f - e) * w)) * v
                value = near + (far - near) * u
                joint[int(moving[i, j, k] + np.float32(0.5)), int(value + np.float32(0.5))] += 1
                count += 1
    of_moving = of_fixed = of_both = 0.0  # sums of n log n
    for m in range(joint.shape[0]):
        row = column = 0.0
        for n in range(joint.shape[1]):
            row += joint[m, n]
            column += joint[n, m]
            if joint[m, n] > 0:
                of_both += joint[m, n] * np.log(joint[m, n])
        if row > 0:
            of_moving += row * np.log(row)
        if column > 0:
            of_fixed += column * np.log(column)
    whole = count * np.log(count) if count else 0.0
    entropy = whole - of_both
    if entropy < 1e-9 * max(whole, 1.0):
        return 0.0, count
    return (2 * whole - of_moving - of_fixed) / entropy - 1, count
