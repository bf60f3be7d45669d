"""The mathematics of csrc/row_loss.h in Triton: its twin, function by function, tested against it.

Symbols and derivations stand there. Every function is elementwise over rows, but for those that end in `_of` (they
reduce over classes) and `merge_all` (over parts of a row). Scalars of a call arrive in the dtype of the statistics.
Relies on triton; steps.py and the kernels rely on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Codes of csrc/row_loss.h
CE: tl.constexpr = tl.constexpr(0)
GCE: tl.constexpr = tl.constexpr(1)
MAE: tl.constexpr = tl.constexpr(2)
LOG_ODDS: tl.constexpr = tl.constexpr(3)

UNIFORM: tl.constexpr = tl.constexpr(1)
NON_TARGET: tl.constexpr = tl.constexpr(2)
NON_TARGET_LOGITS: tl.constexpr = tl.constexpr(3)
CONDITIONAL: tl.constexpr = tl.constexpr(4)
KL: tl.constexpr = tl.constexpr(5)
KL_SOFTMAX: tl.constexpr = tl.constexpr(6)

SIGSOFTMAX: tl.constexpr = tl.constexpr(1)


@triton.constexpr_function
def needs_squares(DISTANCE):
    """Whether a distance reads A2."""
    return DISTANCE in (1, 2, 4)


@triton.constexpr_function
def needs_moments(DISTANCE):
    """Whether a distance reads h and V."""
    return DISTANCE in (3, 5, 6)


# Elementary functions, for one value per row. The hardware's own float32 exponential and logarithm lose digits for
# large and for near-1 arguments; over classes, where such terms weigh nothing, tl.exp is used.


@triton.jit
def exp_(x):
    """exp(x) for x <= 0, to about an ulp."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        # 2^(x log2 e), with the rounding error of the product and the low part of log2 e put back. Below -110 the
        # result is 0, and the error of an infinite product would be NaN.
        x = tl.where(x < -110.0, -110.0, x)
        product = x * 1.44269502162933349609375
        low = tl.fma(x, tl.full(x.shape, 1.44269502162933349609375, tl.float32), -product) + x * 1.9259629891e-8
        power = tl.exp2(product)
        result = power + power * (low * 0.69314718)
    return result


