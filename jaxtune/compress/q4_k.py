"""GGUF's Q4_K: super-blocks of 256 numbers, in eight blocks of 32 with a scale and a least number in 6 bits each.

A number is `d · scale · code - dmin · least`, d and dmin being float16 numbers of the super-block: 4.5 bits a number.
(The `gguf` package reads this format and does not write it.)

Dimensions: S super-blocks, K = 8 blocks, g = 32 numbers of a block.
"""

import numpy as np

SUPER, BLOCK = 256, 32
BYTES = 144  # of a super-block
_TRIES = 21


def quantize(rows: np.ndarray) -> np.ndarray:
    """Rows whose length divides by 256, as bytes `[…, length / 256 · 144]`.

    >>> quantize(np.linspace(-1, 1, 512, dtype=np.float32).reshape(1, 512)).shape
    (1, 288)

    Raises:
      ValueError: the length does not divide.
    """
    if rows.shape[-1] % SUPER:
        raise ValueError(f"{rows.shape[-1]} numbers do not divide into super-blocks of {SUPER}")
    x_SKg = rows.astype(np.float32).reshape(-1, SUPER // BLOCK, BLOCK)
    out = np.concatenate([_blocks(part) for part in np.array_split(x_SKg, max(1, len(x_SKg) // 4096))])
    return out.reshape(*rows.shape[:-1], -1)


def _blocks(x_SKg: np.ndarray) -> np.ndarray:
    scale_SK, least_SK = _fit(x_SKg)
    d_S, dmin_S = (most.astype(np.float16) for most in (scale_SK.max(-1) / 63, least_SK.max(-1) / 63))
    wide_d, wide_dmin = (d.astype(np.float32)[:, None] for d in (d_S, dmin_S))
    scales, leasts = (
        np.clip(np.rint(np.divide(x, d, out=np.zeros_like(x), where=d > 0)), 0, 63).astype(np.uint8)
        for x, d in ((scale_SK, wide_d), (least_SK, wide_dmin))
    )
    step_SK1, low_SK1 = (wide_d * scales)[..., None], (wide_dmin * leasts)[..., None]
    codes = np.divide(x_SKg + low_SK1, step_SK1, out=np.zeros_like(x_SKg), where=step_SK1 > 0)
    codes_SKg = np.clip(np.rint(codes), 0, 15).astype(np.uint8)
    pairs = codes_SKg.reshape(len(x_SKg), 4, 2, BLOCK)  # two blocks share 32 bytes
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(x_SKg), -1)
    heads = np.stack([d_S, dmin_S], -1).view(np.uint8)
    return np.concatenate([heads, _six_bits(scales, leasts), packed], -1)


def _fit(x_SKg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale of each block, and how far below zero its codes begin: of several, those with the least squares.

    Greater numbers weigh more. For each of several trial scales, codes are rounded, and scale and least are those of
    the best straight line through them.
    """
    weight = np.sqrt((x_SKg**2).mean(-1, keepdims=True)) + np.abs(x_SKg)
    low, high = np.minimum(x_SKg.min(-1, keepdims=True), 0), x_SKg.max(-1, keepdims=True)
    span = np.where(high > low, high - low, 1)
    sum_w, sum_x = weight.sum(-1), (weight * x_SKg).sum(-1)

    def tried(scale: np.ndarray, low: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return (weight * (scale * codes + low - x_SKg) ** 2).sum(-1)

    best_scale, best_low = (span / 15)[..., 0], low[..., 0]
    best = tried(best_scale[..., None], low, np.clip(np.rint((x_SKg - low) * 15 / span), 0, 15))
    for i in range(_TRIES):
        codes = np.clip(np.rint((x_SKg - low) * ((14 + 0.1 * i) / span)), 0, 15)
        sum_c, sum_cc, sum_cx = ((weight * y).sum(-1) for y in (codes, codes**2, codes * x_SKg))
        determinant = sum_w * sum_cc - sum_c**2
        where = determinant > 0
        safe = np.where(where, determinant, 1)
        scale = (sum_w * sum_cx - sum_c * sum_x) / safe
        least = (sum_cc * sum_x - sum_c * sum_cx) / safe
        through_zero = least > 0  # codes reach down to 0 at least
        scale = np.where(through_zero, sum_cx / np.where(sum_cc > 0, sum_cc, 1), scale)
        least = np.where(through_zero, 0, least)
        found = tried(scale[..., None], least[..., None], codes)
        better = where & (found < best) & (scale > 0)
        best, best_scale, best_low = (
            np.where(better, a, b) for a, b in ((found, best), (scale, best_scale), (least, best_low))
        )
    flat = (high <= low)[..., 0]
    return np.where(flat, 0, best_scale).astype(np.float32), (-best_low).astype(np.float32)


def _six_bits(scales_SK: np.ndarray, leasts_SK: np.ndarray) -> np.ndarray:
    """Eight scales and eight leasts of 6 bits each in 12 bytes: four whole, the upper bits of the other four, and their
    lower ones."""
    s, m = scales_SK, leasts_SK
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    third = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], -1)
