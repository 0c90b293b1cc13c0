"""CPU kernels of the diffeomorphic registration: one iteration without temporary volumes.

All kernels work row by row and only near the mask: row (i, j) covers k from `spans[0, i, j]` up to, but not including,
`spans[1, i, j]`, and nothing is written outside that span. They run in parallel over planes i. The summation order at
every voxel is fixed, so results do not depend on the number of threads.
"""

from __future__ import annotations

import numba
import numpy as np

from dsiprep.compiled import compiled, inlined

__all__ = ["compose_loop", "correlation_loop", "smooth_loop", "volume_loop", "warp_loop"]

SLAB = 24  # planes per thread and pass; neighbouring slabs recompute the plane sums at their common boundary


@inlined
def _read(volume: np.ndarray, x: float, y: float, z: float) -> np.float32:
    """Trilinear interpolation; zero outside."""
    ni, nj, nk = volume.shape
    if not (x > -1 and y > -1 and z > -1 and x < ni and y < nj and z < nk):
        return np.float32(0)
    i, j, k = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
    return _between(volume, i, j, k, np.float32(x - i), np.float32(y - j), np.float32(z - k))


@inlined
def _between(volume: np.ndarray, i: int, j: int, k: int, fx: np.float32, fy: np.float32, fz: np.float32) -> np.float32:
    """Trilinear interpolation at the fractions fx, fy, fz of the way from a voxel to the next."""
    ni, nj, nk = volume.shape
    if i >= 0 and j >= 0 and k >= 0 and i < ni - 1 and j < nj - 1 and k < nk - 1:
        v00 = volume[i, j, k] + fz * (volume[i, j, k + 1] - volume[i, j, k])
        v01 = volume[i, j + 1, k] + fz * (volume[i, j + 1, k + 1] - volume[i, j + 1, k])
        v10 = volume[i + 1, j, k] + fz * (volume[i + 1, j, k + 1] - volume[i + 1, j, k])
        v11 = volume[i + 1, j + 1, k] + fz * (volume[i + 1, j + 1, k + 1] - volume[i + 1, j + 1, k])
        v0, v1 = v00 + fy * (v01 - v00), v10 + fy * (v11 - v10)
        return v0 + fx * (v1 - v0)
    return _between_at_edge(volume, i, j, k, fx, fy, fz)


@compiled()
def _between_at_edge(
    volume: np.ndarray, i: int, j: int, k: int, fx: np.float32, fy: np.float32, fz: np.float32
) -> np.float32:
    """`_between` where some of the eight voxels are outside."""
    ni, nj, nk = volume.shape
    total = np.float32(0)
    for a in range(2):
        for b in range(2):
            for c in range(2):
                if 0 <= i + a < ni and 0 <= j + b < nj and 0 <= k + c < nk:
                    w = (fx if a else 1 - fx) * (fy if b else 1 - fy) * (fz if c else 1 - fz)
                    total += np.float32(w) * volume[i + a, j + b, k + c]
    return total


@compiled(parallel=True)
def warp_loop(moving: np.ndarray, u: np.ndarray, spans: np.ndarray, out: np.ndarray) -> None:
    """out(x) = moving(x + u(x))."""
    for i in numba.prange(out.shape[0]):
        for j in range(out.shape[1]):
            for k in range(spans[0, i, j], spans[1, i, j]):
                out[i, j, k] = _read(moving, i + u[0, i, j, k], j + u[1, i, j, k], k + u[2, i, j, k])


@compiled(parallel=True)
def compose_loop(u: np.ndarray, step: np.ndarray, longest: float, spans: np.ndarray, out: np.ndarray) -> None:
    """out(x) = v(x) + u(x + v(x)), where v is `step` shortened to less than `longest`."""
    inverse = np.float32(1 / longest**2)
    u0, u1, u2 = u[0], u[1], u[2]
    for i in numba.prange(u.shape[1]):
        for j in range(u.shape[2]):
            for k in range(spans[0, i, j], spans[1, i, j]):
                a, b, c = step[0, i, j, k], step[1, i, j, k], step[2, i, j, k]
                shorter = 1 / np.sqrt(1 + (a * a + b * b + c * c) * inverse)
                a, b, c = a * shorter, b * shorter, c * shorter
                x, y, z = i + a, j + b, k + c  # less than a voxel from the voxel itself
                p, q, r = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
                fx, fy, fz = np.float32(x - p), np.float32(y - q), np.float32(z - r)
                out[0, i, j, k] = a + _between(u0, p, q, r, fx, fy, fz)
                out[1, i, j, k] = b + _between(u1, p, q, r, fx, fy, fz)
                out[2, i, j, k] = c + _between(u2, p, q, r, fx, fy, fz)


