// One decoder step in native code: plain tables in, logits out. It knows no model family and no Python.
//
// M tokens per call: 1 is a decode step, more is a chunk of the prompt (causal inside the chunk). Activations
// are fp32 throughout. Every pointer in the tables must stay valid as long as a decoder made from them.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "quantkit_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

// y = x W^T + bias, W [n, k]. dense < 0: `weight` as the kernels take it; else `weight.units` points at n rows
// of k floats of type `dense` (qk::Type), of which only units, bias, n and k count. compute: qk::Compute of x where it
// is not the model's, else -1.
typedef struct {
    qk_weight weight;
    int32_t dense, compute;
} qk_matrix;

// y = x / sqrt(mean(x^2) + eps) * weight; weight null: no norm.
typedef struct {
    const float *weight;
    float eps;
} qk_norm;

// The experts of a block: the `top` largest of softmax(router x), divided by their sum if `normalise`, weight the outputs
// down(silu(gate x) * up x) of theirs, to which sigmoid(switch x) times the same of a shared expert is added. The weights
// of the experts have one k and n each and read the same activations.
typedef struct {
    const qk_weight *gate_up;  // [count][2]: gate and up of every expert, [intermediate, hidden]
    const qk_weight *down;     // [count]: [hidden, intermediate]
    qk_matrix router;          // dense, [count, hidden]
    qk_matrix shared_gate, shared_up, shared_down;  // packed; absent without a shared expert
    qk_matrix shared_switch;                        // dense, [1, hidden]; absent: the shared expert counts as it is
    int32_t count, top;   // top: at most 64
    int32_t normalise, intermediate;
    int32_t compute;      // of the experts where it is not the model's, else -1
} qk_mixture;

// x += o(attention(rope(norm(q x), norm(k x), v x))), x += down(silu(gate x) * up x), each of the normed x.
typedef struct {
    qk_norm input, post;     // [hidden], before attention and before the MLP
    qk_norm q_norm, k_norm;  // [head_dim], per head before rotary, or of all heads together
    qk_matrix q, k, v;       // q may hold the rows of all three; then k.weight.n = v.weight.n = 0
    qk_matrix o;
    qk_matrix gate, up;      // gate may hold the rows of both; then up.weight.n = 0
    qk_matrix down;
    const float *k_scales, *v_scales;  // [kv_heads] of an FP8 cache, which divides by them; else null
    int32_t window;          // a token sees itself and the window - 1 before it; 0: all
    float scale;             // of q k^T
    int32_t whole_norms;     // whether q_norm and k_norm go over all heads together
    const qk_mixture *mixture;  // in place of gate, up and down; or null
} qk_layer;

typedef struct {
    const qk_layer *layers;
    qk_matrix embedding;  // dense, [vocabulary, hidden]
    qk_matrix head;       // [vocabulary, hidden]
    qk_norm final;
    int32_t layer_count, hidden, intermediate;
    int32_t heads, kv_heads, head_dim;
    int32_t rotary_dim;  // even; dimensions from here on are not rotated
    int32_t compute;     // qk::Compute of the packed matrices
    int32_t cache_type;  // qk::Cache
    int32_t rotate;      // whether queries and keys are multiplied by a Hadamard matrix; head_dim is a power of two
    int32_t sinks;       // so many first tokens stay exact in a cache of integers; at most a page (128)
} qk_model;

typedef struct qk_decoder qk_decoder;

// One sequence: its cache and buffers. The layer table is copied. Null: out of memory or tables that make no
// sense. Different decoders may run at the same time on the same tables, one decoder only by one at a time.
qk_decoder *qk_decoder_new(const qk_model *model);
void qk_decoder_free(qk_decoder *decoder);

// Append m tokens. cos, sin: [m, rotary_dim], of their positions. logits: [keep, vocabulary], of the last
// `keep` <= m tokens. Returns 0; 1 for an argument out of range, 2 out of memory (nothing was appended).
int qk_decoder_step(qk_decoder *decoder, const int64_t *tokens, int64_t m, const float *cos, const float *sin,
                    int64_t keep, float *logits, int threads);

// Append one token to each of `count` different sequences over the same tables, of one compute and cache, as if each
// were alone: the weights are read once for all, and every sequence attends to its own cache. tokens: [count]; cos, sin:
// [count, rotary_dim]; logits: [count, vocabulary]. Results are those of `count` single steps, bit for bit, but for
// weights stored by NF4 and FP8 tables, whose sums go in another order. Returns as above.
int qk_decoder_step_together(qk_decoder *const *decoders, int64_t count, const int64_t *tokens, const float *cos,
                             const float *sin, float *logits, int threads);

// From now on add the seconds of each part of a step that runs in this decoder's memory (its own, and steps together
// whose first it is) to seconds [5]: linears, experts, head, attention with rotary embedding and the cache, the rest.
// Null: no longer.
void qk_decoder_time(qk_decoder *decoder, double *seconds);

int64_t qk_decoder_length(const qk_decoder *decoder);                // tokens in the cache
int qk_decoder_truncate(qk_decoder *decoder, int64_t length);        // forget those after `length`; 0 = ok
size_t qk_decoder_cache_bytes(const qk_decoder *decoder);            // memory of the cache

#ifdef __cplusplus
}
#endif
