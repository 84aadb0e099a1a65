/* Packed weights. A matrix of [outs, ins] is cut into panels of W outputs, and each panel into groups of 32
 * inputs, so that one vector holds the same input (or inputs) of W outputs. Bytes of one group of one panel:
 *
 *   BF16  32 * W * 2   with BF16 instructions [16 pairs][W][2], else [32][W]
 *   F16   32 * W * 2   [32][W]
 *   F32   32 * W * 4   [32][W]
 *   Q8    34 * W       [8 quads][W][4] int8, then W scales (half)
 *   Q4    20 * W       [4][W][4]: low nibbles quad 2i, high nibbles quad 2i + 1; then W scales, W minima (half)
 *   Q5    24 * W       nibbles as Q4; the fifth bits, [W][4], bit q for quad q; scales, minima
 *   Q6    28 * W       nibbles as Q4; the two bits above, [2][W][4], bits 2q and 2q + 1 for quads q and 4 + q;
 *                      scales of the first and the last 16 inputs
 *
 * A weight is q * scale + minimum with q from 0 to 15 (Q4) or 31 (Q5); (q - 32) * scale (Q6); q * scale (Q8). */
#ifndef SELFDRAFT_WEIGHTS_H
#define SELFDRAFT_WEIGHTS_H

#include "vector.h"

enum Format { BF16, F16, F32, Q8, Q4, Q5, Q6, FORMATS };

#if defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif

INLINE size_t group_bytes(int format) {
    static const int per_output[FORMATS] = {64, 64, 128, 34, 20, 24, 28};
    return (size_t)per_output[format] * W;
}

/* Bits of a weight above its nibble. */
INLINE int high_bits(int format) { return format == Q5 ? 1 : format == Q6 ? 2 : 0; }

/* Where the scales of a group begin. */
INLINE size_t end_of(int format) { return (size_t)(format == Q8 ? 32 : 16 + 4 * high_bits(format)) * W; }

/* A linear layer, or some of its outputs. data: panels one after another. bias: [outs] or none. at: where its
 * outputs begin among those of the layer. */
typedef struct {
    const uint8_t *data;
    const float *bias;
    int32_t format, outs, ins, at;
} Matrix;

INLINE size_t panel_bytes(const Matrix *m) { return (size_t)(m->ins / GROUP) * group_bytes(m->format); }

#if W == 16
enum { TILE = 8 }; /* rows that a product takes together: what the registers hold */
#else
enum { TILE = 4 };
#endif

/* Inputs of a product, in the form that the format wants: bfloat16 (BF16 with its instructions), float, or for
 * quantised weights whole numbers with a scale and the scaled sum of each group. These are of 8 bits, or of 16 where
 * there are low bytes: then 128 * byte + low byte, the low one from -64 to 64. Rows lie in tiles, [rows / TILE][groups]
 * [TILE][GROUP], so that one register and constants reach all rows of a tile. */
enum { SCALE, WHOLE, FIRST, SCALES = 4 }; /* scale; scale * sum of the group's numbers; of its first half's */
enum Form { HALVES, FLOATS, BYTES };
typedef struct {
    int8_t *bytes;
    int8_t *low;      /* or none */
    float *scales;    /* SCALES in place of GROUP values */
    float *floats;
    uint16_t *halves;
    int32_t groups, unused; /* of a row that the memory holds, whether or not a product uses all */
} Inputs;

INLINE int form_of(int format) { return format >= Q8 ? BYTES : format == BF16 && PAIRS ? HALVES : FLOATS; }

/* Which group of a row it is, counted as they lie in memory. */
INLINE size_t group_at(const Inputs *x, int row, int group) {
    return ((size_t)(row / TILE) * x->groups + group) * TILE + row % TILE;
}

#endif