@triton.jit
def log_(x):
    """log(x) for normal x > 0 (infinity and NaN stay), to about an ulp, also next to 1."""
    if x.dtype == tl.float64:
        result = tl.log(x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        # x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = 2 atanh(s) with s = f / (2 + f)
        e = (bits - 0x3F3504F3) >> 23
        f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
        s = f / (2.0 + f)
        t = s * s
        series = t * (0.6666666655 + t * (0.4000012187 + t * (0.2855081688 + t * 0.2333057433)))
        whole = e.to(tl.float32)
        # log 2 in two parts, of which the first times a small integer is exact
        mantissa = f - (s * (f - series) - whole * 1.42860682e-06)
        result = tl.where(x < float("inf"), whole * 0.693145751953125 + mantissa, x)
    return result


@triton.jit
def log1p_(x):
    """log(1 + x) for x >= 0: the rounding of 1 + x is undone by a quotient."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, log_(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1_(x):
    """exp(x) - 1 for x <= 0, likewise."""
    u = exp_(x)
    below = u - 1.0
    plain = (u == 1.0) | (u < 0.25)
    return tl.where(u == 1.0, x, tl.where(u < 0.25, below, below * (x / tl.where(plain, 1.0, log_(u)))))


@triton.jit
def class_exp(x):
    """exp(x) of one logit, as fast as the hardware has it; what would be subnormal may be 0."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        result = tl.exp2(x * 1.44269504)
    return result


@triton.jit
def sigsoftmax_logit(z):
    """u = z + log sigmoid(z)."""
    return tl.where(z > 0.0, z, z + z) - log1p_(exp_(-tl.abs(z)))


@triton.jit
def sigsoftmax_slope_from(u):
    """du / dz where u is what z became: x = exp(z) solves x^2 / (1 + x) = exp(u)."""
    power = class_exp(u)
    x = 0.5 * (power + tl.sqrt(power * power + 4.0 * power))
    return 1.0 + 1.0 / (1.0 + x)


@triton.jit
def transformed(z, ACTIVATION: tl.constexpr):
    """What the softmax is taken of."""
    return sigsoftmax_logit(z) if ACTIVATION == SIGSOFTMAX else z


# Tiles. The classes of a row lie along several axes of a tile, so that a thread gets neighbouring classes, and those of
# as few rows as possible: (part, row, lane, word) where a program holds whole rows, (part, lane, word) where a row
# passes by in tiles. The first and the last axis are in one thread; the second tile keeps statistics per lane.


@triton.jit
def largest(x):
    """The maximum over the classes of a tile: per row, or per lane."""
    x = tl.max(tl.max(x, axis=len(x.shape) - 1), axis=0)
    return tl.max(x, axis=1) if len(x.shape) == 2 else x


@triton.jit
def summed(x):
    """The sum over the classes of a tile: per row, or per lane."""
    x = tl.sum(tl.sum(x, axis=len(x.shape) - 1), axis=0)
    return tl.sum(x, axis=1) if len(x.shape) == 2 else x


@triton.jit
def spread(x, ROWS: tl.constexpr):
    """One number per row (ROWS) or per lane, in the shape of a tile."""
    return x[None, :, None, None] if ROWS else x[None, :, None]


# Statistics: a tuple (M, A1, A2, h, V, n, U, sum u_k (M - z_k)). Those that a call does not read are 0 or arbitrary.


@triton.jit
def row_stats_of(
    rest, u,
    SQUARES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Statistics of a tile. `rest` holds -inf where a class does not count; u are class weights.

    With SOFT they are those of class probabilities: a masked class with u > 0 counts in U, and costs infinitely much.
    (u is 0 then where the class is the label or does not exist.)
    """
    ROWS: tl.constexpr = len(rest.shape) == 4
    lowest = -float("inf")
    M = largest(rest)
    top = spread(tl.where(M == lowest, 0.0, M), ROWS)
    e = class_exp(rest - top)
    A1 = summed(e)
    A2 = tl.zeros_like(A1)
    if SQUARES:
        A2 = summed(e * e)
    present = rest != lowest
    n = summed(present.to(rest.dtype))
    h = tl.zeros_like(A1)
    V = tl.zeros_like(A1)
    U = n
    weighted_depth = h
    if MOMENTS:
        below = tl.where(present, top - rest, 0.0)
        h = summed(below) / tl.where(n > 1.0, n, 1.0)
        step = tl.where(present, below - spread(h, ROWS), 0.0)
        V = summed(step * step)
        if WEIGHTED:
            share = u if SOFT else tl.where(present, u, 0.0)
            U = summed(share)
            cost = share * below
            if SOFT:
                cost = tl.where(present | (u == 0.0), cost, u * float("inf"))
            weighted_depth = summed(cost)
    return M, A1, A2, h, V, n, U, weighted_depth


@triton.jit
def drop(part, whole):
    """How far the maximum of a part is below that of the whole; 0 for an empty part, which weighs nothing."""
    return tl.where(part == -float("inf"), 0.0, whole - part)


@triton.jit
def take(stats, z, SQUARES: tl.constexpr):
    """M, A1 and A2 of lanes together with a tile: one exponential per class, and one for what was there."""
    M, A1, A2, h, V, n, U, weighted_depth = stats
    top = tl.maximum(M, largest(z))
    shift = tl.where(top == -float("inf"), 0.0, top)
    rescale = class_exp(M - shift)
    e = class_exp(z - spread(shift, False))
    A1 = A1 * rescale + summed(e)
    if SQUARES:
        A2 = A2 * (rescale * rescale) + summed(e * e)
    return top, A1, A2, h, V, n, U, weighted_depth


@triton.jit
def merge(x, y, SQUARES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTED: tl.constexpr):
    """Statistics of the union of two disjoint sets of classes."""
    M_x, A1_x, A2_x, h_x, V_x, n_x, U_x, d_x = x
    M_y, A1_y, A2_y, h_y, V_y, n_y, U_y, d_y = y
    M = tl.where(M_x > M_y, M_x, M_y)
    drop_x = drop(M_x, M)
    drop_y = drop(M_y, M)
    f_x = class_exp(-drop_x)
    f_y = class_exp(-drop_y)
    A1 = A1_x * f_x + A1_y * f_y
    A2 = A2_x
    if SQUARES:
        A2 = A2_x * (f_x * f_x) + A2_y * (f_y * f_y)
    n = n_x + n_y
    h = h_x
    V = V_x
    U = n
    d = d_x
    if MOMENTS:
        inverse = 1.0 / tl.where(n > 1.0, n, 1.0)
        share = n_y * inverse
        depth_x = h_x + drop_x
        depth_y = h_y + drop_y
        h = depth_x * (n_x * inverse) + depth_y * share
        step = depth_y - depth_x
        between = n_x * share
        # The depths may be infinite, and step^2 may overflow.
        squared = tl.where(depth_x == float("inf"), depth_x, step * step * between)
        V = V_x + V_y + tl.where(between == 0.0, 0.0, squared)
        if WEIGHTED:
            U = U_x + U_y
            d = (d_x + U_x * drop_x) + (d_y + U_y * drop_y)
    return M, A1, A2, h, V, n, U, d


@triton.jit
def merge_all(parts, SQUARES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTED: tl.constexpr):
    """Statistics of the union of all the sets in a vector, in one step."""
    M_i, A1_i, A2_i, h_i, V_i, n_i, U_i, d_i = parts
    M = tl.max(M_i, axis=0)
    drop_i = drop(M_i, M)
    f = class_exp(-drop_i)
    A1 = tl.sum(A1_i * f, axis=0)
    A2 = tl.zeros_like(A1)
    if SQUARES:
        A2 = tl.sum(A2_i * (f * f), axis=0)
    n = tl.sum(n_i, axis=0)
    h = tl.zeros_like(A1)
    V = tl.zeros_like(A1)
    U = n
    d = h
    if MOMENTS:
        depth_i = h_i + drop_i
        h = tl.sum(n_i * depth_i, axis=0) / tl.where(n > 1.0, n, 1.0)
        step = depth_i - h
        # The depths may be infinite, and step^2 may overflow.
        squared = tl.where(depth_i == float("inf"), depth_i, n_i * (step * step))
        V = tl.sum(V_i + tl.where(n_i == 0.0, 0.0, squared), axis=0)
        if WEIGHTED:
            U = tl.sum(U_i, axis=0)
            d = tl.sum(d_i + U_i * drop_i, axis=0)
    return M, A1, A2, h, V, n, U, d


# From statistics to the loss and its gradient


@triton.jit
def difference_error(x, y, rounded):
    """What x - y is off by after rounding to `rounded` (0 where that is not finite)."""
    y_seen = x - rounded
    x_seen = rounded + y_seen
    return tl.where(tl.abs(rounded) < float("inf"), (x - x_seen) - (y - y_seen), 0.0)


@triton.jit
def label_odds(M, A1, label, scale, margin):
    """delta, p, w, softplus(delta) and softplus(-delta)."""
    scaled = scale * label
    target = scaled - margin
    gap = M - target
    log_sum = log_(A1)
    delta = gap + log_sum
    low = difference_error(M, target, gap) - difference_error(scaled, margin, target)
    low += difference_error(gap, -log_sum, delta)
    magnitude = exp_(-tl.abs(delta))
    wrong = delta > 0.0
    tail = magnitude - magnitude * tl.where(wrong, low, -low)
    big = 1.0 / (1.0 + tail)
    small = tail * big
    p = tl.where(wrong, small, big)
    w = tl.where(wrong, big, small)
    rise = log1p_(tail)
    return delta, p, w, tl.where(wrong, delta, 0.0) + rise, tl.where(wrong, 0.0, -delta) + rise


@triton.jit
def truth_term(delta, p, w, softplus, q, most, TRUTH: tl.constexpr):
    """T and its derivative by delta; `most`: -log threshold, infinite for none."""
    if TRUTH == GCE:
        cut = softplus > most
        power = -q * tl.where(cut, most, softplus)
        return -expm1_(power) / q, tl.where(cut, 0.0, exp_(power) * w)
    elif TRUTH == MAE:
        return 2.0 * w, 2.0 * w * p
    elif TRUTH == LOG_ODDS:
        return delta, tl.zeros_like(delta) + 1.0
    else:
        return softplus, w


@triton.jit
def distance_term(p, w, softplus, softminus, rho, kappa, V, n, DISTANCE: tl.constexpr):
    """D and its derivatives by delta, rho, V and kappa."""
    zero = tl.zeros_like(p)
    one = zero + 1.0
    count = tl.where(n > 1.0, n, 1.0)
    even = 1.0 / count
    if DISTANCE == UNIFORM:
        return p * p + w * w * rho - 1.0 / (n + 1.0), 2.0 * p * w * (w * rho - p), w * w, zero, zero
    elif DISTANCE == NON_TARGET:
        return w * w * (rho - even), 2.0 * p * w * w * (rho - even), w * w, zero, zero
    elif DISTANCE == NON_TARGET_LOGITS:
        return V, zero, zero, one, zero
    elif DISTANCE == CONDITIONAL:
        return rho - even, zero, one, zero, zero
    elif DISTANCE == KL:
        return kappa - log_(count), zero, zero, zero, one
    elif DISTANCE == KL_SOFTMAX:
        share = count / (count + 1.0)
        own = 1.0 / (count + 1.0)
        value = own * softplus + share * (kappa + softminus) - log_(count + 1.0)
        return value, own * w - share * p, zero, zero, share
    else:
        return zero, zero, zero, zero, zero


@triton.jit
def row_loss(
    stats,
    label,  # z_y
    tau,
    weight,  # u_y
    q,
    most,  # -log of the threshold of gce
    scale,
    margin,
    smoothing,
    TRUTH: tl.constexpr,
    DISTANCE: tl.constexpr,
    SMOOTH: tl.constexpr,  # smoothing > 0, or SOFT
    WEIGHTED: tl.constexpr,  # U and the weighted depth are those of class weights or probabilities
    SOFT: tl.constexpr,  # class probabilities
):
    """(loss, -log p, D, margin, derivative by tau) and the gradient coefficients (a, b, c, d, smooth, label)."""
    M, A1, A2, h, V, n, U, weighted_depth = stats
    inf = float("inf")
    nan = float("nan")
    alone = A1 == 0.0
    label = tl.where(label == inf, nan, label)
    sum_exp = tl.where(alone, 1.0, A1)
    log_sum = log_(sum_exp)
    rho = A2 / (sum_exp * sum_exp)
    kappa = h + log_sum
    count = tl.where(n > 1.0, n, 1.0)

    delta, p, w, softplus, softminus = label_odds(M, sum_exp, label, scale, margin)
    T, T_delta = truth_term(delta, p, w, softplus, q, most, TRUTH)
    D, D_delta, D_rho, D_V, D_kappa = distance_term(p, w, softplus, softminus, rho, kappa, V, n, DISTANCE)

    value = weight * T
    F_delta = weight * T_delta
    F_sum = F_delta  # F_delta + F_kappa, which do not have to cancel
    F_mean = tl.zeros_like(F_delta)  # F_kappa of the smoothing term
    lost = tl.zeros_like(F_delta)
    share = tl.zeros_like(F_delta)  # F_mean / U
    if SMOOTH:
        if SOFT:
            share += 1.0
        else:
            share = smoothing / (n + 1.0)
        own = share * weight if SOFT else (1.0 - smoothing) * weight + share * weight
        rest_depth = h
        if WEIGHTED:
            rest_depth = weighted_depth / tl.where(U == 0.0, 1.0, U)
        # sum u_k (-log p_k), of terms that do not cancel. The label at -inf makes -log p inf, and 0 inf is no loss.
        others = tl.where(U == 0.0, rest_depth, U * (rest_depth + log_sum + softminus))
        value = tl.where(own == 0.0, 0.0, own * T) + share * others
        F_mean = share * U
        F_delta = own * w - F_mean * p
        F_sum = (own + F_mean) * w
        if SOFT:
            rest_loss = tl.where(U == 0.0, rest_depth, U * rest_depth)
            lost = tl.where(tl.abs(rest_loss) < inf, 0.0, rest_loss)
    cross_entropy = softplus
    penalty_weight = weight
    if SOFT:
        cross_entropy = value
        penalty_weight = tl.zeros_like(weight) + 1.0
    strength = tl.where(tau == 0.0, 0.0, tau * penalty_weight)
    value += tl.where(strength == 0.0, 0.0, strength * D)  # 0 * inf is not a penalty
    # Not every term reads delta, and a maximum may pass over a NaN: what the row reports must be NaN all the same.
    poison = tl.where(delta == delta, 0.0, nan)
    D_delta = strength * D_delta + poison
    F_rho = strength * D_rho
    F_kappa = strength * D_kappa

    # A row without a rest (one class, or all others masked) has loss and gradient 0.
    label_or_zero = tl.where(tl.abs(label) < inf, 0.0, nan)
    a = tl.where(alone, 0.0, (F_sum + D_delta) + F_kappa - 2.0 * rho * F_rho)
    distance = tl.where(alone, label_or_zero, D + poison)
    report = (
        tl.where(alone, label_or_zero + lost, value),
        tl.where(alone, label_or_zero + lost, cross_entropy),
        distance,
        label - M + poison,
        penalty_weight * distance,
    )
    gradient = (
        a,
        2.0 * F_rho,
        2.0 * strength * D_V,
        F_kappa / count,
        share + poison,
        tl.where(alone, label_or_zero + (F_mean if SOFT else 0.0), -scale * (F_delta + D_delta)),
    )
    return report, gradient
