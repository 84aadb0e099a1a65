/* Attention of the rows of one request over its pages, and its own rows above each.
 *
 * Keys are taken in logical order: the history (slots 0 to seen - 1 of the request, one after another), then the
 * row's ancestors in the tree and itself, the order that they will have in the cache once accepted. They are cut
 * into partitions of PART keys by their logical index, and each partition has its own maximum, sum and weighted
 * sum of values; these are merged in order. So a row's bits depend on its keys alone: not on the tree, the other
 * rows, the pages, or which thread ran a partition. Rows of a block share the loads of history keys and values.
 *
 * No value is read that its row does not see: 0 times a NaN is a NaN. */
#ifndef SELFDRAFT_ATTENTION_H
#define SELFDRAFT_ATTENTION_H

#include "rows.h"

enum {
    PAGE = 16,       /* keys of a page */
    PART = 256,      /* keys of a partition */
    BLOCK_ROWS = 8,  /* rows of a block, at most */
    MAX_QUERIES = 64 /* rows times heads per key head, of a block */
};

/* One kind of attention: what a layer reads and where. Strides are in values. */
typedef struct {
    const void *keys;   /* pages of [key head][size][PAGE] */
    const void *values; /* pages of [key head][PAGE][size] */
    int64_t page_bytes; /* from one page to the next */
    int32_t wide;       /* bytes of a value: 2 is bfloat16, 4 is float */
    int32_t heads, key_heads, size, window;
    float scale, cap; /* cap: scores become cap * tanh(score / cap); 0 for none */
} Attention;

/* The rows of a block: `count` rows of one request. */
typedef struct {
    const int32_t *pages;         /* the request's page table */
    const int32_t *seen;          /* [count] history keys that a row sees */
    const int32_t *const *above;  /* [count] slots of its ancestors and itself, where they are not history */
    const int32_t *above_count;   /* [count] */
    const float *const *query;    /* [count] its heads, [heads * size] */
    int32_t count;
} Block;

/* What a partition contributes to one query: maximum, sum, and values' weighted sum [size]. */
typedef struct { float most, total; float *values; } Partial;

INLINE const void *page_of(const void *memory, const Attention *a, int32_t page, int head) {
    return (const char *)memory + (size_t)page * a->page_bytes + (size_t)head * a->size * PAGE * a->wide;
}

/* Scores of `queries` queries and the keys of `pages` pages, [PAGE] for each. */
INLINE void score_pages(const int wide, const int queries, const int pages, const void *const *keys, int size,
                        const float *const *query, float *const *scores) {
    enum { PER_PAGE = PAGE / W };
    vf acc[8][2 * PER_PAGE];
    UNROLL for (int q = 0; q < queries; q++)
        UNROLL for (int v = 0; v < pages * PER_PAGE; v++) acc[q][v] = splat(0);
    for (int d = 0; d < size; d++) {
        vf key[2 * PER_PAGE];
        UNROLL for (int v = 0; v < pages * PER_PAGE; v++)
            key[v] = load_wide(keys[v / PER_PAGE], (size_t)d * PAGE + v % PER_PAGE * W, wide);
        UNROLL for (int q = 0; q < queries; q++)
            UNROLL for (int v = 0; v < pages * PER_PAGE; v++) acc[q][v] = muladd(key[v], splat(query[q][d]), acc[q][v]);
    }
    UNROLL for (int q = 0; q < queries; q++)
        UNROLL for (int v = 0; v < pages * PER_PAGE; v++) store(scores[q] + v * W, acc[q][v]);
}

#if W == 16
enum { SCORE_QUERIES = 8, VALUE_QUERIES = 4 };
#define SCORE_CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#else
enum { SCORE_QUERIES = 4, VALUE_QUERIES = 2 };
#define SCORE_CASES CASE(1) CASE(2) CASE(3) CASE(4)
#endif

