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

/* Noise of the tokens 4 block .. 4 (block + W) at one index of a text, in their order. */
INLINE void noise_block(uint64_t seed, uint32_t sample, uint32_t position, int block, float *out) {
    vu lanes;
    for (int i = 0; i < W; i++) lanes[i] = (uint32_t)i;
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
        for (int k = 0; k < 4; k++) out[4 * i + k] = made[k][i];
}

/* Noise of all tokens at one index of a text. out: [vocabulary]. */
EXPORT void selfdraft_noise(uint64_t seed, uint32_t sample, uint32_t position, int vocabulary, float *out) {
    for (int at = 0; at < vocabulary; at += 4 * W) {
        float made[4 * W];
        noise_block(seed, sample, position, at / 4, made);
        const int left = vocabulary - at;
        memcpy(out + at, made, sizeof(float) * (size_t)(left < 4 * W ? left : 4 * W));
    }
}

/* Noise of some tokens at one index of a text: the same bits as in the noise of all. tokens, out: [count]. */
EXPORT void selfdraft_noise_of(uint64_t seed, uint32_t sample, uint32_t position, int count, const int32_t *tokens,
                               float *out) {
    for (int i = 0; i < count; i++) {
        float made[4 * W];
        noise_block(seed, sample, position, tokens[i] / 4, made);
        out[i] = made[tokens[i] % 4];
    }
}

/* The token with the best score, logit + temperature * noise; of equal ones the first. Noise of 32-bit words lies
 * below 22.9, so most blocks of tokens cannot win and need none. logits: [vocabulary]. */
EXPORT int selfdraft_draw(const float *logits, float temperature, uint64_t seed, uint32_t sample, uint32_t position,
                          int vocabulary) {
    int best = 0, likeliest = 0;
    for (int i = 1; i < vocabulary; i++)
        if (logits[i] > logits[likeliest]) likeliest = i;
    float score = -__builtin_inff();
    const int first = likeliest / (4 * W) * (4 * W); /* whose score is high, so it comes first */
    for (int step = -4 * W; step < vocabulary; step += 4 * W) {
        const int at = step < 0 ? first : step;
        if (step == first) continue;
        const int count = vocabulary - at < 4 * W ? vocabulary - at : 4 * W;
        float most = -__builtin_inff(), made[4 * W];
        for (int i = 0; i < count; i++) most = logits[at + i] > most ? logits[at + i] : most;
        if (most + temperature * 23.0f < score) continue;
        noise_block(seed, sample, position, at / 4, made);
        for (int i = 0; i < count; i++) {
            const float mine = logits[at + i] + temperature * made[i];
            if (mine > score || (mine == score && at + i < best)) score = mine, best = at + i;
        }
    }
    return best;
}
