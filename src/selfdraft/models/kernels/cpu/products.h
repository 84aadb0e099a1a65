/* Matrix products: y[row][out] = sum over inputs of w[out][in] * x[row][in].
 *
 * Each output is one chain of operations over its own row, group after group, whatever the number of rows: rows
 * are taken together only to share the loads of the weights. */
#ifndef SELFDRAFT_PRODUCTS_H
#define SELFDRAFT_PRODUCTS_H

#include "weights.h"


/* ---- bfloat16 and float32 weights: `panels` panels at a time, so that short blocks have several chains. */

#if PAIRS
INLINE vf dot_pair(vf acc, const uint8_t *w, const uint16_t *x) {
    int32_t both;
    memcpy(&both, x, 4);
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(both));
}
#endif

INLINE void block_float(const int format, const int rows, const int panels, const uint8_t *w, size_t panel,
                        int groups, const Inputs *x, int row, float *y, size_t ldy) {
    vf acc[TILE][4];
    const size_t step = group_bytes(format);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++) acc[r][p] = splat(0);
    size_t at = group_at(x, row, 0);
    for (int g = 0; g < groups; g++, w += step, at += TILE) {
#if PAIRS
        if (format == BF16) {
            for (int i = 0; i < GROUP / 2; i++)
                UNROLL for (int r = 0; r < rows; r++) {
                    const uint16_t *in = x->halves + (at + r) * GROUP + 2 * i;
                    UNROLL for (int p = 0; p < panels; p++)
                        acc[r][p] = dot_pair(acc[r][p], w + p * panel + (size_t)i * W * 4, in);
                }
            continue;
        }
#endif
        for (int i = 0; i < GROUP; i++) {
            vf weight[4];
            UNROLL for (int p = 0; p < panels; p++) {
                const uint8_t *at = w + p * panel + (size_t)i * step / GROUP;
                weight[p] = format == BF16 ? widen_bf16((const void *)at) : load((const void *)at);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                vf in = splat(x->floats[(at + r) * GROUP + i]);
                UNROLL for (int p = 0; p < panels; p++) acc[r][p] = muladd(weight[p], in, acc[r][p]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++) store(y + r * ldy + p * W, acc[r][p]);
}

/* ---- 8-bit and 4-bit weights times 8-bit inputs: whole numbers within a group, then its scales. */

#if W == 16 && defined(__AVX512VNNI__)
/* Weights as unsigned bytes; 8-bit ones are 128 too large, which the group's sum takes back. */
#define OFFSET 128
INLINE vi dot_quad(vi acc, vi w, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x); }
INLINE vi quad_q8(const uint8_t *w) {
    return (vi)_mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8((char)0x80));
}
#elif W == 8
#define OFFSET 0
INLINE vi dot_quad(vi acc, vi w, vi x) { /* |w| * (x with w's sign): at most 2 * 127 * 127, which fits 16 bits */
    __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
    return acc + (vi)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
}
INLINE vi quad_q8(const uint8_t *w) { return (vi)_mm256_loadu_si256((const void *)w); }
#elif defined(__ARM_FEATURE_DOTPROD)
#define OFFSET 0
INLINE vi dot_quad(vi acc, vi w, vi x) { return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x); }
INLINE vi quad_q8(const uint8_t *w) { return (vi)vld1q_s8((const int8_t *)w); }
#else
#define OFFSET 0
INLINE vi dot_quad(vi acc, vi w, vi x) {
    int8_t a[4 * W], b[4 * W];
    memcpy(a, &w, sizeof a);
    memcpy(b, &x, sizeof b);
    for (int i = 0; i < W; i++)
        for (int k = 0; k < 4; k++) acc[i] += a[4 * i + k] * b[4 * i + k];
    return acc;
}
INLINE vi quad_q8(const uint8_t *w) { vi v; memcpy(&v, w, sizeof v); return v; }
#endif

INLINE vi splat_quad(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return splat_i(four);
}

/* The dot products of `quads` quads of a group, as whole numbers. */
INLINE void group_q8(const int rows, const int quads, const uint8_t *w, const int8_t *x, vi *dot) {
    UNROLL for (int q = 0; q < quads; q++) {
        vi weight = quad_q8(w + (size_t)q * 4 * W);
        UNROLL for (int r = 0; r < rows; r++)
            dot[r] = dot_quad(q ? dot[r] : splat_i(0), weight, splat_quad(x + r * GROUP + 4 * q));
    }
}

INLINE void group_q4(const int rows, const uint8_t *w, const int8_t *x, vi *dot) {
#if W == 8
    /* eight products of at most 15 * 127, two at a time, fit 16 bits: widen once a group */
    __m256i small[TILE];
    UNROLL for (int q = 0; q < 4; q++) {
        __m256i both = _mm256_loadu_si256((const void *)(w + (size_t)q * 4 * W)), low = _mm256_set1_epi8(15);
        __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        UNROLL for (int r = 0; r < rows; r++) {
            const int8_t *in = x + r * GROUP + 8 * q;
            __m256i products = _mm256_add_epi16(_mm256_maddubs_epi16(first, (__m256i)splat_quad(in)),
                                                _mm256_maddubs_epi16(second, (__m256i)splat_quad(in + 4)));
            small[r] = q ? _mm256_add_epi16(small[r], products) : products;
        }
    }
    UNROLL for (int r = 0; r < rows; r++) dot[r] = (vi)_mm256_madd_epi16(small[r], _mm256_set1_epi16(1));
#else
    UNROLL for (int q = 0; q < 4; q++) {
        vi both, low = splat_i(0x0f0f0f0f);
        memcpy(&both, w + (size_t)q * 4 * W, sizeof both);
        vi first = both & low, second = both >> 4 & low;
        UNROLL for (int r = 0; r < rows; r++) {
            const int8_t *in = x + r * GROUP + 8 * q;
            dot[r] = dot_quad(q ? dot[r] : splat_i(0), first, splat_quad(in));
            dot[r] = dot_quad(dot[r], second, splat_quad(in + 4));
        }
    }
#endif
}

