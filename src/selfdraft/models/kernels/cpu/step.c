/* The step. Threads go through the same sequence of stages, with a barrier between each two; within a stage they
 * take pieces of work from a counter. What a piece computes does not depend on who computes it. */
#include "step.h"

#include "blocks.h"
#include "products.h"
#include "unpack.h"

#include <time.h>

enum { STAGES_PER_LAYER = 9, MAX_STAGES = 2048 };

typedef struct {
    const Model *model;
    const Memory *memory;
    const Batch *batch;
    const Work *work;
    const Adapter *adapter;  /* or none */
    const int32_t *previous; /* [wanted] tokens that the sampler head sees, or none */
    Barrier barrier;
    _Atomic int32_t next[MAX_STAGES]; /* by stage: the first piece that nobody has taken */
} Step;

/* ---- Pieces of work. */

INLINE int take(Step *s, int stage, int pieces) {
    return atomic_fetch_add_explicit(&s->next[stage], pieces, memory_order_relaxed);
}

INLINE int panels_of(const Matrix *m) { return (m->outs + 2 * W - 1) / (2 * W) * 2; }

static void multiply(Step *s, int stage, int threads, const Matrix *m, int rows, float *y, size_t ldy) {
    y += m->at;
    const int panels = panels_of(m);
    int piece = panels / (threads * 8) / 2 * 2;
    if (piece < 2) piece = 2;
    for (int first; (first = take(s, stage, piece)) < panels;) {
        const int last = first + piece < panels ? first + piece : panels;
        product(m, first, last, &s->work->inputs, rows, y, ldy);
        if (m->bias)
            for (int r = 0; r < rows; r++)
                for (int i = first * W; i < last * W; i += W)
                    store(y + r * ldy + i, load(y + r * ldy + i) + load(m->bias + i));
    }
}

/* Stores a row as inputs of matrices. A row that is not finite is marked, and goes on as zeros: 8-bit rounding would hide
 * it otherwise. */
INLINE void prepare(Step *s, float *x, const Matrix *m, int parts, int row, int flag) {
    if (!is_finite(x, m->ins)) {
        s->work->finite[flag] = 0;
        memset(x, 0, (size_t)m->ins * 4);
    }
    for (int i = 0; i < parts && m[i].outs; i++)
        if (i == 0 || form_of(m[i].format) != form_of(m[i - 1].format)) pack(x, m->ins, m[i].format, &s->work->inputs, row);
}

/* ---- Mask rows: what an adapter adds to a layer's products, from the same inputs, before and after them. */

enum { QKV, OUT = 3, GATE_UP, DOWN = 6 }; /* where a layer's products begin in `low_rank` */

static void project(const LowRank *m, const float *x, float *low) {
    if (m->wide == 2) project_wide(2, m, x, low);
    else project_wide(4, m, x, low);
}

static void add_projected(const LowRank *m, const float *low, float *y) {
    if (m->wide == 2) add_wide(2, m, low, y);
    else add_wide(4, m, low, y);
}

INLINE const LowRank *low_rank_of(const Step *s, int layer, int first, int row) {
    if (!s->adapter || !s->adapter->low_rank || s->batch->token[row] >= 0) return NULL;
    return s->adapter->low_rank + (size_t)layer * PRODUCTS + first;
}
INLINE float *low_of(const Step *s, int row, int part) { return s->work->low + ((size_t)row * 3 + part) * s->work->rank; }

INLINE void project_all(const Step *s, int layer, int first, int parts, int row, const float *x) {
    const LowRank *m = low_rank_of(s, layer, first, row);
    for (int i = 0; m && i < parts; i++)
        if (m[i].rank) project(m + i, x, low_of(s, row, i));
}

INLINE void add_all(const Step *s, int layer, int first, int parts, int row, float *y) {
    const LowRank *m = low_rank_of(s, layer, first, row);
    for (int i = 0; m && i < parts; i++)
        if (m[i].rank) add_projected(m + i, low_of(s, row, i), y + m[i].at);
}

/* ---- Hidden states. */

INLINE void embed(const Model *m, int32_t token, float scale, float *x) {
    const uint8_t *from = m->embedding + (size_t)token * row_bytes(m->embedding_type, m->hidden);
    for (int g = 0; g < m->hidden / GROUP; g++) read_floats(m->embedding_type, from, g, x + g * GROUP);
    if (scale != 1)
        for (int i = 0; i < m->hidden; i++) x[i] *= scale;
}

