/* Gumbel noise keyed by (seed, sample, position), as in sampling/gumbel.py: Philox 4x32-10 (Salmon et al., SC 2011),
 * whose word w becomes u = (w + 1/2) / 2^32 and the noise -log(-log(u)), here in float32. */
#include "vector.h"

typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint64_t vl __attribute__((vector_size(8 * W)));

/* Natural logarithm of positive normal numbers; relative error about 1e-7 (Cephes' logf). */
INLINE vf logarithm(vf x) {
    vi bits = as_int(x);
    vi exponent = (bits >> 23) - 126;
    vf m = as_float((bits & 0x007fffff) | 0x3f000000); /* [1/2, 1) */
    vi small = m < 0.70710678f;                        /* all bits set */
    exponent += small;
    m = m - splat(1) + as_float(as_int(m) & small);
    vf e = float_of(exponent), z = m * m;
    vf p = muladd(splat(7.0376836292e-2f), m, splat(-1.1514610310e-1f));
    p = muladd(p, m, splat(1.1676998740e-1f));
    p = muladd(p, m, splat(-1.2420140846e-1f));
    p = muladd(p, m, splat(1.4249322787e-1f));
    p = muladd(p, m, splat(-1.6668057665e-1f));
    p = muladd(p, m, splat(2.0000714765e-1f));
    p = muladd(p, m, splat(-2.4999993993e-1f));
    p = muladd(p, m, splat(3.3333331174e-1f));
    p = p * m * z;
    p = muladd(e, splat(-2.12194440e-4f), p);
    p = muladd(z, splat(-0.5f), p);
    return muladd(e, splat(0.693359375f), m + p);
}

INLINE vf noise_of(vu word) {
    vi low = (vi)(word < 0x80000000u);
    vu near = (word & (vu)low) | (~word & ~(vu)low); /* distance to the closer end of [0, 1) */
    vf x = muladd(__builtin_convertvector(near, vf), splat(0x1p-32f), splat(0x1p-33f));
    vf y = splat(1) - x;                             /* log(1 - x) = log(y) + (1 - y - x) / y, with y rounded */
    vf direct = logarithm(x), mirrored = logarithm(y) + (splat(1) - y - x) / y;
    vf log_u = as_float((as_int(direct) & low) | (as_int(mirrored) & ~low));
    return -logarithm(-log_u);
}

INLINE vu high_half(vu a, uint32_t b) {
    return __builtin_convertvector(__builtin_convertvector(a, vl) * (uint64_t)b >> 32, vu);
}

/* Noise of all tokens at one index of a text. out: [vocabulary]. */
EXPORT void selfdraft_noise(uint64_t seed, uint32_t sample, uint32_t position, int vocabulary, float *out) {
    vu lanes;
    for (int i = 0; i < W; i++) lanes[i] = (uint32_t)i;
    for (int block = 0; block < (vocabulary + 3) / 4; block += W) {
        vu c[4] = {lanes + (uint32_t)block, (vu){0} + position, (vu){0} + sample, (vu){0}};
        uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
        for (int round = 0; round < 10; round++) {
            vu first = c[0] * 0xD2511F53u, second = c[2] * 0xCD9E8D57u;
            vu next[4] = {high_half(c[2], 0xCD9E8D57u) ^ c[1] ^ key[0], second,
                          high_half(c[0], 0xD2511F53u) ^ c[3] ^ key[1], first};
            memcpy(c, next, sizeof c);
            key[0] += 0x9E3779B9u;
            key[1] += 0xBB67AE85u;
        }
        vf made[4];
        for (int k = 0; k < 4; k++) made[k] = noise_of(c[k]);
        for (int i = 0; i < W; i++)
            for (int k = 0; k < 4; k++)
                if (4 * (block + i) + k < vocabulary) out[4 * (block + i) + k] = made[k][i];
    }
}
