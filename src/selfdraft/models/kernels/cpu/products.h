/* Matrix products: y[row][out] = sum over inputs of w[out][in] * x[row][in].
 *
 * Each output is one chain of operations over its own row, group after group, whatever the number of rows: rows
 * are taken together only to share the loads of the weights. */
#ifndef SELFDRAFT_PRODUCTS_H
#define SELFDRAFT_PRODUCTS_H

#include "weights.h"

/* ---- Weights that are numbers: `panels` panels at a time, so that short blocks have several chains. */

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
                weight[p] = format == F32   ? load((const void *)at)
                            : format == F16 ? widen_half((const void *)at)
                                            : widen_bf16((const void *)at);
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

/* ---- Quantised weights times inputs of 8 or 16 bits: whole numbers within a group, then its scales. */

#if W == 16 && defined(__AVX512VNNI__)
/* Weights as unsigned bytes; those of Q8 are 128 too large, which the group's sum takes back. */
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
static __attribute__((noinline)) vi dot_quad(vi acc, vi w, vi x) { /* unrolled everywhere it takes minutes to compile */
    int8_t a[4 * W], b[4 * W];
    memcpy(a, &w, sizeof a);
    memcpy(b, &x, sizeof b);
    for (int i = 0; i < W; i++)
        for (int k = 0; k < 4; k++) acc[i] += a[4 * i + k] * b[4 * i + k];
    return acc;
}
INLINE vi quad_q8(const uint8_t *w) { vi v; memcpy(&v, w, sizeof v); return v; }
#endif

/* Quad q of a group's weights, as bytes that are `offset_of` too large. */
INLINE vi quad(const int format, const uint8_t *w, int q) {
    if (format == Q8) return quad_q8(w + (size_t)q * 4 * W);
    vi both;
    memcpy(&both, w + (size_t)(q / 2) * 4 * W, sizeof both);
    vi v = (q % 2 ? both >> 4 : both) & splat_i(0x0f0f0f0f);
    const int bits = high_bits(format), quads = bits ? 8 / bits : 1;
    if (!bits) return v;
    vi high;
    memcpy(&high, w + (size_t)(16 + q / quads * 4) * W, sizeof high);
    const int left = 4 - q % quads * bits;
    return v | ((left < 0 ? high >> -left : high << left) & splat_i(format == Q5 ? 0x10101010 : 0x30303030));
}

INLINE int offset_of(int format) { return format == Q8 ? OFFSET : format == Q6 ? 32 : 0; }

INLINE vi splat_quad(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return splat_i(four);
}

/* Dot products of the quads [from, to) of a group with the bytes of each row, and with the low bytes where inputs have
 * two (`wide`). */
INLINE void dot_quads(const int format, const int wide, const int rows, const int from, const int to, const uint8_t *w,
                      const int8_t *x, const int8_t *x_low, vi *dot, vi *low) {
#if W == 8
    /* products of two unsigned weights fit 16 bits, and so do the sums of some: widen once in a while */
    const int run = format == Q4 ? 8 : format == Q5 ? 4 : 2;
    __m256i sum[TILE], sum_low[TILE];
    const __m256i ones = _mm256_set1_epi16(1);
    if (format != Q8) {
        UNROLL for (int q = from; q < to; q++) {
            const __m256i weight = (__m256i)quad(format, w, q);
            const int first = (q - from) % run == 0, last = (q - from) % run == run - 1 || q == to - 1;
            UNROLL for (int r = 0; r < rows; r++) {
                const __m256i more = _mm256_maddubs_epi16(weight, (__m256i)splat_quad(x + r * GROUP + 4 * q));
                sum[r] = first ? more : _mm256_add_epi16(sum[r], more);
                if (last) dot[r] = (q - from < run ? splat_i(0) : dot[r]) + (vi)_mm256_madd_epi16(sum[r], ones);
                if (!wide) continue;
                const __m256i rest = _mm256_maddubs_epi16(weight, (__m256i)splat_quad(x_low + r * GROUP + 4 * q));
                sum_low[r] = first ? rest : _mm256_add_epi16(sum_low[r], rest);
                if (last) low[r] = (q - from < run ? splat_i(0) : low[r]) + (vi)_mm256_madd_epi16(sum_low[r], ones);
            }
        }
        return;
    }
#endif
    UNROLL for (int q = from; q < to; q++) {
        const vi weight = quad(format, w, q);
        UNROLL for (int r = 0; r < rows; r++) {
            dot[r] = dot_quad(q > from ? dot[r] : splat_i(0), weight, splat_quad(x + r * GROUP + 4 * q));
            if (wide)
                low[r] = dot_quad(q > from ? low[r] : splat_i(0), weight, splat_quad(x_low + r * GROUP + 4 * q));
        }
    }
}

/* Asks for the weights some groups ahead. The processor's own prefetching stops at the end of a page, and with several
 * rows there is so much to compute that it begins anew too late; with one row, or with weights that are numbers, it is
 * the faster one. */
enum { AHEAD = 4096 };
INLINE void prefetch(const uint8_t *w, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(w + AHEAD + i);
}

