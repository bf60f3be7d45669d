"""Prints the polynomial coefficients of simd.h: Chebyshev interpolation in 60 digits, lowest power first.

exp:   (exp(r) - 1 - r) / r^2 in r, on |r| <= ln(2)/2 (widened by 1e-3 for the rounding of the reduction)
steps: the same on |r| <= ln(2)/16 (8 steps) and ln(2)/32 (16 steps)
log1p: (log(1+f) / s - 2) / s^2 in s^2, with s = f/(2+f), on s^2 <= 1/9, that is f in [-1/2, 1]
"""

import mpmath as mp

mp.mp.dps = 60


def exp_rest(r: mp.mpf) -> mp.mpf:
    return mp.nsum(lambda k: r**k / mp.factorial(k + 2), [0, 40])


def log1p_rest(t: mp.mpf) -> mp.mpf:
    return mp.nsum(lambda k: 2 * t**k / (2 * k + 3), [0, 60])


def fit(function, low: mp.mpf, high: mp.mpf, degree: int) -> tuple[list[mp.mpf], mp.mpf]:
    count = degree + 1
    nodes = [(low + high) / 2 + (high - low) / 2 * mp.cos(mp.pi * (2 * i + 1) / (2 * count)) for i in range(count)]
    matrix = mp.matrix(count, count)
    for i, x in enumerate(nodes):
        for j in range(count):
            matrix[i, j] = x**j
    coefficients = list(mp.lu_solve(matrix, mp.matrix([function(x) for x in nodes])))
    grid = [low + (high - low) * i / 200 for i in range(201)]
    error = max(abs(mp.polyval(coefficients[::-1], x) - function(x)) for x in grid)
    return coefficients, error


for name, function, low, high, degrees in [
    ("exp", exp_rest, -mp.log(2) / 2 - mp.mpf("1e-3"), mp.log(2) / 2 + mp.mpf("1e-3"), (4, 9)),
    ("8 steps", exp_rest, -mp.log(2) / 16 - mp.mpf("2e-5"), mp.log(2) / 16 + mp.mpf("2e-5"), (2,)),
    ("16 steps", exp_rest, -mp.log(2) / 32 - mp.mpf("2e-5"), mp.log(2) / 32 + mp.mpf("2e-5"), (1,)),
    ("log1p", log1p_rest, mp.mpf(0), mp.mpf(1) / 9, (5, 11)),
]:
    for type_name, digits, degree in zip(("float", "double"), (10, 20), degrees, strict=False):
        coefficients, error = fit(function, low, high, degree)
        print(f"{name} {type_name}, largest error {mp.nstr(error, 3)}:")
        print("  " + ", ".join(mp.nstr(c, digits) for c in coefficients))
