/* From rows of weights as checkpoints store them to panels, in one pass over the stored bytes. */
#include "blocks.h"
#include "threads.h"

typedef struct {
    const uint8_t *rows;
    uint8_t *out;
    int64_t outs, first;
    int32_t type, format, ins;
    _Atomic int32_t next; /* the first panel that nobody has taken */
    Barrier barrier;
} Packing;

/* The format that holds a type's groups as they are; FORMATS for a type of numbers. */
static int format_of(int type) {
    switch (type) {
    case T_Q4_0:
    case T_Q4_1:
    case T_Q4_K: return Q4;
    case T_Q5_0:
    case T_Q5_1:
    case T_Q5_K: return Q5;
    case T_Q6_K: return Q6;
    case T_Q8_0:
    case T_IQ4_NL: return Q8;
    default: return FORMATS;
    }
}

static int clipped(float x, int low, int high) {
    const float q = __builtin_rintf(x);
    return q >= (float)high ? high : q > (float)low ? (int)q : low; /* NaN: low */
}

/* Quantises a group. Q8: from minus to plus the largest magnitude. Q4: from the minimum to the maximum. NaN and
 * infinity make the scale not finite, which the products hand on. */
static void quantise(int format, const float *x, Group *to) {
    float low = x[0], high = x[0], bad = 0;
    for (int i = 0; i < GROUP; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        bad += x[i] * 0;
    }
    const float range = format == Q8 ? (high > -low ? high : -low) / 127 : (high - low) / 15;
    to->scale = narrow_half(range + bad);
    to->other = narrow_half(low);
    const float scale = float_of_half(to->scale), inverse = scale != 0 ? 1 / scale : 0;
    const float least = format == Q8 ? 0 : float_of_half(to->other);
    for (int i = 0; i < GROUP; i++) {
        const float q = (x[i] - least) * inverse;
        to->q[i] = (uint8_t)(format == Q8 ? clipped(q, -127, 127) : clipped(q, 0, 15));
    }
}

/* Stores output o of a group of a quantised format. */
static void put_group(int format, uint8_t *panel, int o, const Group *from) {
    uint32_t quad[8];
    memcpy(quad, from->q, GROUP);
    for (int i = 0; i < 8; i++) {
        if (format == Q8) {
            memcpy(panel + (i * W + o) * 4, quad + i, 4);
            continue;
        }
        if (i % 2 == 0) {
            const uint32_t both = (quad[i] & 0x0f0f0f0f) | (quad[i + 1] & 0x0f0f0f0f) << 4;
            memcpy(panel + (i / 2 * W + o) * 4, &both, 4);
        }
    }
    const int bits = high_bits(format), quads = bits ? 8 / bits : 1;
    for (int i = 0; bits && i < 8; i += quads) {
        uint32_t high = 0;
        for (int k = 0; k < quads; k++) high |= (quad[i + k] >> 4 & (format == Q5 ? 0x01010101 : 0x03030303)) << k * bits;
        memcpy(panel + (16 + i / quads * 4) * W + o * 4, &high, 4);
    }
    uint16_t *end = (void *)(panel + end_of(format));
    end[o] = from->scale;
    if (format != Q8) end[W + o] = from->other;
}

/* Stores output o of a group of numbers. */
static void put_floats(int format, uint8_t *panel, int o, const float *x) {
    for (int i = 0; i < GROUP; i++) {
        const uint16_t half = format == F16 ? narrow_half(x[i]) : narrow_bf16(x[i]);
        if (format == F32) memcpy(panel + (i * W + o) * 4, x + i, 4);
        else if (format == BF16 && PAIRS) memcpy(panel + (i / 2 * W + o) * 4 + i % 2 * 2, &half, 2);
        else memcpy(panel + (i * W + o) * 2, &half, 2);
    }
}

static void pack_output(const Packing *p, int64_t out) {
    const int groups = p->ins / GROUP;
    const size_t size = group_bytes(p->format);
    const uint8_t *row = p->rows + (size_t)(out - p->first) * row_bytes(p->type, p->ins);
    uint8_t *panel = p->out + (size_t)(out / W) * groups * size;
    const int o = (int)(out % W);
    for (int g = 0; g < groups; g++, panel += size) {
        Group group;
        float x[GROUP];
        if (p->format == format_of(p->type)) {
            read_group(p->type, row, g, &group);
            put_group(p->format, panel, o, &group);
            continue;
        }
        read_floats(p->type, row, g, x);
        if (p->format == Q8 || p->format == Q4) {
            quantise(p->format, x, &group);
            put_group(p->format, panel, o, &group);
        } else put_floats(p->format, panel, o, x);
    }
}

static void run(void *argument, int thread, int threads) {
    Packing *p = argument;
    (void)thread, (void)threads;
    const int64_t begin = p->first / W, end = (p->first + p->outs - 1) / W + 1;
    for (int64_t panel; (panel = begin + atomic_fetch_add(&p->next, 1)) < end;)
        for (int64_t out = panel * W; out < (panel + 1) * W; out++)
            if (out >= p->first && out < p->first + p->outs) pack_output(p, out);
}

/* Packs rows of a type, [outs, ins] in whole rows, as the outputs from `first` on of a matrix in a format: the one
 * that holds the type, or BF16, F16, F32, Q8 or Q4. out: room for whole pairs of panels, zeroed. Returns 0 for what cannot
 * be. */
EXPORT int selfdraft_pack(int type, int format, const void *rows, int64_t outs, int ins, int64_t first, uint8_t *out,
                          int threads) {
    const int can = format == format_of(type) || format == F32 || format == F16 || format == BF16 || format == Q8 ||
                    format == Q4;
    if (!row_bytes(type, ins) || ins % GROUP || !can || outs < 1) return 0;
    Packing p = {.rows = rows, .out = out, .outs = outs, .first = first, .type = type, .format = format, .ins = ins};
    pool_run(run, &p, threads, &p.barrier);
    return 1;
}

/* Bytes of a row of weights of a type; 0 for one that is not known. */
EXPORT int64_t selfdraft_row_bytes(int type, int ins) { return (int64_t)row_bytes(type, ins); }

EXPORT int64_t selfdraft_packed_bytes(int format, int64_t outs, int ins) {
    const int64_t panels = (outs + 2 * W - 1) / (2 * W) * 2;
    return panels * (ins / GROUP) * (int64_t)group_bytes(format);
}