INLINE void begin(const Step *s, int row) {
    const Model *m = s->model;
    const int32_t token = s->batch->token[row];
    float *x = s->work->hidden + (size_t)row * m->hidden;
    if (token >= 0) embed(m, token, m->embedding_scale, x);
    else memcpy(x, s->adapter->embeddings + (size_t)(-1 - token) * m->hidden, (size_t)m->hidden * 4);
}

/* Adds the output of a part of a layer to a row. */
INLINE void add_change(const Step *s, int row, const float *norm) {
    const Model *m = s->model;
    float *x = s->work->hidden + (size_t)row * m->hidden, *y = s->work->change + (size_t)row * m->hidden;
    if (norm) rms_norm(y, norm, m->hidden, m->eps, y);
    for (int i = 0; i < m->hidden; i += W) store(x + i, muladd(load(y + i), splat(m->residual_scale), load(x + i)));
}

INLINE void normalise(const Step *s, const float *norm, int row, float *to) {
    const Model *m = s->model;
    const float *x = s->work->hidden + (size_t)row * m->hidden;
    if (norm) rms_norm(x, norm, m->hidden, m->eps, to);
    else memcpy(to, x, (size_t)m->hidden * 4);
}

/* Normalises a row of hidden states into the inputs of a layer's products. */
INLINE void enter(Step *s, const float *norm, int layer, int first, int row, float *scratch) {
    const Layer *l = s->model->layers + layer;
    const int parts = first == QKV ? 3 : 2;
    normalise(s, norm, row, scratch);
    prepare(s, scratch, first == QKV ? l->qkv : l->gate_up, parts, row, row);
    project_all(s, layer, first, parts, row, scratch);
}

/* Norms and rotates the heads of a row, and stores its key and value. */
static void place(Step *s, const Layer *layer, int index, int row) {
    const Model *m = s->model;
    const Batch *b = s->batch;
    const int size = m->head_size, kv = m->key_heads;
    const int wide = (m->heads + 2 * kv) * size;
    float *qkv = s->work->qkv + (size_t)row * wide;
    add_all(s, index, QKV, 3, row, qkv);
    if (!is_finite(qkv, wide)) s->work->finite[row] = 0;
    if (!s->work->finite[row]) /* nor shall be a row that sees its key and value */
        for (int i = 0; i < wide; i += W) store(qkv + i, splat(__builtin_nanf("")));
    if (m->joint_norms) {
        float *keys = qkv + (size_t)m->heads * size;
        rms_norm(qkv, layer->query_norm, m->heads * size, m->eps, qkv);
        rms_norm(keys, layer->key_norm, kv * size, m->eps, keys);
    }
    for (int h = 0; h < m->heads + kv; h++) {
        float *head = qkv + (size_t)h * size;
        const float *norm = h < m->heads ? layer->query_norm : layer->key_norm;
        if (norm && !m->joint_norms) rms_norm(head, norm, size, m->eps, head);
        if (layer->angles) rotate(head, m->rotated, layer->angles + (size_t)b->position[row] * m->rotated);
    }
    const int slot = b->slot[row], lane = slot % PAGE;
    const int32_t page = b->tables[(size_t)b->request[row] * b->table_width + slot / PAGE];
    for (int h = 0; h < kv; h++) {
        const float *key = qkv + (size_t)(m->heads + h) * size, *value = key + (size_t)kv * size;
        const size_t layer_at = page * s->memory->page_bytes + index * s->memory->layer_bytes;
        const size_t at = layer_at / m->wide + (size_t)h * size * PAGE;
        for (int i = 0; i < size; i++) {
            if (m->wide == 2) {
                ((uint16_t *)s->memory->keys)[at + (size_t)i * PAGE + lane] = narrow_bf16(key[i]);
                ((uint16_t *)s->memory->values)[at + (size_t)lane * size + i] = narrow_bf16(value[i]);
            } else {
                ((float *)s->memory->keys)[at + (size_t)i * PAGE + lane] = key[i];
                ((float *)s->memory->values)[at + (size_t)lane * size + i] = value[i];
            }
        }
    }
}

/* ---- Attention: blocks of rows times key heads; where those are few, times partitions too. Mask rows see an adapter's
 * soft prefix in partitions of its own, before the others. */

