/* Weights as checkpoints store them: rows of numbers or of ggml's blocks (the package gguf describes them in
 * quants.py), read in groups of 32. */
#ifndef SELFDRAFT_BLOCKS_H
#define SELFDRAFT_BLOCKS_H

#include "weights.h"

enum Type { /* ggml's numbers */
    T_F32 = 0, T_F16 = 1, T_Q4_0 = 2, T_Q4_1 = 3, T_Q5_0 = 6, T_Q5_1 = 7, T_Q8_0 = 8,
    T_Q4_K = 12, T_Q5_K = 13, T_Q6_K = 14, T_IQ4_NL = 20, T_BF16 = 30
};

/* A group of a quantised type: whole numbers and two halves, as its format holds them (`weights.h`). */
typedef struct {
    uint8_t q[GROUP];
    uint16_t scale, other;
} Group;

INLINE float float_of_half(uint16_t h) {
    const uint16_t halves[W] = {h};
    return widen_half(halves)[0];
}

/* float32 -> half, to nearest even; beyond the range infinite. */
INLINE uint16_t narrow_half(float x) {
    uint32_t u, rest;
    memcpy(&u, &x, 4);
    const uint16_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u >= 0x47800000) return sign | (u > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (u < 0x38800000) { /* below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the last bits */
        float small;
        memcpy(&small, &u, 4);
        small += 0.5f;
        memcpy(&rest, &small, 4);
        return sign | (uint16_t)(rest - 0x3f000000);
    }
    return sign | (uint16_t)((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}

/* Bytes of a row of `ins` weights; 0 for a type that is not known. */
INLINE size_t row_bytes(int type, int ins) {
    const size_t groups = (size_t)ins / GROUP;
    switch (type) {
    case T_F32: return groups * 128;
    case T_F16:
    case T_BF16: return groups * 64;
    case T_Q4_0:
    case T_IQ4_NL: return groups * 18;
    case T_Q4_1: return groups * 20;
    case T_Q5_0: return groups * 22;
    case T_Q5_1: return groups * 24;
    case T_Q8_0: return groups * 34;
    case T_Q4_K: return groups % 8 ? 0 : groups / 8 * 144;
    case T_Q5_K: return groups % 8 ? 0 : groups / 8 * 176;
    case T_Q6_K: return groups % 8 ? 0 : groups / 8 * 210;
    default: return 0;
    }
}

INLINE uint16_t half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}

/* The 6-bit scale and minimum of group j in a block of Q4_K or Q5_K, times the block's two halves. */
INLINE void scales_k(const uint8_t *block, int j, Group *to) {
    const uint8_t *s = block + 4;
    const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    const int least = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
    to->scale = narrow_half(float_of_half(half_at(block)) * (float)scale);
    to->other = narrow_half(-float_of_half(half_at(block + 2)) * (float)least);
}

INLINE void nibbles(const uint8_t *from, uint8_t *q) {
    for (int i = 0; i < 16; i++) q[i] = from[i] & 15, q[16 + i] = from[i] >> 4;
}

INLINE void fifth_bits(const uint8_t *from, uint8_t *q) {
    for (int i = 0; i < GROUP; i++) q[i] |= (uint8_t)((from[i / 8] >> i % 8 & 1) << 4);
}

/* Group g of a row of a quantised type. */
static void read_group(int type, const uint8_t *row, int g, Group *to) {
    static const int8_t curve[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    const uint8_t *in = type < T_Q4_K || type == T_IQ4_NL ? row + row_bytes(type, GROUP) * g : NULL;
    const int j = g % 8; /* of a block of 256 */
    if (in) to->scale = half_at(in);
    switch (type) {
    case T_Q4_0:
        nibbles(in + 2, to->q);
        to->other = narrow_half(-8 * float_of_half(to->scale));
        break;
    case T_Q4_1:
        nibbles(in + 4, to->q);
        to->other = half_at(in + 2);
        break;
    case T_Q5_0:
        nibbles(in + 6, to->q);
        fifth_bits(in + 2, to->q);
        to->other = narrow_half(-16 * float_of_half(to->scale));
        break;
    case T_Q5_1:
        nibbles(in + 8, to->q);
        fifth_bits(in + 4, to->q);
        to->other = half_at(in + 2);
        break;
    case T_IQ4_NL:
        nibbles(in + 2, to->q);
        for (int i = 0; i < GROUP; i++) to->q[i] = (uint8_t)curve[to->q[i]];
        break;
    case T_Q4_K:
    case T_Q5_K:
        in = row + row_bytes(type, 256) * (g / 8);
        scales_k(in, j, to);
        for (int i = 0; i < GROUP; i++) {
            const uint8_t both = in[(type == T_Q4_K ? 16 : 48) + j / 2 * 32 + i];
            to->q[i] = j % 2 ? both >> 4 : both & 15;
            if (type == T_Q5_K) to->q[i] |= (uint8_t)((in[16 + i] >> j & 1) << 4);
        }
        break;
    case T_Q6_K:
        in = row + row_bytes(type, 256) * (g / 8);
        for (int i = 0; i < GROUP; i++) {
            const uint8_t low = in[j / 4 * 64 + j % 2 * 32 + i], high = in[128 + j / 4 * 32 + i];
            to->q[i] = (uint8_t)((j % 4 < 2 ? low & 15 : low >> 4) | (high >> j % 4 * 2 & 3) << 4);
        }
        const float scale = float_of_half(half_at(in + 208));
        to->scale = narrow_half(scale * (float)(int8_t)in[192 + 2 * j]);
        to->other = narrow_half(scale * (float)(int8_t)in[193 + 2 * j]);
        break;
    default: memcpy(to->q, in + 2, GROUP); /* Q8_0 */
    }
}

/* Group g of a row as numbers. */
INLINE void read_floats(int type, const uint8_t *row, int g, float *to) {
    const uint8_t *in = row + row_bytes(type, GROUP) * g;
    if (type == T_F32) memcpy(to, in, GROUP * 4);
    else if (type == T_F16) for (int i = 0; i < GROUP; i++) to[i] = float_of_half(half_at(in + 2 * i));
    else if (type == T_BF16) for (int i = 0; i < GROUP; i++) to[i] = float_of_bf16(half_at(in + 2 * i));
    else {
        Group group;
        read_group(type, row, g, &group);
        const float scale = float_of_half(group.scale), other = float_of_half(group.other);
        for (int i = 0; i < GROUP; i++) {
            if (type == T_Q8_0 || type == T_IQ4_NL) to[i] = (float)(int8_t)group.q[i] * scale;
            else if (type == T_Q6_K) to[i] = (float)(group.q[i] - 32) * (i < GROUP / 2 ? scale : other);
            else to[i] = (float)group.q[i] * scale + other;
        }
    }
}

#endif