/* Scores of all queries of a block and the pages [first, last) of the request, to scores[query][slot - start]. */
static void score(const Attention *a, int head, const int32_t *table, int first, int last, const float *const *query,
                  int queries, float *scores, int stride) {
    for (int p = first; p < last; p += 2) {
        const int pages = last - p < 2 ? 1 : 2;
        const void *keys[2] = {page_of(a->keys, a, table[p], head),
                               page_of(a->keys, a, table[pages == 2 ? p + 1 : p], head)};
        for (int q = 0; q < queries; q += SCORE_QUERIES) {
            float *out[SCORE_QUERIES];
            const int n = queries - q < SCORE_QUERIES ? queries - q : SCORE_QUERIES;
            for (int i = 0; i < n; i++) out[i] = scores + (size_t)(q + i) * stride + (p - first) * PAGE;
#define CASE(n)                                                                                    \
    case n:                                                                                        \
        if (pages == 2 && a->wide == 2) score_pages(2, n, 2, keys, a->size, query + q, out);       \
        else if (a->wide == 2) score_pages(2, n, 1, keys, a->size, query + q, out);                \
        else if (pages == 2) score_pages(4, n, 2, keys, a->size, query + q, out);                  \
        else score_pages(4, n, 1, keys, a->size, query + q, out);                                  \
        break;
            switch (n) { SCORE_CASES }
#undef CASE
        }
    }
}

enum { COLUMNS = 32 }; /* values of a head that a kernel keeps in registers */

/* Adds the values of the keys [from, to) of a partition, times their weights. weights[q][t], values from slot t0. */
INLINE void add_values(const int wide, const int queries, const Attention *a, int head, const int32_t *table, int t0,
                       int from, int to, const float *const *weights, float *const *out) {
    enum { VECTORS = COLUMNS / W };
    for (int c = 0; c < a->size; c += COLUMNS) {
        vf acc[4][VECTORS];
        UNROLL for (int q = 0; q < queries; q++)
            UNROLL for (int v = 0; v < VECTORS; v++) acc[q][v] = load(out[q] + c + v * W);
        for (int t = from; t < to; t++) {
            const void *page = page_of(a->values, a, table[t / PAGE], head);
            const size_t at = (size_t)(t % PAGE) * a->size + c;
            vf value[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++) value[v] = load_wide(page, at + v * W, wide);
            UNROLL for (int q = 0; q < queries; q++) {
                vf weight = splat(weights[q][t - t0]);
                UNROLL for (int v = 0; v < VECTORS; v++) acc[q][v] = muladd(value[v], weight, acc[q][v]);
            }
        }
        UNROLL for (int q = 0; q < queries; q++)
            UNROLL for (int v = 0; v < VECTORS; v++) store(out[q] + c + v * W, acc[q][v]);
    }
}

static void add_history(const Attention *a, int head, const int32_t *table, int t0, int from, int to,
                        const float *const *weights, float *const *out, int queries) {
    if (from >= to) return;
    if (a->wide == 2) {
        switch (queries) {
        case 1: add_values(2, 1, a, head, table, t0, from, to, weights, out); break;
        case 2: add_values(2, 2, a, head, table, t0, from, to, weights, out); break;
        case 3: add_values(2, 3, a, head, table, t0, from, to, weights, out); break;
        default: add_values(2, 4, a, head, table, t0, from, to, weights, out);
        }
    } else {
        switch (queries) {
        case 1: add_values(4, 1, a, head, table, t0, from, to, weights, out); break;
        case 2: add_values(4, 2, a, head, table, t0, from, to, weights, out); break;
        case 3: add_values(4, 3, a, head, table, t0, from, to, weights, out); break;
        default: add_values(4, 4, a, head, table, t0, from, to, weights, out);
        }
    }
}

INLINE void add_slot(const Attention *a, int head, const int32_t *table, int slot, float weight, float *out) {
    const void *page = page_of(a->values, a, table[slot / PAGE], head);
    for (int c = 0; c < a->size; c += W) {
        vf value = load_wide(page, (size_t)(slot % PAGE) * a->size + c, a->wide);
        store(out + c, muladd(value, splat(weight), load(out + c)));
    }
}