INLINE void block_bytes(const int format, const int rows, const uint8_t *w, int groups, const Inputs *x, int row,
                        float *y, size_t ldy) {
    vf acc[TILE];
    const size_t step = group_bytes(format);
    const int8_t *in = x->bytes + group_at(x, row, 0) * GROUP;
    const float *scales = x->scales + group_at(x, row, 0) * SCALES;
    UNROLL for (int r = 0; r < rows; r++) acc[r] = splat(0);
    for (int g = 0; g < groups; g++, w += step, in += TILE * GROUP, scales += TILE * SCALES) {
        vi dot[TILE];
        const uint16_t *end = (const void *)(w + (size_t)(format == Q4 ? 16 : 32) * W);
        vf scale = widen_half(end), other = widen_half(format == Q8 ? end : end + W);
        if (format == Q4) group_q4(rows, w, in, dot);
        else group_q8(rows, format == Q6 ? 4 : 8, w, in, dot);
        UNROLL for (int r = 0; r < rows; r++) {
            const float *s = scales + r * SCALES;
            acc[r] = muladd(float_of(dot[r]), scale * splat(s[SCALE]), acc[r]);
            if (format == Q4) acc[r] = muladd(other, splat(s[WHOLE]), acc[r]);
            else if (OFFSET) acc[r] = muladd(scale, splat(-OFFSET * s[format == Q6 ? FIRST : WHOLE]), acc[r]);
        }
        if (format != Q6) continue;
        group_q8(rows, 4, w + 16 * W, in + GROUP / 2, dot);
        UNROLL for (int r = 0; r < rows; r++) {
            const float *s = scales + r * SCALES;
            acc[r] = muladd(float_of(dot[r]), other * splat(s[SCALE]), acc[r]);
            if (OFFSET) acc[r] = muladd(other, splat(-OFFSET * (s[WHOLE] - s[FIRST])), acc[r]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) store(y + r * ldy, acc[r]);
}

/* ---- Rows in blocks of at most TILE. Each size is compiled on its own, with its loops unrolled. */

#define CASE(n) case n: BLOCK(n); break;
#if W == 16
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#else
#define CASES CASE(1) CASE(2) CASE(3) CASE(4)
#endif

/* A product over panels [first, last) for one format, `together` panels at a time. */
#define PRODUCT(name, format, together)                                                                        \
    static void name(const Matrix *m, int first, int last, const Inputs *x, int rows, float *y, size_t ldy) { \
        const size_t panel = panel_bytes(m);                                                                   \
        const int groups = m->ins / GROUP;                                                                     \
        for (int p = first; p + together <= last; p += together) {                                             \
            const uint8_t *w = m->data + (size_t)p * panel;                                                    \
            for (int row = 0; row < rows; row += TILE) {                                                   \
                float *out = y + row * ldy + (size_t)p * W;                                                    \
                switch (rows - row < TILE ? rows - row : TILE) { CASES }                               \
            }                                                                                                  \
        }                                                                                                      \
    }

#define BLOCK(n) block_float(BF16, n, TOGETHER, w, panel, groups, x, row, out, ldy)
enum { TOGETHER = 2 };
PRODUCT(product_bf16, BF16, TOGETHER)
#undef BLOCK
#define BLOCK(n) block_float(F32, n, TOGETHER, w, panel, groups, x, row, out, ldy)
PRODUCT(product_f32, F32, TOGETHER)
#undef BLOCK
#define BLOCK(n) block_bytes(Q8, n, w, groups, x, row, out, ldy)
PRODUCT(product_q8, Q8, 1)
#undef BLOCK
#define BLOCK(n) block_bytes(Q4, n, w, groups, x, row, out, ldy)
PRODUCT(product_q4, Q4, 1)
#undef BLOCK
#define BLOCK(n) block_bytes(Q6, n, w, groups, x, row, out, ldy)
PRODUCT(product_q6, Q6, 1)
#undef BLOCK

/* Outputs of the panels [first, last) for all rows, without the bias. first and last are even, or last is the
 * matrix's end; a matrix has an even number of panels (its last ones may be zeros). */
INLINE void product(const Matrix *m, int first, int last, const Inputs *x, int rows, float *y, size_t ldy) {
    switch (m->format) {
    case BF16: product_bf16(m, first, last, x, rows, y, ldy); break;
    case F32: product_f32(m, first, last, x, rows, y, ldy); break;
    case Q6: product_q6(m, first, last, x, rows, y, ldy); break;
    case Q8: product_q8(m, first, last, x, rows, y, ldy); break;
    default: product_q4(m, first, last, x, rows, y, ldy);
    }
}

#endif
