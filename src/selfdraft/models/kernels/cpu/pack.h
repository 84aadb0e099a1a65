/* Between rows of weights as checkpoints have them and panels. */
#ifndef SELFDRAFT_PACK_H
#define SELFDRAFT_PACK_H

#include "weights.h"

/* Where output o, input i of a group lies among the group's bytes. */
INLINE size_t place_of(int format, int o, int i) {
    switch (format) {
    case BF16: return PAIRS ? ((size_t)(i / 2) * W + o) * 4 + i % 2 * 2 : ((size_t)i * W + o) * 2;
    case F32: return ((size_t)i * W + o) * 4;
    case Q8:
    case Q6: return ((size_t)(i / 4) * W + o) * 4 + i % 4;
    default: return ((size_t)(i / 8) * W + o) * 4 + i % 4; /* i / 4 odd: the high nibble */
    }
}

/* One output as float, [ins]: the embedding of a token where the head's weights are the table. */
INLINE void unpack_output(const Matrix *m, int out, float *to) {
    const int o = out % W;
    const uint8_t *w = m->data + (size_t)(out / W) * panel_bytes(m);
    for (int g = 0; g < m->ins / GROUP; g++, w += group_bytes(m->format)) {
        float scale[W], minimum[W];
        if (m->format != BF16 && m->format != F32) {
            const uint16_t *end = (const void *)(w + (size_t)(m->format == Q4 ? 16 : 32) * W);
            store(scale, widen_half(end));
            if (m->format != Q8) store(minimum, widen_half(end + W)); /* of Q6: the second scale */
        }
        for (int i = 0; i < GROUP; i++) {
            const uint8_t *at = w + place_of(m->format, o, i);
            float *x = to + g * GROUP + i;
            uint16_t half;
            if (m->format == BF16) memcpy(&half, at, 2), *x = float_of_bf16(half);
            else if (m->format == F32) memcpy(x, at, 4);
            else if (m->format == Q6) *x = (float)(int8_t)*at * (i < GROUP / 2 ? scale : minimum)[o];
            else if (m->format == Q8) *x = (float)(int8_t)*at * scale[o];
            else *x = muladd(splat((float)(i / 4 % 2 ? *at >> 4 : *at & 15)), splat(scale[o]), splat(minimum[o]))[0];
        }
    }
}

#endif