typedef struct {
    const int32_t *above[BLOCK_ROWS];
    int32_t above_count[BLOCK_ROWS], prefix_seen[BLOCK_ROWS], none[BLOCK_ROWS];
    const float *query[BLOCK_ROWS];
    float *out[BLOCK_ROWS];
    Block block, prefix; /* the same rows, before keys of the text and before those of the prefix */
    int32_t start;                           /* the first row */
    int32_t prefix_parts, first_part, parts; /* partitions: of the prefix; the first of the text; of both together */
} Rows;

/* One layer's attention over the text, and over the prefix. */
typedef struct { Attention text, prefix; } Kinds;

static void gather(const Step *s, const Kinds *kinds, int index, Rows *rows) {
    const Model *m = s->model;
    const Batch *b = s->batch;
    const int first = b->block[index], count = b->block[index + 1] - first, prefix = s->adapter ? s->adapter->prefix : 0;
    rows->start = first;
    rows->prefix_parts = 0;
    for (int i = 0; i < count; i++) {
        const int row = first + i;
        rows->above[i] = b->above + b->above_start[row];
        rows->above_count[i] = b->above_start[row + 1] - b->above_start[row];
        rows->query[i] = s->work->qkv + (size_t)row * (m->heads + 2 * m->key_heads) * m->head_size;
        rows->out[i] = s->work->attended + (size_t)row * m->heads * m->head_size;
        rows->none[i] = 0;
        rows->prefix_seen[i] = b->token[row] < 0 ? prefix : 0;
        if (rows->prefix_seen[i]) rows->prefix_parts = (prefix + PART - 1) / PART;
    }
    rows->block = (Block){b->tables + (size_t)b->request[first] * b->table_width, b->seen + first, rows->above,
                          rows->above_count, rows->query, count};
    if (rows->prefix_parts)
        rows->prefix = (Block){s->adapter->prefix_table, rows->prefix_seen, rows->above, rows->none, rows->query, count};
    rows->first_part = first_partition(&kinds->text, &rows->block);
    rows->parts = rows->prefix_parts + last_partition(&rows->block) - rows->first_part + 1;
}

/* One partition of one key head, to part[query]. Rows with a score that is no finite number are marked. */
static void attend_part(const Step *s, const Kinds *kinds, const Rows *rows, int head, int p, Scratch *scratch,
                        Partial *part) {
    uint8_t ok[BLOCK_ROWS];
    memset(ok, 1, sizeof ok);
    if (p < rows->prefix_parts) attend_partition(&kinds->prefix, &rows->prefix, head, p * PART, scratch, part, ok);
    else attend_partition(&kinds->text, &rows->block, head, (rows->first_part + p - rows->prefix_parts) * PART, scratch, part, ok);
    for (int i = 0; i < rows->block.count; i++)
        if (!ok[i]) s->work->finite[rows->start + i] = 0;
}

