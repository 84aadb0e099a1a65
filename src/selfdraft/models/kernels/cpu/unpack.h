/* Weights of a packed matrix as numbers. */
#ifndef SELFDRAFT_UNPACK_H
#define SELFDRAFT_UNPACK_H

#include "weights.h"

/* Input i of output o in a group of numbers. */
INLINE float number_of(int format, const uint8_t *group, int o, int i) {
    const size_t at = (size_t)i * W + o;
    uint16_t half[W] = {0};
    if (format == F32) return ((const float *)(const void *)group)[at];
    memcpy(half, group + (format == BF16 && PAIRS ? ((size_t)(i / 2) * W + o) * 4 + i % 2 * 2 : at * 2), 2);
    return format == F16 ? widen_half(half)[0] : float_of_bf16(half[0]);
}

/* Input i of output o in a group of a quantised format, without its scale. */
INLINE int whole_of(int format, const uint8_t *group, int o, int i) {
    const int quad = i / 4, lane = o * 4 + i % 4;
    if (format == Q8) return (int8_t)group[(size_t)quad * 4 * W + lane];
    const uint8_t both = group[(size_t)(quad / 2) * 4 * W + lane];
    int q = quad % 2 ? both >> 4 : both & 15;
    const int bits = high_bits(format), quads = bits ? 8 / bits : 1;
    if (bits) {
        const uint8_t high = group[(size_t)(16 + quad / quads * 4) * W + lane];
        q |= (high >> quad % quads * bits & ((1 << bits) - 1)) << 4;
    }
    return format == Q6 ? q - 32 : q;
}

/* One output, [ins]. */
static void unpack_output(const Matrix *m, int out, float *to) {
    const int o = out % W, format = m->format;
    const uint8_t *group = m->data + (size_t)(out / W) * panel_bytes(m);
    for (int g = 0; g < m->ins / GROUP; g++, group += group_bytes(format), to += GROUP) {
        if (form_of(format) != BYTES) {
            for (int i = 0; i < GROUP; i++) to[i] = number_of(format, group, o, i);
            continue;
        }
        const uint16_t *end = (const void *)(group + end_of(format));
        const float scale = widen_half(end)[o], other = format == Q8 ? 0 : widen_half(end + W)[o];
        for (int i = 0; i < GROUP; i++) {
            const float q = (float)whole_of(format, group, o, i);
            if (format == Q8) to[i] = q * scale;
            else if (format == Q6) to[i] = q * (i < GROUP / 2 ? scale : other);
            else to[i] = q * scale + other;
        }
    }
}

#endif
