/* One step: rows of tokens through the whole model, from embeddings to logits and picks. Python fills these
 * structures (`library.py` mirrors them); all arrays are its own. */
#ifndef SELFDRAFT_STEP_H
#define SELFDRAFT_STEP_H

#include "attention.h"
#include "threads.h"

typedef struct {
    Matrix qkv[3], out, gate_up[2], down; /* parts in formats of their own; one without outputs is not there */
    const float *attention_norm, *mlp_norm;           /* [hidden], before each part; or none */
    const float *after_attention, *after_mlp;         /* [hidden], on its output; or none */
    const float *query_norm, *key_norm;               /* of each head or of all together, see Model; or none */
    const float *angles;                              /* [context][rotated]: cosines then sines; none: no rotation */
    int32_t window;                                   /* keys that a row sees, 0 for all */
    int32_t unused;
} Layer;

typedef struct {
    const Layer *layers;
    Matrix head;
    const float *final_norm;
    const uint8_t *embedding;   /* [vocabulary] rows as the checkpoint has them, see blocks.h */
    int32_t embedding_type;     /* ggml's number of their type */
    int32_t count, hidden, heads, key_heads, head_size, rotated, inner, vocabulary, activation;
    float eps, attention_scale, attention_cap, embedding_scale, residual_scale, logit_scale, logit_cap;
    int32_t wide;               /* bytes of a value in the KV cache */
    int32_t joint_norms;        /* query and key norms are over all heads together */
} Model;

/* Keys and values: pages of all layers, [pages][layers][key heads][...]; see attention.h. */
typedef struct {
    void *keys, *values;
    int64_t layer_bytes, page_bytes; /* from one layer, one page to the next */
} Memory;

/* What an adapter adds to a model for the rows of mask tokens alone. Parts that it has not are none or 0. */
typedef struct {
    const LowRank *low_rank;     /* [layers][PRODUCTS], in the order of a layer's matrices; or none */
    const float *embeddings;     /* [masks][hidden] */
    const void *prefix_keys;     /* keys that mask rows see before the history, [layers][pages][key heads][...] */
    const void *prefix_values;
    const int32_t *prefix_table; /* their pages: 0, 1, .. */
    int64_t prefix_layer_bytes;  /* from one layer to the next */
    LowRank sampler;             /* the sampler head: ins is 2 * hidden, outs hidden; without a rank: none */
    int32_t prefix;              /* keys of each layer */
    float embedding_scale;       /* of the tokens that the sampler head sees */
} Adapter;

enum { PRODUCTS = 7, MAX_SHORTLIST = 512 /* tokens that a sampler head corrects */ };

typedef struct {
    int32_t rows, wanted, table_width, blocks;
    const int32_t *token;       /* [rows] id; -1 - i: mask token i of the adapter */
    const int32_t *position;    /* [rows] */
    const int32_t *request;     /* [rows] */
    const int32_t *slot;        /* [rows] where its key and value go in the request's pages */
    const int32_t *seen;        /* [rows] history keys that it sees */
    const int32_t *above;       /* slots of the ancestors of all rows, one row after another */
    const int32_t *above_start; /* [rows + 1] */
    const int32_t *tables;      /* [requests][table_width] page numbers */
    const int32_t *block;       /* [blocks + 1] first row of each block of attention */
    const int32_t *want;        /* [wanted] rows whose logits are wanted */
} Batch;

/* Scratch and results. */
typedef struct {
    float *hidden;    /* [rows][hidden] */
    float *qkv;       /* [rows][(heads + 2 * key heads) * size] */
    float *attended;  /* [rows][heads * size] */
    float *inner;     /* [rows][2 * inner] */
    float *change;    /* [rows][hidden] output of a part */
    float *low;       /* [rows][3][rank] inputs of an adapter's products, projected */
    float *logits;    /* [wanted][vocabulary], the vocabulary padded to whole pairs of panels */
    int32_t *pick;    /* [wanted] likeliest token, -1 where a row is not finite; or none */
    uint8_t *finite;  /* [rows] */
    Inputs inputs;    /* for the widest product */
    Scratch *scratch; /* [threads] */
    float *partials;  /* [partial_floats] for partitions that threads share */
    int64_t partial_floats;
    int32_t rank, unused; /* the largest of the adapter's products */
} Work;

#endif