static void attend(Step *s, int stage, int thread, int threads, const Layer *layer, int index) {
    const Model *m = s->model;
    const Batch *b = s->batch;
    const Work *w = s->work;
    const size_t at = (size_t)index * s->memory->layer_bytes;
    Kinds kinds = {.text = {(const char *)s->memory->keys + at, (const char *)s->memory->values + at,
                            s->memory->page_bytes, m->wide, m->heads, m->key_heads, m->head_size, layer->window,
                            m->attention_scale, m->attention_cap}};
    kinds.prefix = kinds.text;
    if (s->adapter && s->adapter->prefix) {
        const size_t before = (size_t)index * s->adapter->prefix_layer_bytes;
        kinds.prefix.keys = (const char *)s->adapter->prefix_keys + before;
        kinds.prefix.values = (const char *)s->adapter->prefix_values + before;
        kinds.prefix.page_bytes = (int64_t)m->key_heads * m->head_size * PAGE * m->wide;
        kinds.prefix.window = 0;
    }
    const int queries = BLOCK_ROWS * (m->heads / m->key_heads);
    const size_t floats = (size_t)queries * (m->head_size + 2);
    Scratch *scratch = w->scratch + thread;
    Rows rows;
    int parts = 0, most = 1; /* of all blocks; of one block */
    for (int i = 0; i < b->blocks; i++) {
        gather(s, &kinds, i, &rows);
        parts += rows.parts;
        if (rows.parts > most) most = rows.parts;
    }
    const int split = most > 1 && threads > 1 && b->blocks * m->key_heads < 4 * threads &&
                      (int64_t)(parts * m->key_heads * floats) <= w->partial_floats;
    if (!split) {
        for (int piece; (piece = take(s, stage, 1)) < b->blocks * m->key_heads;) {
            const int head = piece % m->key_heads;
            gather(s, &kinds, piece / m->key_heads, &rows);
            Partial merged[MAX_QUERIES], part[MAX_QUERIES];
            const int n = rows.block.count * (m->heads / m->key_heads);
            for (int q = 0; q < n; q++) {
                merged[q] = (Partial){0, 0, scratch->merged[q]};
                part[q] = (Partial){0, 0, scratch->values[q]};
            }
            for (int p = 0; p < rows.parts; p++) {
                attend_part(s, &kinds, &rows, head, p, scratch, part);
                merge_all(merged, part, n, m->head_size);
            }
            finish(&kinds.text, &rows.block, head, merged, rows.out);
        }
        barrier(&s->barrier);
        return;
    }
    /* [partition of all blocks][key head]: queries of (maximum, total), then their values */
    for (int piece; (piece = take(s, stage, 1)) < parts * m->key_heads;) {
        int p = piece / m->key_heads;
        for (int block = 0;; block++) {
            gather(s, &kinds, block, &rows);
            if (p < rows.parts) break;
            p -= rows.parts;
        }
        Partial part[MAX_QUERIES];
        float *to = w->partials + piece * floats;
        const int n = rows.block.count * (m->heads / m->key_heads);
        for (int q = 0; q < n; q++) part[q] = (Partial){0, 0, to + 2 * queries + (size_t)q * m->head_size};
        attend_part(s, &kinds, &rows, piece % m->key_heads, p, scratch, part);
        for (int q = 0; q < n; q++) to[2 * q] = part[q].most, to[2 * q + 1] = part[q].total;
    }
    barrier(&s->barrier);
    for (int piece; (piece = take(s, stage + 1, 1)) < b->blocks * m->key_heads;) {
        const int head = piece % m->key_heads;
        int before = 0;
        for (int i = 0; i < piece / m->key_heads; i++) {
            gather(s, &kinds, i, &rows);
            before += rows.parts;
        }
        gather(s, &kinds, piece / m->key_heads, &rows);
        const int n = rows.block.count * (m->heads / m->key_heads);
        Partial merged[MAX_QUERIES], part[MAX_QUERIES];
        for (int q = 0; q < n; q++) merged[q] = (Partial){0, 0, scratch->merged[q]};
        for (int p = 0; p < rows.parts; p++) {
            float *from = w->partials + ((size_t)(before + p) * m->key_heads + head) * floats;
            for (int q = 0; q < n; q++)
                part[q] = (Partial){from[2 * q], from[2 * q + 1], from + 2 * queries + (size_t)q * m->head_size};
            merge_all(merged, part, n, m->head_size);
        }
        finish(&kinds.text, &rows.block, head, merged, rows.out);
    }
    barrier(&s->barrier);
}

/* ---- Logits. */

/* Scales and caps logits. False if one is not finite, which the cap would hide. */
INLINE int cap_logits(const Model *m, float *x, int n) {
    const int finite = is_finite(x, n);
    if (m->logit_scale == 1 && m->logit_cap == 0) return finite;
    for (int i = 0; i < n; i += W) {
        vf y = load(x + i) * splat(m->logit_scale);
        if (m->logit_cap > 0) y = muladd(splat(2 * m->logit_cap), sigmoid(y * splat(2 / m->logit_cap)), splat(-m->logit_cap));
        store(x + i, y);
    }
    return finite;
}

/* The first of the largest logits. */
static int32_t pick(const float *logits, int n) {
    const int whole = n / W * W;
    vf most = splat(-__builtin_inff());
    for (int i = 0; i < whole; i += W) most = max(most, load(logits + i));
    float best = largest(most);
    for (int i = whole; i < n; i++) best = logits[i] > best ? logits[i] : best;
    int i = 0;
    for (vf target = splat(best); i < whole; i += W) {
        vi equal = load(logits + i) == target;
        if (sum(float_of(equal)) != 0.0f) break;
    }
    while (i < n && logits[i] != best) i++;
    return i < n ? i : -1;
}

/* The sampler head: brings the token before the one that a mask predicts into its hidden state x, which has room behind
 * it (Samragh et al., arXiv 2507.11851, 3.2). Both at root mean square 1, as their sizes differ. */
