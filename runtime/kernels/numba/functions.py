"""exp, tanh, erf, sine and cosine of float32, written out: no library is called, and loops over them become vector code.

Errors against float64 over all exponents (the tests hold them): at most 2 units in the last place, for sine and cosine of the
largest value, 1. Infinities give limits (sine and cosine NaN), NaN gives NaN, what overflows gives infinity.

Sources: Cephes (exp, tanh; Moshier); N. Juffa's minimax polynomials for erf.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba.memory import OPTIONS, bits_as_f32

_F = np.float32
_MAGIC = _F(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds what is below 2^22 to an integer, half to even
_WHOLE = _F(8388608.0)  # 2^23: floats from here on are integers
_LOG2E, _LN2_HIGH, _LN2_LOW = _F(1.44269504), _F(0.693359375), _F(-2.12194440e-4)
_LOWEST, _HIGHEST = _F(-104.0), _F(89.0)
_ONE, _HALF, _TWO, _ZERO = _F(1), _F(0.5), _F(2), _F(0)


@njit(**OPTIONS)
def round_even(x):
    """The nearest integer of |x| < 2^22, half to even."""
    return (x + _MAGIC) - _MAGIC


@njit(**OPTIONS)
def rint(x):
    """The nearest integer, half to even; infinity and NaN stay. Not every processor has an instruction for it."""
    size = abs(x)
    near = (size + _WHOLE) - _WHOLE
    near = -near if x < _ZERO else near
    return near if size < _WHOLE else x


@njit(**OPTIONS)
def _power_of_two(n):
    """2^n for -126 <= n <= 127."""
    return bits_as_f32((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(**OPTIONS)
def exp(x):
    """e^x; 0 below -104, infinity above 88.7."""
    v = _LOWEST if x < _LOWEST else x
    v = _HIGHEST if v > _HIGHEST else v
    v = v if v == v else _ZERO
    n = round_even(v * _LOG2E)
    r = (v - n * _LN2_HIGH) - n * _LN2_LOW
    p = _F(1.9875691500e-4)
    p = p * r + _F(1.3981999507e-3)
    p = p * r + _F(8.3334519073e-3)
    p = p * r + _F(4.1665795894e-2)
    p = p * r + _F(1.6666665459e-1)
    p = p * r + _HALF
    p = (p * r) * r + r + _ONE
    whole = np.int32(n)
    half = whole >> np.int32(1)  # in two steps: 2^n alone is not a normal number at either end
    return (p * _power_of_two(half)) * _power_of_two(whole - half) if x == x else x


@njit(**OPTIONS)
def tanh(x):
    size = abs(x)
    z = x * x
    p = _F(-5.70498872745e-3)
    p = p * z + _F(2.06390887954e-2)
    p = p * z + _F(-5.37397155531e-2)
    p = p * z + _F(1.33314422036e-1)
    p = p * z + _F(-3.33332819422e-1)
    near = p * z * x + x
    far = _ONE - _TWO / (exp(size + size) + _ONE)
    far = -far if x < _ZERO else far
    return near if size < _F(0.625) else far


@njit(**OPTIONS)
def erf(x):
    size = abs(x)
    s = x * x
    t = _F(4) if size > _F(4) else size  # erf(4) is 1
    q = t * t
    r = _F(-1.72853470e-5) * t + _F(3.83197126e-4)
    u = _F(-3.88396438e-3) * t + _F(2.42546219e-2)
    r = r * q + u
    r = r * t + _F(-1.06777877e-1)
    r = r * t + _F(-6.34846687e-1)
    r = r * t + _F(-1.28717512e-1)
    r = r * t - t
    far = _ONE - exp(r)
    far = -far if x < _ZERO else far
    p = _F(-5.96761703e-4)
    p = p * s + _F(4.99119423e-3)
    p = p * s + _F(-2.67681349e-2)
    p = p * s + _F(1.12819925e-1)
    p = p * s + _F(-3.76125336e-1)
    p = p * s + _F(1.28379166e-1)
    near = p * x + x
    return far if size > _F(0.927734375) else near


# --- sine and cosine: of single numbers, in float64 ---------------------------------------------------------------------------

_PI_DIGITS = 31415926535897932384626433832795028841971693993751058209749445923078164062862089986280348253421170679
_PI_SCALE = 10**100


def _remainders() -> tuple[float, ...]:
    """2^e modulo 2 pi for e = 0..104, in double precision: floats beyond 2^24 are integers of 24 bits times such a power."""
    turn, made = 2 * _PI_DIGITS, []
    for e in range(105):
        made.append((((1 << e) * _PI_SCALE) % turn) / _PI_SCALE)
    return tuple(made)


_POWERS = np.array(_remainders())
#: pi / 2 in three parts, the first two of 26 bits: multiples of them up to 2^27 are exact.
_P1 = np.float64(int(np.ldexp(np.pi / 2, 25))) / 2.0**25
_P2 = np.float64(int(np.ldexp(np.pi / 2 - _P1, 52))) / 2.0**52
_P3 = 6.123233995736766e-17


@njit(**OPTIONS)
def sine_cosine(x):
    """``(sin x, cos x)`` of a float32, of any size."""
    if not abs(x) < np.float32(np.inf):
        return np.float32(np.nan), np.float32(np.nan)
    v = np.float64(abs(x))
    e = 0
    while v >= 16777216.0:
        v *= 0.5
        e += 1
    if e > 0:
        v *= _POWERS[e]
    n = np.float64(np.int64(v * 0.6366197723675814 + 0.5))
    r = ((v - n * _P1) - n * _P2) - n * _P3
    z = r * r
    s = r * (1 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880 - z / 39916800)))))
    c = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800 + z / 479001600)))))
    quarter = np.int64(n) & 3
    sine = s if quarter == 0 else c if quarter == 1 else -s if quarter == 2 else -c
    cosine = c if quarter == 0 else -s if quarter == 1 else -c if quarter == 2 else s
    return np.float32(-sine if x < 0 else sine), np.float32(cosine)