/* The lanes [from, to) of a vector, and another value in the others. */
INLINE vf only(vf v, int from, int to, float other) {
    float lane[W];
    store(lane, v);
    for (int k = 0; k < W; k++)
        if (k < from || k >= to) lane[k] = other;
    return load(lane);
}

/* Scores of one partition to weights exp(score - maximum), those outside of [from, to) to 0. False if a score in
 * there is not a finite number, which the cap would hide. */
INLINE int soften(const Attention *a, float *scores, int from, int to, Partial *part) {
    const float none = -__builtin_inff();
    const int first = from / W * W, end = (to + W - 1) / W * W;
    vf finite = splat(0), most = splat(none), total = splat(0);
    for (int i = first; i < end; i += W) {
        const int part_of_it = i < from || i + W > to;
        vf s = load(scores + i) * splat(a->scale);
        if (part_of_it) s = only(s, from - i, to - i, 0);
        finite = muladd(s, splat(0), finite);
        if (a->cap > 0) s = muladd(splat(2 * a->cap), sigmoid(s * splat(2 / a->cap)), splat(-a->cap)); /* tanh */
        if (part_of_it) s = only(s, from - i, to - i, none);
        most = max(most, s);
        store(scores + i, s);
    }
    part->most = largest(most);
    for (int i = first; i < end; i += W) {
        vf weight = exponential(load(scores + i) - splat(part->most));
        store(scores + i, weight);
        total += weight;
    }
    part->total = sum(total);
    return sum(finite) == 0.0f;
}

/* Takes a partition into what was merged before: running maximum, sum and values. The first one is copied. */
INLINE void merge(Partial *into, const Partial *part, int size, int first) {
    if (first) {
        into->most = part->most;
        into->total = part->total;
        memcpy(into->values, part->values, (size_t)size * 4);
        return;
    }
    const float most = into->most > part->most ? into->most : part->most;
    const vf old = exponential(splat(into->most - most)), new = exponential(splat(part->most - most));
    into->total = muladd(splat(into->total), old, splat(part->total) * new)[0];
    into->most = most;
    for (int c = 0; c < size; c += W)
        store(into->values + c, muladd(load(into->values + c), old, load(part->values + c) * new));
}

enum { TREE_SLOTS = 512 + 2 * PAGE }; /* slots of the rows of one tree */

typedef struct {
    float scores[MAX_QUERIES][PART];
    float tree[MAX_QUERIES][TREE_SLOTS];
    float values[MAX_QUERIES][512];
    float merged[MAX_QUERIES][512];
    float row[1 << 16]; /* hidden states of one row */
} Scratch;

/* Logical keys of a row, and the first that its window lets it see. */
INLINE int keys_of(const Block *b, int row) { return b->seen[row] + b->above_count[row]; }
INLINE int first_of(const Attention *a, const Block *b, int row) {
    const int keys = keys_of(b, row);
    return a->window > 0 && keys > a->window ? keys - a->window : 0;
}

/* One partition (keys t0 to t0 + PART - 1) of one key head for a block, to parts[query]: query = row * group + head
 * within the group. The partition has no keys of some rows: their total stays 0. Clears ok[row] of rows with a
 * score that is no finite number. */