INLINE void condition(const Step *s, int32_t token, float *x) {
    const int hidden = s->model->hidden;
    const LowRank *m = &s->adapter->sampler;
    float *both = x + hidden, *low = both + 2 * hidden;
    embed(s->model, token, s->adapter->embedding_scale, both + hidden);
    rms_norm(x, NULL, hidden, 1e-6f, both);
    rms_norm(both + hidden, NULL, hidden, 1e-6f, both + hidden);
    project(m, both, low);
    for (int i = 0; i < m->rank; i += W) store(low + i, load(low + i) * sigmoid(load(low + i)));
    add_projected(m, low, x);
}

/* Logits and picks of the rows of the batch that are wanted. */
static void read_out(Step *s, int stage, int thread, int threads) {
    const Model *m = s->model;
    const Batch *b = s->batch;
    const Work *w = s->work;
    const size_t padded = (size_t)panels_of(&m->head) * W;
    float *scratch = w->scratch[thread].row;
    for (int k = thread; k < b->wanted; k += threads) {
        normalise(s, m->final_norm, b->want[k], scratch);
        if (s->previous) condition(s, s->previous[k], scratch);
        prepare(s, scratch, &m->head, 1, k, b->want[k]);
    }
    barrier(&s->barrier);
    multiply(s, stage, threads, &m->head, b->wanted, w->logits, padded);
    barrier(&s->barrier);
    for (int k = thread; k < b->wanted; k += threads) {
        float *logits = w->logits + k * padded;
        if (!cap_logits(m, logits, (int)padded)) w->finite[b->want[k]] = 0;
        if (w->pick) w->pick[k] = w->finite[b->want[k]] ? pick(logits, m->vocabulary) : -1;
    }
}

/* ---- The sampler head on a shortlist. A call of the output layer for each mask in turn would read all its weights as
 * often; so one call gives the logits of all masks without that head, which then only corrects the likeliest. */

/* Lets the token at i sink in a heap whose first has the smallest of their logits. */
static void sink(const float *logits, int32_t *heap, int n, int i) {
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && logits[heap[child + 1]] < logits[heap[child]]) child++;
        if (!(logits[heap[child]] < logits[heap[i]])) return;
        const int32_t token = heap[i];
        heap[i] = heap[child];
        heap[child] = token;
    }
}

/* The n tokens with the largest logits, in no order. */
static void likeliest(const float *logits, int vocabulary, int n, int32_t *heap) {
    for (int i = 0; i < n; i++) heap[i] = i;
    for (int i = n / 2; i-- > 0;) sink(logits, heap, n, i);
    for (int i = n; i < vocabulary; i += W) {
        const int end = i + W < vocabulary ? i + W : vocabulary;
        if (end == i + W && !(logits[heap[0]] < largest(load(logits + i)))) continue;
        for (int k = i; k < end; k++)
            if (logits[heap[0]] < logits[k]) heap[0] = k, sink(logits, heap, n, 0);
    }
}

/* Brings the token before the one that a mask row of the last step predicts into its n largest logits; the others become
 * minus infinity. */
EXPORT void selfdraft_shortlist(const Model *model, const Work *work, const Adapter *adapter, int row, int32_t previous,
                                int n, float *logits) {
    const Step s = {.model = model, .work = work, .adapter = adapter};
    int32_t tokens[MAX_SHORTLIST];
    float corrected[MAX_SHORTLIST] = {0}, *x = work->scratch[0].row, *weights = x + model->hidden;
    likeliest(logits, model->vocabulary, n, tokens);
    normalise(&s, model->final_norm, row, x);
    condition(&s, previous, x);
    for (int k = 0; k < n; k++) {
        unpack_output(&model->head, tokens[k], weights);
        vf total = splat(0);
        for (int i = 0; i < model->hidden; i += W) total = muladd(load(x + i), load(weights + i), total);
        corrected[k] = sum(total);
    }
    cap_logits(model, corrected, MAX_SHORTLIST);
    for (int i = 0; i < model->vocabulary; i++) logits[i] = -__builtin_inff();
    for (int k = 0; k < n; k++) logits[tokens[k]] = corrected[k];
}

/* ---- The sequence of stages. */

