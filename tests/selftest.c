/* The kernels against plain loops in double, in one program without Python: so they can be tested on a processor that
 * is only emulated (`make test-arm`). Prints the number of lanes, or what is wrong. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "pack.h"
#include "products.h"
#include "rows.h"

void selfdraft_pack(int, const void *, const uint16_t *, const uint16_t *, int64_t, int, int64_t, int64_t, uint8_t *);
int64_t selfdraft_packed_bytes(int, int64_t, int);
void selfdraft_noise(uint64_t, uint32_t, uint32_t, int, float *);

enum { OUTS = 96, INS = 128, ROWS = 11, ROOM = 16 };

static uint32_t state = 1;
static uint32_t dice(void) { return state = state * 1664525u + 1013904223u; }
static float uniform(void) { return (float)(dice() >> 8) / 8388608.0f - 1.0f; }

static float half_as_float(uint16_t h) { return ldexpf((float)((h & 1023) | 1024), (h >> 10 & 31) - 25); }

/* The inputs of a row as the product sees them. */
static double input(const Inputs *x, int format, int row, int i) {
    const size_t group = group_at(x, row, i / GROUP), at = group * GROUP + i % GROUP;
    if (format == BF16 && PAIRS) return float_of_bf16(x->halves[at]);
    if (format == BF16 || format == F32) return x->floats[at];
    return (double)x->bytes[at] * x->scales[group * SCALES + SCALE];
}

static int check(int format) {
    static int8_t bytes[ROOM * INS];
    static float scales[ROOM * INS / GROUP * SCALES], floats[ROOM * INS], y[ROWS][OUTS], alone[OUTS];
    static uint16_t halves[ROOM * INS], scale[OUTS * INS / GROUP], other[OUTS * INS / GROUP];
    static float real[OUTS * INS];
    static uint16_t bf16[OUTS * INS];
    static int8_t q[OUTS * INS];
    static double w[OUTS][INS];
    for (int i = 0; i < OUTS * INS / GROUP; i++) {
        scale[i] = (uint16_t)(0x2400 + dice() % 1024); /* about 1/64 */
        other[i] = (uint16_t)(0x2400 + dice() % 1024);
    }
    for (int i = 0; i < OUTS * INS; i++) {
        const double s = half_as_float(scale[i / GROUP]), t = half_as_float(other[i / GROUP]);
        real[i] = uniform();
        bf16[i] = narrow_bf16(real[i]);
        q[i] = (int8_t)(format == Q4 ? dice() % 16 : dice() % 255 - 127);
        w[i / INS][i % INS] = format == F32    ? real[i]
                              : format == BF16 ? float_of_bf16(bf16[i])
                              : format == Q4   ? q[i] * s + t
                              : format == Q6   ? q[i] * (i % GROUP < GROUP / 2 ? s : t)
                                               : q[i] * s;
    }
    const void *values = format == F32 ? (void *)real : format == BF16 ? (void *)bf16 : (void *)q;
    uint8_t *packed = calloc(1, (size_t)selfdraft_packed_bytes(format, OUTS, INS));
    selfdraft_pack(format, values, format >= Q8 ? scale : NULL, format == Q4 || format == Q6 ? other : NULL, OUTS, INS,
                   0, 1, packed);
    const Matrix m = {packed, NULL, format, OUTS, INS, 0};
    const Inputs x = {bytes, scales, floats, halves, INS / GROUP, 0};
    static float in[ROWS][INS], unpacked[INS];
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
            if (fabs(sum - y[r][o]) > 2e-5 * size + 1e-6) {
                printf("format %d, row %d, output %d: %g instead of %g\n", format, r, o, y[r][o], sum);
                return 1;
            }
        }
    for (int r = 0; r < ROWS; r++) { /* the same bits alone */
        pack(in[r], INS, format, &x, 0);
        product(&m, 0, OUTS / W, &x, 1, alone, OUTS);
        if (memcmp(alone, y[r], sizeof alone)) {
            printf("format %d: row %d has other bits alone\n", format, r);
            return 1;
        }
    }
    unpack_output(&m, 37, unpacked);
    for (int i = 0; i < INS; i++)
        if (fabs(unpacked[i] - w[37][i]) > 1e-5) {
            printf("format %d: weight %d unpacks to %g instead of %g\n", format, i, unpacked[i], w[37][i]);
            return 1;
        }
    free(packed);
    return 0;
}

int main(void) {
    static float noise[100000];
    double sum = 0;
    for (int format = 0; format < FORMATS; format++)
        if (check(format)) return 1;
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
