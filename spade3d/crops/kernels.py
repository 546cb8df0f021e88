"""numba and nothing else: cut and colour in one pass, match feature grids, select who is near and who is far.

Each kernel has a slow twin in the tests. Arrays are (i, j, k) with k the fastest axis; affines are 4 x 4 float64.
Kernels compile once and are cached. Work on voxels goes row by row in stages, each a loop without branches, so that
each becomes vector instructions; `error_model="numpy"` takes out the test for division by zero, which would prevent it.
`fastmath={"contract"}` lets a product and its sum be one instruction and nothing else: no sum is reordered.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from spade3d.kernel_cache import compiled

_F, _I = np.float32, np.int32


@compiled(inline="always", error_model="numpy")
def _power(x, exponent):
    """x^exponent for float32 x in [0, 1], to 3e-7: 2^(exponent log2 x) by two polynomials (powf would be scalar code).

    x = 2^e (1 + t) with 1 + t around 1. Zero counts as 2^-127. The polynomials are Chebyshev fits, log2(1 + t) / t to
    9e-8 and 2^z to 8e-8; a shorter series of (m - 1) / (m + 1) would wait for its division (1.1 times as long). Every
    step is brought back to 32 bits, for numba widens integers and vectors would hold half as many (0.4 of the time).
    """
    bits = _F(x).view(np.int32)
    e = _I(_I(bits - _I(0x3F3504F3)) >> _I(23))  # the bits of sqrt(1/2): 1 + t lies in [sqrt(1/2), sqrt(2))
    t = _I(bits - _I(e << _I(23))).view(np.float32) - _F(1)
    slope = _F(0.287075612) + t * (_F(-0.248821806) + t * (_F(0.234209851) + t * _F(-0.146203534)))
    slope = _F(1.442694958) + t * (_F(-0.721352759) + t * (_F(0.480924039) + t * (_F(-0.360241986) + t * slope)))
    y = max(exponent * (_F(e) + t * slope), _F(-126))
    n = np.floor(y + _F(0.5))
    z = y - n
    rest = _F(0.0555032721) + z * (_F(0.0096760371) + z * _F(0.00134004322))
    power = _F(1.0000000755) + z * (_F(0.693147207) + z * (_F(0.240221074) + z * rest))
    return power * _I(_I(_I(n) + _I(127)) << _I(23)).view(np.float32)


@compiled(inline="always")
def _mix(x):
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = np.uint64(x)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled(inline="always")
def _sums(seed, pair):
    """For the noise of voxels 2 `pair` and 2 `pair` + 1: the sum of four random bytes of each, the first in the lower
    half of 64 bits. From the index alone, so that any order and any number of threads give the same."""
    bits = _mix(np.uint64(seed) + np.uint64(pair + 1) * np.uint64(0x9E3779B97F4A7C15))
    every_second, every_fourth = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF)
    two = (bits & every_second) + ((bits >> np.uint64(8)) & every_second)
    return (two & every_fourth) + ((two >> np.uint64(16)) & every_fourth)


_MEAN, _UNIT = 510.0, 0.0067658759  # of a sum of four bytes: 4 x 255 / 2, and 1 / sqrt(4 (256^2 - 1) / 12)

# Voxels that go through one stage before any goes through the next: what lies between stays in the cache.
_RUN, _COLOURED = 256, 1024


@compiled(nogil=True, error_model="numpy", fastmath={"contract"})
def recolour(flat, colours, seed, begin, low, high):
    """The intensity change alone, of voxels in flat order, in place; `begin` is the index of the first one.

    contrast * x^gamma + brightness + noise, clipped to [low, high]; gamma acts on x as a share of [low, high]. The
    noise is nearly Gaussian: sums of four bytes (Irwin-Hall, n = 4) scaled to variance 1, whose tails end at 3.45 sd.
    """
    _recolour(flat, colours, seed, begin, low, high, np.empty(_COLOURED // 2 + 1, np.uint64))


@compiled(nogil=True, error_model="numpy", fastmath={"contract"})
def _recolour(flat, colours, seed, begin, low, high, sums):
    """`recolour`, with room for the random numbers of a run."""
    gamma, contrast, brightness, noise = colours[0], colours[1], colours[2], colours[3]
    span, unit = high - low, noise * _F(_UNIT)
    per_span, base = _F(1) / span, brightness - unit * _F(_MEAN)
    for start in range(0, flat.size, _COLOURED):
        run = flat[start : start + _COLOURED]
        if gamma != _F(1):
            for k in range(run.size):
                share = min(max((run[k] - low) * per_span, _F(0)), _F(1))  # a blur may round beyond the range
                run[k] = low + span * _power(share, gamma) if run[k] == run[k] else run[k]  # NaN stays NaN
        if noise > _F(0):
            first = (begin + start) >> 1
            odd = (begin + start) & 1
            for pair in range((run.size + 1 + odd) >> 1):
                sums[pair] = _sums(seed, first + pair)
            drawn = sums.view(np.int32)[odd:]  # two voxels from one hash: 0.55 of the time of one each
            for k in range(run.size):
                run[k] = min(max(run[k] * contrast + (base + unit * _F(drawn[k])), low), high)
        else:
            for k in range(run.size):
                run[k] = min(max(run[k] * contrast + brightness, low), high)


@compiled(inline="always", error_model="numpy")
def _within(start, step, size, count):
    """The range of k in [0, count) for which start + step k lies between the faces -1/2 and size - 1/2 of an axis."""
    stop, low, high = start + step * (count - 1), -0.5, size - 0.5
    if low <= start <= high and low <= stop <= high:  # most rows: no need to divide
        return 0, count
    if step == 0.0:
        return 0, 0
    to_low, to_high = (-0.5 - start) / step, (size - 0.5 - start) / step
    first, last = np.ceil(min(to_low, to_high)), np.floor(max(to_low, to_high))
    return int(min(max(first, 0.0), float(count))), int(min(max(last + 1.0, 0.0), float(count)))


_FAR = 2.0**23  # voxels: float32 tells whole ones apart, and nobody's scan is so long


@compiled(nogil=True, error_model="numpy", fastmath={"contract"})
def resample(stored, box, to_stored, scaling, colours, seed, out):
    """Cut `out` (float32, C order) from a box of `stored` (int16, C order, below 2^31 voxels): trilinear, normalised,
    coloured.

    `box` = start, stop (2, 3); `to_stored` takes voxels of `out` to voxels of the box. Inside means up to half a voxel
    beyond its outermost voxel centres (the scan's faces), where the outermost value holds; beyond that lies `low`.
    `scaling` = offset, scale, low, high; `colours` = gamma, contrast, brightness, noise.
    """
    ni, nj, nk = box[1, 0] - box[0, 0], box[1, 1] - box[0, 1], box[1, 2] - box[0, 2]
    offset, scale, low, high = scaling[0], scaling[1], scaling[2], scaling[3]
    mi, mj, mk = out.shape
    flat = out.reshape(-1)
    if min(ni, nj, nk) <= 0:  # nothing is there to be read
        flat[:] = low
        recolour(flat, colours, seed, 0, low, high)
        return
    stride_i, stride_j = _I(stored.shape[1] * stored.shape[2]), _I(stored.shape[2])
    voxels = stored.reshape(-1)[box[0, 0] * stride_i + box[0, 1] * stride_j + box[0, 2] :]
    # The lower corner of a cell is at most the last but one voxel; along an axis of one voxel its corners coincide.
    last_i, last_j, last_k = _I(max(ni - 2, 0)), _I(max(nj - 2, 0)), _I(max(nk - 2, 0))
    up_i, up_j = np.uintp(stride_i if ni > 1 else 0), np.uintp(stride_j if nj > 1 else 0)
    if nk == 1:  # along k the next voxel is read even so, and has no share; the last one needs a next one, too
        voxels = np.append(voxels, voxels[-1:])
    # The other corners of a cell: the same index into what begins farther on.
    next_j, next_i, next_both = voxels[up_j:], voxels[up_i:], voxels[up_i + up_j :]
    # Some rows at a time, so that only the first stage pays for the beginning and the end of each.
    rows = max(1, _RUN // mk)
    corner, inside = np.zeros(rows * mk, np.int32), np.empty((rows, 2), np.int64)
    shares, pairs = np.zeros((3, rows * mk), np.float32), np.empty((4, rows * mk), np.int32)
    u, v, w = shares[0], shares[1], shares[2]
    p00, p01, p10, p11 = pairs[0], pairs[1], pairs[2], pairs[3]
    sums = np.empty(_COLOURED // 2 + 1, np.uint64)
    di, dj, dk = to_stored[0, 2], to_stored[1, 2], to_stored[2, 2]
    ei, ej, ek = _F(min(max(di, -_FAR), _FAR)), _F(min(max(dj, -_FAR), _FAR)), _F(min(max(dk, -_FAR), _FAR))
    ahead = _offset(to_stored[:3, 0], stride_i, stride_j)
    for i in range(mi):
        for top in range(0, mj, rows):
            count = min(rows, mj - top)
            for r in range(count):
                j = top + r
                pi = to_stored[0, 0] * i + to_stored[0, 1] * j + to_stored[0, 3]
                pj = to_stored[1, 0] * i + to_stored[1, 1] * j + to_stored[1, 3]
                pk = to_stored[2, 0] * i + to_stored[2, 1] * j + to_stored[2, 3]
                (ai, bi), (aj, bj), (ak, bk) = _within(pi, di, ni, mk), _within(pj, dj, nj, mk), _within(pk, dk, nk, mk)
                begin, end = max(ai, aj, ak), min(bi, bj, bk)
                if begin >= end or max(abs(pi), abs(pj), abs(pk)) > _FAR:
                    inside[r, 0], inside[r, 1] = mk, mk  # reads the places of an earlier row, or the first voxel
                    continue
                inside[r, 0], inside[r, 1] = begin, end
                # Where, counted from the voxel in which the row begins, so that float32 serves; clamped, so that what
                # is outside reads something, too: it is overwritten below.
                fi, fj, fk = np.floor(pi), np.floor(pj), np.floor(pk)
                ri, rj, rk = _F(pi - fi), _F(pj - fj), _F(pk - fk)
                li, lj, lk = _F(-fi), _F(-fj), _F(-fk)
                hi, hj, hk = _F(ni - 1 - fi), _F(nj - 1 - fj), _F(nk - 1 - fk)
                ti, tj, tk = _I(last_i - fi), _I(last_j - fj), _I(last_k - fk)
                first = _I(_I(fi) * stride_i + _I(fj) * stride_j + _I(fk))
                a, b = r * mk, r * mk + mk
                row_c, row_u, row_v, row_w = corner[a:b], u[a:b], v[a:b], w[a:b]
                for k in range(mk):
                    step = _F(_I(k))
                    x = min(max(ri + ei * step, li), hi)
                    y = min(max(rj + ej * step, lj), hj)
                    z = min(max(rk + ek * step, lk), hk)
                    i0, j0, k0 = min(_I(np.floor(x)), ti), min(_I(np.floor(y)), tj), min(_I(np.floor(z)), tk)
                    row_u[k], row_v[k], row_w[k] = x - _F(i0), y - _F(j0), z - _F(k0)
                    row_c[k] = _I(first + _I(i0 * stride_i)) + _I(_I(j0 * stride_j) + k0)
            # Lines of a turned crop lie where no processor expects them: those of the same places in the next plane
            # (its lowest and highest corners) are asked for while this one is cut: three quarters of the time.
            for k in range(0, count * mk, 4):
                _soon(voxels, corner[k] + ahead)
                _soon(next_both, corner[k] + ahead)
            # What: nothing but reads, because a loop that also reckons would not become vector instructions (the
            # kernel would take 1.5 times as long). Unsigned, because Python's negative indices would be asked for.
            for k in range(count * mk):
                c = np.uintp(corner[k])
                p00[k], p01[k] = _pair(voxels, c), _pair(next_j, c)
                p10[k], p11[k] = _pair(next_i, c), _pair(next_both, c)
            begin = (i * mj + top) * mk
            run = flat[begin : begin + count * mk]
            for k in range(count * mk):
                a00, a01 = _between(p00[k], w[k]), _between(p01[k], w[k])
                a10, a11 = _between(p10[k], w[k]), _between(p11[k], w[k])
                a0, a1 = a00 + v[k] * (a01 - a00), a10 + v[k] * (a11 - a10)
                run[k] = min(max((a0 + u[k] * (a1 - a0) - offset) * scale, low), high)
            for r in range(count):
                run[r * mk : r * mk + inside[r, 0]] = low
                run[r * mk + inside[r, 1] : r * mk + mk] = low
        begin, stop = i * mj * mk, (i + 1) * mj * mk
        _recolour(flat[begin:stop], colours, seed, begin, low, high, sums)


@compiled(inline="always")
def _offset(step, stride_i, stride_j):
    """How much farther on the voxel nearest to a step lies; a step too long for any scan leads anywhere."""
    i, j, k = min(max(step[0], -_FAR), _FAR), min(max(step[1], -_FAR), _FAR), min(max(step[2], -_FAR), _FAR)
    return np.intp(np.rint(i)) * stride_i + np.intp(np.rint(j)) * stride_j + np.intp(np.rint(k))


def _soon(array, index):
    """Ask for `array[index]` to be in the cache soon, wherever that lies (LLVM's prefetch: it cannot fault). Plain
    Python, which a debugger runs, asks for nothing."""


@intrinsic
def _prefetch(typing, array, index):
    def generate(context, builder, signature, values):
        pointer = builder.gep(cgutils.create_struct_proxy(array)(context, builder, values[0]).data, [values[1]])
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )
        builder.call(prefetch, [builder.bitcast(pointer, byte), word(0), word(3), word(1)])  # to read, data, all levels
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@overload(_soon, inline="always")
def _asked_for(array, index):
    return lambda array, index: _prefetch(array, index)


@compiled(inline="always")
def _pair(voxels, index):
    """Two int16 voxels that follow each other in one int32, the first in its lower half: a single read."""
    return _I(voxels[index + np.uintp(1)]) << _I(16) | (_I(voxels[index]) & _I(0xFFFF))


@compiled(inline="always")
def _between(pair, share):
    """The value at a share of the way from the first voxel of a pair to the second."""
    first, second = _F(_I(pair << _I(16)) >> _I(16)), _F(pair >> _I(16))
    return first + share * (second - first)


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
                p, q, r = np.floor(x + 0.5), np.floor(y + 0.5), np.floor(z + 0.5)  # NaN as a whole number may be 0
                inside = 0 <= p < ni and 0 <= q < nj and 0 <= r < nk
                out[i, j, k] = stored[int(p), int(q), int(r)] if inside else 0


@compiled(nogil=True, error_model="numpy", fastmath={"contract"})
def blur(out, sigma):
    """A Gaussian of `sigma` voxels, separable, truncated at 3 sigma, edges repeated; in place.

    A ring holds the planes that are blurred within themselves, as many as the Gaussian is wide: what is read again
    stays in the cache, and a plane is overwritten only after all that need it have read it. Voxels equally far on both
    sides share a product: 1.6 times as fast as one by one.
    """
    radius = int(math.ceil(3.0 * sigma))
    width = 2 * radius + 1
    weights = np.empty(radius + 1, dtype=np.float32)  # of the voxel itself, then of those to its sides
    for t in range(radius + 1):
        weights[t] = math.exp(-0.5 * (t / sigma) ** 2)
    weights /= weights[0] + 2 * weights[1:].sum()
    ni, nj, nk = out.shape
    ring = np.empty((width, nj, nk), dtype=np.float32)
    row = np.empty(nk + 2 * radius, dtype=np.float32)
    for ahead in range(-radius, ni + radius):
        _blur_plane(out[min(max(ahead, 0), ni - 1)], weights, row, ring[(ahead + radius) % width])
        i = ahead - radius
        if i >= 0:
            for j in range(nj):
                before, after = ring[(i + radius - 1) % width, j], ring[(i + radius + 1) % width, j]
                _begin(out[i, j], weights[0], ring[(i + radius) % width, j], weights[1], before, after)
                for t in range(2, radius + 1):
                    _add(out[i, j], weights[t], ring[(i + radius - t) % width, j], ring[(i + radius + t) % width, j])


@compiled(nogil=True, error_model="numpy", fastmath={"contract"})
def _blur_plane(plane, weights, row, into):
    """Blur a plane (j, k) along both axes; `row` is room for a row with its repeated ends."""
    nj, nk = plane.shape
    radius = len(weights) - 1
    inner = row[radius : radius + nk]
    for j in range(nj):
        _begin(inner, weights[0], plane[j], weights[1], plane[max(j - 1, 0)], plane[min(j + 1, nj - 1)])
        for t in range(2, radius + 1):
            _add(inner, weights[t], plane[max(j - t, 0)], plane[min(j + t, nj - 1)])
        row[:radius], row[radius + nk :] = inner[0], inner[nk - 1]
        _begin(
            into[j], weights[0], inner, weights[1], row[radius - 1 : radius - 1 + nk], row[radius + 1 : radius + 1 + nk]
        )
        for t in range(2, radius + 1):
            _add(into[j], weights[t], row[radius - t : radius - t + nk], row[radius + t : radius + t + nk])


@compiled(nogil=True, inline="always")
def _begin(row, weight, middle, to_sides, before, after):
    for k in range(len(row)):
        row[k] = weight * middle[k] + to_sides * (before[k] + after[k])


@compiled(nogil=True, inline="always")
def _add(row, weight, before, after):
    for k in range(len(row)):
        row[k] += weight * (before[k] + after[k])


@compiled(nogil=True, error_model="numpy")
def match_cells(a_to_b, b_to_mm, grid_a, grid_b, cell, distance_mm):
    """For each cell of grid a: the nearest cell of grid b (flat index, -1 outside) and how far apart they lie.

    `a_to_b` takes cells of a to (fractional) cells of b, `b_to_mm` cells of b to millimetres: what rounding leaves of a
    place, in cells of b, is carried to millimetres. One affine product and a rounding a cell, O(cells of a); without a
    branch, and with the matrix in names of its own, rows become vector instructions (24^3 cells: 90 -> 11 us).
    """
    gi, gj, gk = grid_a
    hi, hj, hk = grid_b
    dx, dy, dz = a_to_b[0, 2], a_to_b[1, 2], a_to_b[2, 2]
    m00, m01, m02 = b_to_mm[0, 0], b_to_mm[0, 1], b_to_mm[0, 2]
    m10, m11, m12 = b_to_mm[1, 0], b_to_mm[1, 1], b_to_mm[1, 2]
    m20, m21, m22 = b_to_mm[2, 0], b_to_mm[2, 1], b_to_mm[2, 2]
    for i in range(gi):
        for j in range(gj):
            n = (i * gj + j) * gk
            cells, distances = cell[n : n + gk], distance_mm[n : n + gk]
            x0 = a_to_b[0, 0] * i + a_to_b[0, 1] * j + a_to_b[0, 3]
            y0 = a_to_b[1, 0] * i + a_to_b[1, 1] * j + a_to_b[1, 3]
            z0 = a_to_b[2, 0] * i + a_to_b[2, 1] * j + a_to_b[2, 3]
            for k in range(gk):
                x, y, z = x0 + dx * k, y0 + dy * k, z0 + dz * k
                p, q, r = np.floor(x + 0.5), np.floor(y + 0.5), np.floor(z + 0.5)
                inside = (p >= 0) & (p < hi) & (q >= 0) & (q < hj) & (r >= 0) & (r < hk)
                x, y, z = x - p, y - q, z - r
                u, v, w = m00 * x + m01 * y + m02 * z, m10 * x + m11 * y + m12 * z, m20 * x + m21 * y + m22 * z
                cells[k] = int((p * hj + q) * hk + r) if inside else -1
                distances[k] = math.sqrt(u * u + v * v + w * w) if inside else np.inf


_AT_ONCE = 1024  # keys that all queries are compared with before the next ones: 28 kB, which the first cache holds


@compiled(nogil=True, error_model="numpy")
def boxes_alike(queries, query_space, keys, key_space, iou, out):
    """out[q, k] = the boxes lie in one space and overlap by at least `iou` (intersection over union).

    Boxes are columns, float32 (6, n): lowest, highest corner; spaces int32. So several keys are compared at once,
    without a branch (64 queries, 65,536 keys: 22 -> 0.7 ms; without _AT_ONCE 1.2 ms).
    """
    iou, count = _F(iou), keys.shape[1]
    for begin in range(0, count, _AT_ONCE):
        end = min(begin + _AT_ONCE, count)
        x0, y0, z0 = keys[0, begin:end], keys[1, begin:end], keys[2, begin:end]
        x1, y1, z1 = keys[3, begin:end], keys[4, begin:end], keys[5, begin:end]
        spaces = key_space[begin:end]
        for q in range(queries.shape[1]):
            a0, b0, c0 = queries[0, q], queries[1, q], queries[2, q]
            a1, b1, c1 = queries[3, q], queries[4, q], queries[5, q]
            volume, space, row = (a1 - a0) * (b1 - b0) * (c1 - c0), query_space[q], out[q, begin:end]
            for k in range(end - begin):
                shared = max(min(a1, x1[k]) - max(a0, x0[k]), _F(0)) * max(min(b1, y1[k]) - max(b0, y0[k]), _F(0))
                shared *= max(min(c1, z1[k]) - max(c0, z0[k]), _F(0))
                both = volume + (x1[k] - x0[k]) * (y1[k] - y0[k]) * (z1[k] - z0[k])
                row[k] = (space == spaces[k]) & (shared > _F(0)) & (shared >= iou * (both - shared))


@compiled(nogil=True, error_model="numpy")
def places_apart(queries, query_space, keys, key_space, far_mm, out):
    """out[q, k] = the places lie in one space and more than `far_mm` apart; columns (3, n), as in `boxes_alike`."""
    limit, count = _F(far_mm * far_mm), keys.shape[1]
    for begin in range(0, count, _AT_ONCE):
        end = min(begin + _AT_ONCE, count)
        x, y, z, spaces = keys[0, begin:end], keys[1, begin:end], keys[2, begin:end], key_space[begin:end]
        for q in range(queries.shape[1]):
            a, b, c, space, row = queries[0, q], queries[1, q], queries[2, q], query_space[q], out[q, begin:end]
            for k in range(end - begin):
                dx, dy, dz = x[k] - a, y[k] - b, z[k] - c
                row[k] = (space == spaces[k]) & (dx * dx + dy * dy + dz * dz > limit)