static void attend_partition(const Attention *a, const Block *b, int head, int t0, Scratch *s, Partial *parts,
                             uint8_t *ok) {
    const int group = a->heads / a->key_heads, queries = b->count * group;
    const float *query[MAX_QUERIES] = {0};
    int from[MAX_QUERIES], history[MAX_QUERIES], to[MAX_QUERIES], longest = t0, lowest = INT32_MAX, highest = -1;
    for (int q = 0; q < queries; q++) {
        const int row = q / group, keys = keys_of(b, row), first = first_of(a, b, row);
        query[q] = b->query[row] + (size_t)(head * group + q % group) * a->size;
        from[q] = first > t0 ? first : t0;
        to[q] = keys < t0 + PART ? keys : t0 + PART;
        history[q] = b->seen[row] < to[q] ? b->seen[row] : to[q];
        if (history[q] > longest) longest = history[q];
        if (to[q] > b->seen[row] && to[q] > from[q] && q % group == 0) {
            const int n = b->above_count[row];
            if (b->above[row][0] < lowest) lowest = b->above[row][0];
            if (b->above[row][n - 1] > highest) highest = b->above[row][n - 1];
        }
    }
    score(a, head, b->pages, t0 / PAGE, (longest + PAGE - 1) / PAGE, query, queries, s->scores[0], PART);
    const int base = lowest / PAGE * PAGE;
    if (highest >= 0)
        score(a, head, b->pages, base / PAGE, highest / PAGE + 1, query, queries, s->tree[0], TREE_SLOTS);
    const float *weights[MAX_QUERIES];
    float *out[MAX_QUERIES];
    for (int q = 0; q < queries; q++) {
        const int row = q / group;
        weights[q] = s->scores[q];
        out[q] = parts[q].values;
        parts[q].total = 0;
        memset(out[q], 0, (size_t)a->size * 4);
        if (to[q] <= from[q]) {
            from[q] = to[q] = history[q] = t0;
            continue;
        }
        for (int t = history[q] > t0 ? history[q] : t0; t < to[q]; t++)
            s->scores[q][t - t0] = s->tree[q][b->above[row][t - b->seen[row]] - base];
        if (!soften(a, s->scores[q], from[q] - t0, to[q] - t0, &parts[q])) ok[row] = 0;
    }
    for (int q = 0; q < queries; q += VALUE_QUERIES) {
        const int n = queries - q < VALUE_QUERIES ? queries - q : VALUE_QUERIES;
        int start = t0, end = t0 + PART;
        for (int i = q; i < q + n; i++) {
            if (from[i] > start) start = from[i];
            if (history[i] < end) end = history[i];
        }
        if (end < start) end = start; /* nothing in common: each query on its own */
        for (int i = q; i < q + n; i++)
            add_history(a, head, b->pages, t0, from[i], start < history[i] ? start : history[i], weights + i, out + i, 1);
        add_history(a, head, b->pages, t0, start, end, weights + q, out + q, n);
        for (int i = q; i < q + n; i++) {
            const int row = i / group;
            add_history(a, head, b->pages, t0, end > from[i] ? end : from[i], history[i], weights + i, out + i, 1);
            int t = history[i] > from[i] ? history[i] : from[i];
            for (; t < to[i]; t++)
                add_slot(a, head, b->pages, b->above[row][t - b->seen[row]], weights[i][t - t0], out[i]);
        }
    }
}

/* Partitions of a block: from the first that one of its rows sees to the last. */
INLINE int first_partition(const Attention *a, const Block *b) {
    int first = INT32_MAX;
    for (int row = 0; row < b->count; row++) first = first_of(a, b, row) < first ? first_of(a, b, row) : first;
    return first / PART;
}
INLINE int last_partition(const Block *b) {
    int keys = 1;
    for (int row = 0; row < b->count; row++) keys = keys_of(b, row) > keys ? keys_of(b, row) : keys;
    return (keys - 1) / PART;
}

/* Merges a partition of all queries, in which merged[query].total is 0 until the first one. */
INLINE void merge_all(Partial *merged, const Partial *parts, int queries, int size) {
    for (int q = 0; q < queries; q++)
        if (parts[q].total > 0) merge(&merged[q], &parts[q], size, merged[q].total == 0);
}

/* The merged values over their sum, to the rows' outputs [heads * size]. */
INLINE void finish(const Attention *a, const Block *b, int head, const Partial *merged, float *const *out) {
    const int group = a->heads / a->key_heads;
    for (int q = 0; q < b->count * group; q++) {
        float *to = out[q / group] + (size_t)(head * group + q % group) * a->size;
        const vf inverse = splat(1.0f / merged[q].total);
        for (int c = 0; c < a->size; c += W) store(to + c, load(merged[q].values + c) * inverse);
    }
}

#endif