INLINE void block_bytes(const int format, const int wide, const int rows, const uint8_t *w, int groups,
                        const Inputs *x, int row, float *y, size_t ldy) {
    vf acc[TILE];
    const size_t step = group_bytes(format), start = group_at(x, row, 0);
    const int8_t *in = x->bytes + start * GROUP, *in_low = wide ? x->low + start * GROUP : NULL;
    const float *scales = x->scales + start * SCALES;
    const float offset = (float)offset_of(format);
    UNROLL for (int r = 0; r < rows; r++) acc[r] = splat(0);
    for (int g = 0; g < groups; g++, w += step, in += TILE * GROUP, scales += TILE * SCALES) {
        vi dot[TILE], low[TILE];
        if (rows > 1) prefetch(w, step);
        const uint16_t *end = (const void *)(w + end_of(format));
        const vf scale = widen_half(end), other = widen_half(format == Q8 ? end : end + W);
        dot_quads(format, wide, rows, 0, format == Q6 ? 4 : 8, w, in, in_low, dot, low);
        UNROLL for (int r = 0; r < rows; r++) {
            const float *s = scales + r * SCALES;
            const vi total = wide ? (dot[r] << 7) + low[r] : dot[r];
            acc[r] = muladd(float_of(total), scale * splat(s[SCALE]), acc[r]);
            if (format == Q4 || format == Q5) acc[r] = muladd(other, splat(s[WHOLE]), acc[r]);
            else if (offset) acc[r] = muladd(scale, splat(-offset * s[format == Q6 ? FIRST : WHOLE]), acc[r]);
        }
        if (format == Q6) {
            dot_quads(format, wide, rows, 4, 8, w, in, in_low, dot, low);
            UNROLL for (int r = 0; r < rows; r++) {
                const float *s = scales + r * SCALES;
                const vi total = wide ? (dot[r] << 7) + low[r] : dot[r];
                acc[r] = muladd(float_of(total), other * splat(s[SCALE]), acc[r]);
                acc[r] = muladd(other, splat(-offset * (s[WHOLE] - s[FIRST])), acc[r]);
            }
        }
        if (wide) in_low += TILE * GROUP;
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
#define PRODUCT(name, together)                                                                       \
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

enum { TOGETHER = 2 };
#define BLOCK(n) block_float(BF16, n, TOGETHER, w, panel, groups, x, row, out, ldy)
PRODUCT(product_bf16, TOGETHER)
#undef BLOCK
#define BLOCK(n) block_float(F16, n, TOGETHER, w, panel, groups, x, row, out, ldy)
PRODUCT(product_f16, TOGETHER)
#undef BLOCK
#define BLOCK(n) block_float(F32, n, TOGETHER, w, panel, groups, x, row, out, ldy)
PRODUCT(product_f32, TOGETHER)
#undef BLOCK
#define BLOCK(n) block_bytes(Q8, 0, n, w, groups, x, row, out, ldy)
PRODUCT(product_q8, 1)
#undef BLOCK
#define BLOCK(n) block_bytes(Q8, 1, n, w, groups, x, row, out, ldy)
PRODUCT(product_q8_wide, 1)
#undef BLOCK
#define BLOCK(n) block_bytes(Q4, 0, n, w, groups, x, row, out, ldy)
PRODUCT(product_q4, 1)
#undef BLOCK
#define BLOCK(n) block_bytes(Q4, 1, n, w, groups, x, row, out, ldy)
PRODUCT(product_q4_wide, 1)
#undef BLOCK
#define BLOCK(n) block_bytes(Q5, 0, n, w, groups, x, row, out, ldy)
PRODUCT(product_q5, 1)
#undef BLOCK
#define BLOCK(n) block_bytes(Q5, 1, n, w, groups, x, row, out, ldy)
PRODUCT(product_q5_wide, 1)
#undef BLOCK
#define BLOCK(n) block_bytes(Q6, 0, n, w, groups, x, row, out, ldy)
PRODUCT(product_q6, 1)
#undef BLOCK
#define BLOCK(n) block_bytes(Q6, 1, n, w, groups, x, row, out, ldy)
PRODUCT(product_q6_wide, 1)
#undef BLOCK

typedef void Product(const Matrix *, int, int, const Inputs *, int, float *, size_t);

/* Outputs of the panels [first, last) for all rows, without the bias. first and last are even, or last is the
 * matrix's end; a matrix has an even number of panels (its last ones may be zeros). */
INLINE void product(const Matrix *m, int first, int last, const Inputs *x, int rows, float *y, size_t ldy) {
    static Product *const products[FORMATS][2] = {
        [BF16] = {product_bf16, product_bf16}, [F16] = {product_f16, product_f16}, [F32] = {product_f32, product_f32},
        [Q8] = {product_q8, product_q8_wide},  [Q4] = {product_q4, product_q4_wide},
        [Q5] = {product_q5, product_q5_wide},  [Q6] = {product_q6, product_q6_wide},
    };
    products[m->format][x->low != NULL](m, first, last, x, rows, y, ldy);
}

#endif