static void run(void *argument, int thread, int threads) {
    Step *s = argument;
    const Model *m = s->model;
    const Batch *b = s->batch;
    const Work *w = s->work;
    const int rows = b->rows, attended = m->heads * m->head_size, wide = (m->heads + 2 * m->key_heads) * m->head_size;
    float *scratch = w->scratch[thread].row;
    int stage = 0;
    for (int r = thread; r < rows; r += threads) {
        begin(s, r);
        enter(s, m->layers->attention_norm, 0, QKV, r, scratch);
    }
    for (int i = 0; i < m->count; i++) {
        const Layer *layer = m->layers + i;
        barrier(&s->barrier);
        for (int p = 0; p < 3; p++) multiply(s, stage++, threads, layer->qkv + p, rows, w->qkv, wide);
        barrier(&s->barrier);
        for (int r = thread; r < rows; r += threads) place(s, layer, i, r);
        barrier(&s->barrier);
        attend(s, stage, thread, threads, layer, i);
        stage += 2;
        for (int r = thread; r < rows; r += threads) {
            float *x = w->attended + (size_t)r * attended;
            prepare(s, x, &layer->out, 1, r, r);
            project_all(s, i, OUT, 1, r, x);
        }
        barrier(&s->barrier);
        multiply(s, stage++, threads, &layer->out, rows, w->change, m->hidden);
        barrier(&s->barrier);
        for (int r = thread; r < rows; r += threads) {
            add_all(s, i, OUT, 1, r, w->change + (size_t)r * m->hidden);
            add_change(s, r, layer->after_attention);
            enter(s, layer->mlp_norm, i, GATE_UP, r, scratch);
        }
        barrier(&s->barrier);
        for (int p = 0; p < 2; p++)
            multiply(s, stage++, threads, layer->gate_up + p, rows, w->inner, 2 * (size_t)m->inner);
        barrier(&s->barrier);
        for (int r = thread; r < rows; r += threads) {
            float *gate = w->inner + (size_t)r * 2 * m->inner;
            add_all(s, i, GATE_UP, 2, r, gate);
            gated(m->activation, gate, gate + m->inner, m->inner, gate);
            prepare(s, gate, &layer->down, 1, r, r);
            project_all(s, i, DOWN, 1, r, gate);
        }
        barrier(&s->barrier);
        multiply(s, stage++, threads, &layer->down, rows, w->change, m->hidden);
        barrier(&s->barrier);
        for (int r = thread; r < rows; r += threads) {
            add_all(s, i, DOWN, 1, r, w->change + (size_t)r * m->hidden);
            add_change(s, r, layer->after_mlp);
            if (i + 1 < m->count) enter(s, layer[1].attention_norm, i + 1, QKV, r, scratch);
        }
    }
    barrier(&s->barrier);
    for (int r = thread; r < rows; r += threads)
        if (!is_finite(w->hidden + (size_t)r * m->hidden, m->hidden)) w->finite[r] = 0;
    read_out(s, stage, thread, threads);
}

/* Runs a batch through the model, with an adapter at work on its mask rows or none; returns the number of threads that
 * did, or -1 for a model of too many layers. */
EXPORT int selfdraft_step(const Model *model, const Memory *memory, const Batch *batch, const Work *work,
                          const Adapter *adapter, int threads) {
    static _Thread_local Step s;
    if (model->count * STAGES_PER_LAYER + 1 > MAX_STAGES) return -1;
    s.model = model;
    s.memory = memory;
    s.batch = batch;
    s.work = work;
    s.adapter = adapter;
    s.previous = NULL;
    memset(s.next, 0, sizeof s.next);
    memset(work->finite, 1, (size_t)batch->rows);
    return pool_run(run, &s, threads, &s.barrier);
}

static void run_read_out(void *argument, int thread, int threads) { read_out(argument, 0, thread, threads); }

/* Logits and picks of other rows of the last step. previous: tokens that the adapter's sampler head sees, or none. */
EXPORT int selfdraft_logits(const Model *model, const Work *work, const Adapter *adapter, int wanted, const int32_t *want,
                            const int32_t *previous, int threads) {
    static _Thread_local Step s;
    const Batch batch = {.wanted = wanted, .want = want};
    s.model = model;
    s.batch = &batch;
    s.work = work;
    s.adapter = adapter;
    s.previous = previous;
    memset(s.next, 0, sizeof *s.next);
    return pool_run(run_read_out, &s, threads, &s.barrier);
}

EXPORT int selfdraft_sizes(int what) {
    const int row_floats = (int)(sizeof ((Scratch *)0)->row / sizeof(float));
    const int sizes[] = {W, PAIRS, PAGE, PART, BLOCK_ROWS, MAX_QUERIES, TREE_SLOTS, (int)sizeof(Scratch),
                         (MAX_STAGES - 1) / STAGES_PER_LAYER, row_floats};
    return what < (int)(sizeof sizes / sizeof *sizes) ? sizes[what] : -1;
}
