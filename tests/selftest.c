/* The kernels against plain loops in double, in one program without Python: so they can be tested on a processor that
 * is only emulated (`make test-arm`). Prints the number of lanes, or what is wrong. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "blocks.h"
#include "products.h"
#include "rows.h"

int selfdraft_pack(int, int, const void *, int64_t, int, int64_t, uint8_t *, int);
int64_t selfdraft_packed_bytes(int, int64_t, int);
void selfdraft_noise(uint64_t, uint32_t, uint32_t, int, float *);

enum { OUTS = 96, INS = 256, ROWS = 11, ROOM = 16 };

static uint32_t state = 1;
static uint32_t dice(void) { return state = state * 1664525u + 1013904223u; }
static float uniform(void) { return (float)(dice() >> 8) / 8388608.0f - 1.0f; }

static const struct { int type, format; } types[] = {
    {T_F32, F32}, {T_F16, F16}, {T_BF16, BF16}, {T_Q8_0, Q8}, {T_IQ4_NL, Q8}, {T_Q4_0, Q4}, {T_Q4_1, Q4},
    {T_Q4_K, Q4}, {T_Q5_0, Q5}, {T_Q5_1, Q5}, {T_Q5_K, Q5}, {T_Q6_K, Q6}};

/* A row of a type: random bytes whose halves are of a sound size. */
static void make_row(int type, uint8_t *row) {
    const int in_groups = type < T_Q4_K || type == T_IQ4_NL; /* else in blocks of 256 */
    const size_t size = row_bytes(type, INS), step = row_bytes(type, in_groups ? GROUP : 256);
    for (size_t i = 0; i < size; i++) row[i] = (uint8_t)(dice() >> 16);
    if (type == T_F32)
        for (int i = 0; i < INS; i++) { float x = uniform(); memcpy(row + 4 * i, &x, 4); }
    else if (type == T_F16 || type == T_BF16)
        for (int i = 0; i < INS; i++) {
            const uint16_t half = type == T_F16 ? narrow_half(uniform()) : narrow_bf16(uniform());
            memcpy(row + 2 * i, &half, 2);
        }
    else
        for (size_t at = 0; at < size; at += step)
            for (int i = 0; i < (type == T_Q4_0 || type == T_Q5_0 || type == T_Q8_0 || type >= T_Q6_K ? 1 : 2); i++) {
                const uint16_t half = narrow_half((1.5f + 0.5f * uniform()) / 64);
                memcpy(row + at + (type == T_Q6_K ? 208 : 2 * i), &half, 2);
            }
}

/* The inputs of a row as the product sees them. */
static double input(const Inputs *x, int format, int row, int i) {
    const size_t group = group_at(x, row, i / GROUP), at = group * GROUP + i % GROUP;
    if (form_of(format) == HALVES) return float_of_bf16(x->halves[at]);
    if (form_of(format) == FLOATS) return x->floats[at];
    return (x->low ? 128.0 * x->bytes[at] + x->low[at] : x->bytes[at]) * x->scales[group * SCALES + SCALE];
}

static int check(int type, int format, int wide) {
    static int8_t bytes[ROOM * INS], low[ROOM * INS];
    static float scales[ROOM * INS / GROUP * SCALES], floats[ROOM * INS], y[ROWS][OUTS], alone[OUTS], w[OUTS][INS];
    static uint16_t halves[ROOM * INS];
    static float in[ROWS][INS];
    uint8_t *rows = malloc(OUTS * row_bytes(type, INS));
    for (int o = 0; o < OUTS; o++) {
        make_row(type, rows + o * row_bytes(type, INS));
        for (int g = 0; g < INS / GROUP; g++) read_floats(type, rows + o * row_bytes(type, INS), g, w[o] + g * GROUP);
    }
    uint8_t *packed = calloc(1, (size_t)selfdraft_packed_bytes(format, OUTS, INS));
    if (!selfdraft_pack(type, format, rows, OUTS, INS, 0, packed, 1)) return 1;
    const Matrix m = {packed, NULL, format, OUTS, INS, 0};
    const Inputs x = {bytes, wide ? low : NULL, scales, floats, halves, INS / GROUP, 0};
    for (int r = 0; r < ROWS; r++) {
        for (int i = 0; i < INS; i++) in[r][i] = uniform();
        pack(in[r], INS, format, &x, r);
    }
    product(&m, 0, OUTS / W, &x, ROWS, y[0], OUTS);
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUTS; o++) {
            double sum = 0, size = 0;
            for (int i = 0; i < INS; i++) {
                sum += w[o][i] * input(&x, format, r, i);
                size += fabs(w[o][i] * input(&x, format, r, i));
            }
            if (!(fabs(sum - y[r][o]) <= 2e-5 * size + 1e-6)) {
                printf("type %d, wide %d, row %d, output %d: %g instead of %g\n", type, wide, r, o, y[r][o], sum);
                return 1;
            }
        }
    for (int r = 0; r < ROWS; r++) { /* the same bits alone */
        pack(in[r], INS, format, &x, 0);
        product(&m, 0, OUTS / W, &x, 1, alone, OUTS);
        if (memcmp(alone, y[r], sizeof alone)) {
            printf("type %d: row %d has other bits alone\n", type, r);
            return 1;
        }
    }
    free(packed), free(rows);
    return 0;
}

int main(void) {
    static float noise[100000];
    double sum = 0;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        for (int wide = 0; wide < 2; wide++)
            if (check(types[i].type, types[i].format, wide)) return 1;
    selfdraft_noise(7, 0, 3, 100000, noise);
    for (int i = 0; i < 100000; i++) sum += noise[i];
    if (fabs(sum / 100000 - 0.5772) > 0.02) { /* the mean of a Gumbel variable is Euler's constant */
        printf("noise has the mean %g\n", sum / 100000);
        return 1;
    }
    vf x = {-90, -1, 0, 2.5f};
    vf e = exponential(x);
    if (e[0] != 0 || fabs(e[1] - exp(-1)) > 1e-7 || e[2] != 1 || fabs(e[3] / exp(2.5) - 1) > 3e-7) {
        printf("exponential is wrong\n");
        return 1;
    }
    printf("%d lanes: all right\n", W);
    return 0;
}