@compiled(parallel=True)
def smooth_loop(volumes: np.ndarray, kernel: np.ndarray, spans: np.ndarray, keep: float, out: np.ndarray) -> None:
    """out = keep * out + (n, i, j, k) volumes convolved along all axes, with edge voxels repeated."""
    n, ni = volumes.shape[:2]
    slabs = -(-ni // SLAB)
    for number in numba.prange(n * slabs):
        start = number % slabs * SLAB
        _smooth_slab(volumes[number // slabs], kernel, spans, np.float32(keep), start, out[number // slabs])


@compiled()
def _smooth_slab(
    volume: np.ndarray, kernel: np.ndarray, spans: np.ndarray, keep: np.float32, start: int, out: np.ndarray
) -> None:
    """Smooth one slab of planes; a ring buffer holds the planes smoothed along j and k that the sum along i needs."""
    ni, nj, nk = volume.shape
    size, radius = len(kernel), len(kernel) // 2
    stop = min(start + SLAB, ni)
    planes = np.zeros((size, nj, nk), np.float32)
    row = np.empty(nk + 2 * radius, np.float32)
    for plane in range(start - radius, stop + radius):
        if 0 <= plane < ni:
            for j in range(nj):
                first, last = nk, 0
                for i in range(max(plane - radius, start), min(plane + radius + 1, stop)):
                    if spans[0, i, j] < spans[1, i, j]:
                        first, last = min(first, spans[0, i, j]), max(last, spans[1, i, j])
                _smooth_row(volume[plane], kernel, j, first, last, row, planes[plane % size, j])
        i = plane - radius
        if i < start:
            continue
        for j in range(nj):
            target = out[i, j]
            for k in range(spans[0, i, j], spans[1, i, j]):
                target[k] *= keep
            for t in range(size):
                line, w = planes[min(max(i + t - radius, 0), ni - 1) % size, j], kernel[t]
                for k in range(spans[0, i, j], spans[1, i, j]):
                    target[k] += w * line[k]


@compiled()
def _smooth_row(
    plane: np.ndarray, kernel: np.ndarray, j: int, first: int, last: int, row: np.ndarray, out: np.ndarray
) -> None:
    """Smooth one row of a plane along j and k, from `first` up to `last`."""
    nj, nk = plane.shape
    radius = len(kernel) // 2
    if first >= last:
        return
    begin, end = max(first - radius, 0), min(last + radius, nk)
    for k in range(begin, end):
        row[radius + k] = kernel[radius] * plane[j, k]
    for t in range(1, radius + 1):
        below, above, w = plane[max(j - t, 0)], plane[min(j + t, nj - 1)], kernel[radius + t]
        for k in range(begin, end):
            row[radius + k] += w * (below[k] + above[k])
    for t in range(radius):
        row[t] = row[radius] if begin == 0 else row[t]
        row[radius + nk + t] = row[radius + nk - 1] if end == nk else row[radius + nk + t]
    for k in range(first, last):
        out[k] = kernel[0] * row[k]
    for t in range(1, 2 * radius + 1):
        w = kernel[t]
        for k in range(first, last):
            out[k] += w * row[k + t]


@compiled(parallel=True)
def volume_loop(u: np.ndarray, least: float) -> np.ndarray:
    """1 where det(I + du/dx) is below `least`, by central differences of u in voxels; 0 on the outermost voxels."""
    _, ni, nj, nk = u.shape
    out = np.zeros((ni, nj, nk), np.float32)
    half = np.float32(0.5)
    for i in numba.prange(1, ni - 1):
        for j in range(1, nj - 1):
            for k in range(1, nk - 1):
                a = 1 + half * (u[0, i + 1, j, k] - u[0, i - 1, j, k])
                b = half * (u[0, i, j + 1, k] - u[0, i, j - 1, k])
                c = half * (u[0, i, j, k + 1] - u[0, i, j, k - 1])
                d = half * (u[1, i + 1, j, k] - u[1, i - 1, j, k])
                e = 1 + half * (u[1, i, j + 1, k] - u[1, i, j - 1, k])
                f = half * (u[1, i, j, k + 1] - u[1, i, j, k - 1])
                g = half * (u[2, i + 1, j, k] - u[2, i - 1, j, k])
                h = half * (u[2, i, j + 1, k] - u[2, i, j - 1, k])
                m = 1 + half * (u[2, i, j, k + 1] - u[2, i, j, k - 1])
                if a * (e * m - f * h) - b * (d * m - f * g) + c * (d * h - e * g) < least:
                    out[i, j, k] = 1
    return out


@compiled(parallel=True)
def correlation_loop(
    fixed: np.ndarray,
    moving: np.ndarray,
    weights: np.ndarray,
    radius: int,
    floor: float,
    spans: np.ndarray,
    force: np.ndarray,
) -> float:
    """Weighted mean of `similarity.local_correlation`; its derivative by the displacement is written to `force`.

    Each slab is processed plane by plane: window sums of the five products, then the three coefficient maps of the
    derivative and their window sums, in buffers small enough for the processor's cache. `spans` must cover every voxel
    of every window with non-zero weight, and no voxel on a face of the volume.
    """
    slabs = -(-fixed.shape[0] // SLAB)
    score_and_weight = np.zeros((slabs, 2))
    for slab in numba.prange(slabs):
        _correlate_slab(fixed, moving, weights, radius, floor, spans, slab * SLAB, force, score_and_weight[slab])
    return score_and_weight[:, 0].sum() / max(score_and_weight[:, 1].sum(), 1e-6)


@compiled()
def _correlate_slab(
    fixed: np.ndarray,
    moving: np.ndarray,
    weights: np.ndarray,
    radius: int,
    floor: float,
    spans: np.ndarray,
    start: int,
    force: np.ndarray,
    score_and_weight: np.ndarray,
) -> None:
    """Process one slab; the sums of scores and of weights are added to `score_and_weight`."""
    ni, nj, nk = fixed.shape
    size = 2 * radius + 1
    stop = min(start + SLAB, ni)
    sums = np.zeros((size, 5, nj, nk), np.float32)  # ring buffer over the planes around the middle one
    maps = np.zeros((size, 3, nj, nk), np.float32)
    rows = np.zeros((5, nk + 2 * radius), np.float32)
    flat = np.empty((3, nj, nk), np.float32)
    for plane in range(start - 2 * radius, stop + 2 * radius):
        if 0 <= plane < ni:
            _plane_sums(fixed[plane], moving[plane], radius, spans[:, plane], rows, sums[plane % size])
        else:
            sums[plane % size].fill(0)
        middle, target = plane - radius, plane - 2 * radius
        if 0 <= middle < ni and middle >= start - radius:
            score, total = _plane_maps(sums, weights[middle], floor, spans[:, middle], rows, maps[middle % size])
            if start <= middle < stop:
                score_and_weight[0] += score
                score_and_weight[1] += total
        else:
            maps[middle % size].fill(0)
        if start <= target < stop:
            _plane_force(fixed, moving, target, maps, spans[:, target], rows, flat, force)


@compiled()
def _clear(rows: np.ndarray, begin: int, end: int) -> None:
    """Set the elements from `begin` up to `end` of every row to zero."""
    for p in range(rows.shape[0]):
        for k in range(begin, end):
            rows[p, k] = 0


@compiled()
def _plane_sums(
    fixed: np.ndarray, moving: np.ndarray, radius: int, spans: np.ndarray, rows: np.ndarray, out: np.ndarray
) -> None:
    """Sums of f, m, ff, mm and fm over the square windows within one plane."""
    nj, nk = fixed.shape
    r0, r1, r2, r3, r4 = rows[0], rows[1], rows[2], rows[3], rows[4]
    for j in range(nj):
        first, last = spans[0, j], spans[1, j]
        _clear(out[:, j], 0, nk)
        if first >= last:
            continue
        begin, end = max(first - radius, 0), min(last + radius, nk)
        _clear(rows, begin, end + 2 * radius)
        for b in range(max(j - radius, 0), min(j + radius, nj - 1) + 1):
            f, m = fixed[b], moving[b]
            for k in range(begin, end):
                fk, mk = f[k], m[k]
                r0[radius + k] += fk
                r1[radius + k] += mk
                r2[radius + k] += fk * fk
                r3[radius + k] += mk * mk
                r4[radius + k] += fk * mk
        for p in range(5):
            target, line = out[p, j], rows[p]
            for t in range(2 * radius + 1):
                for k in range(first, last):
                    target[k] += line[k + t]


@compiled()
def _plane_maps(
    sums: np.ndarray, weights: np.ndarray, floor: float, spans: np.ndarray, rows: np.ndarray, out: np.ndarray
) -> tuple[float, float]:
    """Derivative coefficients of every window centred in one plane; returns the sums of scores and of weights."""
    size = sums.shape[0]
    r, e, zero = np.float32(1 / size**3), np.float32(floor), np.float32(0)
    r0, r1, r2, r3, r4 = rows[0], rows[1], rows[2], rows[3], rows[4]
    scores, totals = 0.0, 0.0
    for j in range(weights.shape[0]):
        first, last = spans[0, j], spans[1, j]
        _clear(out[:, j], 0, weights.shape[1])
        _clear(rows, first, last)
        for p in range(5):
            line = rows[p]
            for t in range(size):
                plane = sums[t, p, j]
                for k in range(first, last):
                    line[k] += plane[k]
        w = weights[j]
        score, total = np.float32(0), np.float32(0)
        for k in range(first, last):
            f, m = r0[k] * r, r1[k] * r
            ff, mm = max(r2[k] * r - f * f, zero) + e, max(r3[k] * r - m * m, zero) + e
            fm = r4[k] * r - f * m
            a = 2 * w[k] * r * fm / (ff * mm)
            b = a * fm / mm
            out[0, j, k] = a
            out[1, j, k] = b
            out[2, j, k] = b * m - a * f
            score += w[k] * fm * fm / (ff * mm)
            total += w[k]
        scores += float(score)
        totals += float(total)
    return scores, totals


@compiled()
def _plane_force(
    fixed: np.ndarray,
    moving: np.ndarray,
    i: int,
    maps: np.ndarray,
    spans: np.ndarray,
    rows: np.ndarray,
    flat: np.ndarray,
    force: np.ndarray,
) -> None:
    """Derivative of all scores with respect to the intensities of plane i, times the gradient of the moving image."""
    _, nj, nk = fixed.shape
    size = maps.shape[0]
    radius = size // 2
    half = np.float32(0.5)
    for p in range(3):
        for j in range(nj):
            line = flat[p, j]
            for k in range(nk):
                line[k] = 0
            for t in range(size):
                plane = maps[t, p, j]
                for k in range(nk):
                    line[k] += plane[k]
    r0, r1, r2 = rows[0], rows[1], rows[2]
    for j in range(nj):
        first, last = spans[0, j], spans[1, j]
        if first >= last:
            continue
        begin, end = max(first - radius, 0), min(last + radius, nk)
        _clear(rows, begin, end + 2 * radius)
        for p in range(3):
            line = rows[p]
            for beside in range(max(j - radius, 0), min(j + radius, nj - 1) + 1):
                plane = flat[p, beside]
                for k in range(begin, end):
                    line[radius + k] += plane[k]
        right, left = moving[i, j + 1], moving[i, j - 1]
        above, below, own, f = moving[i + 1, j], moving[i - 1, j], moving[i, j], fixed[i, j]
        fi, fj, fk = force[0, i, j], force[1, i, j], force[2, i, j]
        for k in range(first, last):
            a, b, c = np.float32(0), np.float32(0), np.float32(0)
            for t in range(size):
                a += r0[k + t]
                b += r1[k + t]
                c += r2[k + t]
            d = half * (f[k] * a - own[k] * b + c)
            fi[k] = d * (above[k] - below[k])
            fj[k] = d * (right[k] - left[k])
            fk[k] = d * (own[k + 1] - own[k - 1])
