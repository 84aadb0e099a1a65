/* What is done with one row at a time: inputs of products, norms, rotations, activations. */
#ifndef SELFDRAFT_ROWS_H
#define SELFDRAFT_ROWS_H

#include "weights.h"

/* False where a value is NaN or infinite: maxima and 8-bit rounding would hide it. */
INLINE int is_finite(const float *x, int n) {
    vf zero = splat(0);
    for (int i = 0; i < n; i += W) zero = muladd(load(x + i), splat(0), zero);
    return sum(zero) == 0.0f;
}

/* Stores a row as the inputs of a product in that format. x: [n], n a multiple of GROUP. */
static void pack(const float *x, int n, int format, const Inputs *to, int row) {
    const int form = form_of(format);
    const float limit = to->low ? 127.0f * 128 : 127.0f;
    for (int g = 0; g < n / GROUP; g++) {
        const float *in = x + g * GROUP;
        const size_t at = group_at(to, row, g);
        if (form == FLOATS) {
            memcpy(to->floats + at * GROUP, in, GROUP * sizeof *in);
            continue;
        }
        if (form == HALVES) {
            for (int i = 0; i < GROUP; i++) to->halves[at * GROUP + i] = narrow_bf16(in[i]);
            continue;
        }
        vf most = splat(0);
        for (int i = 0; i < GROUP; i += W) most = max(most, max(load(in + i), -load(in + i)));
        const float range = largest(most);
        const vf inverse = splat(range > 0 ? limit / range : 0.0f);
        vi q[GROUP / W], low[GROUP / W];
        vf half[2] = {splat(0), splat(0)}; /* whole numbers below 2^24: exact in any order */
        for (int i = 0; i < GROUP / W; i++) {
            q[i] = to_int(load(in + i * W) * inverse);
            half[i * W / (GROUP / 2)] += float_of(q[i]);
            low[i] = q[i];
            q[i] = to->low ? (q[i] + 64) >> 7 : q[i];
            low[i] -= q[i] << 7;
        }
        narrow_bytes(q, to->bytes + at * GROUP);
        if (to->low) narrow_bytes(low, to->low + at * GROUP);
        float *scale = to->scales + at * SCALES;
        scale[SCALE] = range / limit;
        scale[FIRST] = scale[SCALE] * sum(half[0]);
        scale[WHOLE] = scale[SCALE] * sum(half[0] + half[1]);
    }
}

/* RMS norm: out = x / sqrt(mean(x^2) + eps) * weight; Zhang and Sennrich, arXiv 1910.07467. */
INLINE void rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
    vf squares = splat(0);
    for (int i = 0; i < n; i += W) squares = muladd(load(x + i), load(x + i), squares);
    const vf scale = splat(1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps));
    for (int i = 0; i < n; i += W) store(out + i, load(x + i) * scale * load(weight + i));
}

/* Rotates a head by its position; Su et al., RoFormer, arXiv 2104.09864. The first `rotated` values: value i goes
 * with value i + rotated / 2. angles: cosines, then sines, [rotated / 2] each. */
INLINE void rotate(float *head, int rotated, const float *angles) {
    const int half = rotated / 2;
    for (int i = 0; i < half; i += W) {
        vf a = load(head + i), b = load(head + half + i), c = load(angles + i), s = load(angles + half + i);
        store(head + i, muladd(a, c, -(b * s)));
        store(head + half + i, muladd(b, c, a * s));
    }
}

enum Activation { SILU, GELU_TANH };

INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

/* out = activation(gate) * up */
INLINE void gated(int activation, const float *gate, const float *up, int n, float *out) {
    for (int i = 0; i < n; i += W) {
        vf x = load(gate + i);
        vf inner = activation == SILU
                       ? x
                       : splat(1.5957691216057308f) * muladd(x * x * x, splat(0.044715f), x); /* tanh as a sigmoid */
        store(out + i, x * sigmoid(inner) * load(up + i));
    }
}

#endif
