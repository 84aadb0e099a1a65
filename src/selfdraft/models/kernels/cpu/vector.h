/* A small layer over vectors of W floats: the one place that names instructions.
 *
 * W is 16 with AVX-512, 8 with AVX2 and 4 elsewhere (NEON, portable). Loads and stores need no alignment.
 * muladd(a, b, c) is a * b + c, rounded once where the instruction exists; compile with -ffp-contract=off, so that
 * nothing else is ever fused and every build keeps one fixed chain of operations per output. */
#ifndef SELFDRAFT_VECTOR_H
#define SELFDRAFT_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define W 16
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define W 8
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define W 4
#else
#include <math.h>
#define W 4
#endif

#define UNROLL _Pragma("GCC unroll 8")
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

enum { GROUP = 32 }; /* inputs that share a scale */

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

INLINE vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splat_i(int32_t x) { return x - (vi){0}; }
INLINE vf as_float(vi v) { vf f; memcpy(&f, &v, sizeof f); return f; }
INLINE vi as_int(vf v) { vi i; memcpy(&i, &v, sizeof i); return i; }

#if W == 16
INLINE vf muladd(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf nearest(vf a) { return (vf)_mm512_roundscale_ps((__m512)a, 8); }
INLINE vi to_int(vf a) { return (vi)_mm512_cvtps_epi32((__m512)a); }
INLINE vf widen_half(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE vf widen_bf16(const uint16_t *p) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
}
#elif W == 8
INLINE vf muladd(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf nearest(vf a) { return (vf)_mm256_round_ps((__m256)a, 8); }
INLINE vi to_int(vf a) { return (vi)_mm256_cvtps_epi32((__m256)a); }
INLINE vf widen_half(const uint16_t *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE vf widen_bf16(const uint16_t *p) {
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
}
#else
INLINE vf widen_bf16(const uint16_t *p) {
    vi v;
    for (int i = 0; i < W; i++) v[i] = (int32_t)((uint32_t)p[i] << 16);
    return as_float(v);
}
#if defined(__ARM_NEON)
INLINE vf muladd(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE vf max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vf min(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vf nearest(vf a) { return (vf)vrndnq_f32((float32x4_t)a); }
INLINE vi to_int(vf a) { return (vi)vcvtnq_s32_f32((float32x4_t)a); }
INLINE vf widen_half(const uint16_t *p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
#else
INLINE vf muladd(vf a, vf b, vf c) { return a * b + c; }
INLINE vf max(vf a, vf b) { vf r; for (int i = 0; i < W; i++) r[i] = a[i] > b[i] ? a[i] : b[i]; return r; }
INLINE vf min(vf a, vf b) { vf r; for (int i = 0; i < W; i++) r[i] = a[i] < b[i] ? a[i] : b[i]; return r; }
INLINE vf nearest(vf a) { vf r; for (int i = 0; i < W; i++) r[i] = rintf(a[i]); return r; }
INLINE vi to_int(vf a) { vi r; for (int i = 0; i < W; i++) r[i] = (int32_t)rintf(a[i]); return r; }
INLINE vf widen_half(const uint16_t *p) { /* shift into place, scale the exponent by 2^112 */
    vi magnitude = {0}, rest = {0}; /* the sign, and the exponent of what is not finite */
    for (int i = 0; i < W; i++) {
        magnitude[i] = (int32_t)((uint32_t)(p[i] & 0x7fff) << 13);
        rest[i] = (int32_t)((uint32_t)(p[i] & 0x8000) << 16) | ((p[i] & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
    }
    return as_float(as_int(as_float(magnitude) * splat(0x1p112f)) | rest);
}
#endif
#endif

/* GROUP whole numbers from -127 to 127 as bytes. */
INLINE void narrow_bytes(const vi *q, int8_t *to) {
#if W == 16
    for (int i = 0; i < 2; i++) _mm_storeu_si128((void *)(to + 16 * i), _mm512_cvtepi32_epi8((__m512i)q[i]));
#elif W == 8
    __m256i low = _mm256_packs_epi32((__m256i)q[0], (__m256i)q[1]);
    __m256i high = _mm256_packs_epi32((__m256i)q[2], (__m256i)q[3]);
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256((void *)to, bytes);
#else
    for (int i = 0; i < GROUP; i++) to[i] = (int8_t)q[i / W][i % W];
#endif
}

INLINE vf float_of(vi v) {
#if W == 16
    return (vf)_mm512_cvtepi32_ps((__m512i)v);
#elif W == 8
    return (vf)_mm256_cvtepi32_ps((__m256i)v);
#else
    vf f;
    for (int i = 0; i < W; i++) f[i] = (float)v[i];
    return f;
#endif
}

/* Sums and maxima over the lanes, in one fixed order: halves onto each other. */
#if W == 16
#define FOLD(name, op)                                                                                         \
    INLINE float name(vf v) {                                                                                  \
        const __m512d all = _mm512_castps_pd((__m512)v); /* AVX-512F takes halves of doubles only */           \
        const __m256 half = _mm256_castpd_ps(_mm512_extractf64x4_pd(all, 1));                                  \
        const __m256 a = _mm256_##op##_ps(_mm512_castps512_ps256((__m512)v), half);                            \
        const __m128 b = _mm_##op##_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));                \
        const __m128 c = _mm_##op##_ps(b, _mm_movehl_ps(b, b));                                                \
        return _mm_cvtss_f32(_mm_##op##_ss(c, _mm_movehdup_ps(c)));                                            \
    }
FOLD(sum, add)
FOLD(largest, max)
#else
INLINE float sum(vf v) {
    float lane[W];
    store(lane, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}
INLINE float largest(vf v) {
    float lane[W];
    store(lane, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}
#endif

/* float32 -> bfloat16, to nearest even. NaN keeps a set mantissa. */
INLINE uint16_t narrow_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE float float_of_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* e^x for x <= 88, with a relative error of about 1e-7; 0 below -87. */
INLINE vf exponential(vf x) {
    vi alive = x > -87.0f; /* all bits set where it is */
    vf y = min(max(x, splat(-87.0f)), splat(88.0f));
    vf n = nearest(y * splat(1.4426950408889634f));
    vf r = muladd(n, splat(2.12194440e-4f), muladd(n, splat(-0.693359375f), y));
    vf p = muladd(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = muladd(p, r, splat(8.3334519073e-3f));
    p = muladd(p, r, splat(4.1665795894e-2f));
    p = muladd(p, r, splat(1.6666665459e-1f));
    p = muladd(p, r, splat(0.5f));
    p = muladd(r * r, p, r) + splat(1.0f);
    vf power = as_float((to_int(n) + 127) << 23);
    return as_float(as_int(p * power) & alive);
}

#endif
