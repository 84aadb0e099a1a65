#include "pack.h"

/* Packs rows of a matrix. values: [outs, ins] as bfloat16, float, int8, or 4-bit numbers one to a byte; scales and
 * minima: [outs, ins / 32] half, or none; of Q6 the two scales of a group. out: room for whole pairs of panels, zeroed. first: the output that
 * the first row becomes; step: from there to the next row's. */
EXPORT void selfdraft_pack(int format, const void *values, const uint16_t *scales, const uint16_t *minima, int64_t outs,
                    int ins, int64_t first, int64_t step, uint8_t *out) {
    const int groups = ins / GROUP, bytes = format == BF16 ? 2 : format == F32 ? 4 : 1;
    const size_t size = group_bytes(format);
    for (int64_t row = 0; row < outs; row++) {
        const int64_t to = first + row * step;
        const int o = (int)(to % W);
        uint8_t *panel = out + (size_t)(to / W) * groups * size;
        const uint8_t *in = (const uint8_t *)values + (size_t)row * ins * bytes;
        for (int g = 0; g < groups; g++, panel += size, in += (size_t)GROUP * bytes) {
            for (int i = 0; i < GROUP; i++) {
                uint8_t *at = panel + place_of(format, o, i);
                if (format == Q4) *at |= (uint8_t)(i / 4 % 2 ? in[i] << 4 : in[i]);
                else memcpy(at, in + (size_t)i * bytes, (size_t)bytes);
            }
            uint16_t *end = (void *)(panel + (size_t)(format == Q4 ? 16 : 32) * W);
            if (scales) end[o] = scales[row * groups + g];
            if (minima) end[W + o] = minima[row * groups + g];
        }
    }
}

EXPORT int64_t selfdraft_packed_bytes(int format, int64_t outs, int ins) {
    const int64_t panels = (outs + 2 * W - 1) / (2 * W) * 2;
    return panels * (ins / GROUP) * (int64_t)group_bytes(format);
}
