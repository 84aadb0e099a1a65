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

/* RMS norm: out = x / sqrt(mean(x^2) + eps) * weight; Zhang and Sennrich, arXiv 1910.07467. Without a weight: 1. */
INLINE void rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
    vf squares = splat(0);
    for (int i = 0; i < n; i += W) squares = muladd(load(x + i), load(x + i), squares);
    const vf scale = splat(1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps));
    for (int i = 0; i < n; i += W) store(out + i, weight ? load(x + i) * scale * load(weight + i) : load(x + i) * scale);
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

/* Values [i, i + W) of an array of bfloat16 (wide is 2) or float (4). */
INLINE vf load_wide(const void *p, size_t i, int wide) {
    return wide == 2 ? widen_bf16((const uint16_t *)p + i) : load((const float *)p + i);
}

/* Two products of low rank, y += scale * b^T (a x), for the rows of mask tokens: LoRA, Hu et al., arXiv 2106.09685. */
typedef struct {
    const void *a;                /* [rank][ins] */
    const void *b;                /* [rank][outs] */
    int32_t rank, ins, outs, at;  /* at: where its outputs begin among those of the layer; rank 0: there is none */
    int32_t wide;                 /* bytes of a value of a and b: 2 is bfloat16, 4 is float */
    float scale;
} LowRank;

/* low = scale * a x */
INLINE void project_wide(const int wide, const LowRank *m, const float *x, float *low) {
    enum { TOGETHER = 4 };
    for (int r = 0; r < m->rank; r += TOGETHER) {
        const int n = m->rank - r < TOGETHER ? m->rank - r : TOGETHER;
        vf acc[TOGETHER];
        size_t a[TOGETHER]; /* rows beyond the last repeat it */
        for (int k = 0; k < TOGETHER; k++) {
            acc[k] = splat(0);
            a[k] = (size_t)(r + (k < n ? k : n - 1)) * m->ins;
        }
        for (int i = 0; i < m->ins; i += W)
            UNROLL for (int k = 0; k < TOGETHER; k++) acc[k] = muladd(load_wide(m->a, a[k] + i, wide), load(x + i), acc[k]);
        for (int k = 0; k < n; k++) low[r + k] = m->scale * sum(acc[k]);
    }
}

/* y += b^T low */
INLINE void add_wide(const int wide, const LowRank *m, const float *low, float *y) {
    enum { VECTORS = 32 / W };
    for (int i = 0; i < m->outs; i += 32) {
        vf acc[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) acc[v] = load(y + i + v * W);
        for (int r = 0; r < m->rank; r++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                acc[v] = muladd(load_wide(m->b, (size_t)r * m->outs + i + v * W, wide), splat(low[r]), acc[v]);
        UNROLL for (int v = 0; v < VECTORS; v++) store(y + i + v * W, acc[v]);
    }
}

#endif
