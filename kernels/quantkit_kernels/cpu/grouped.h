// Products with many weights, each on its own tokens, as the experts of a mixture need them: for native code that owns
// its parallel region.
#pragma once

#include "common.h"

namespace qk {

// y [m, n] = x [m, k] W^T + bias of tokens that lie side by side. scratch: the prepared activations, written by
// `prepare_token`, which other products may read too (`same_activations`).
struct Product {
    const Weight *weight;
    int compute;
    int64_t m;
    char *scratch;
    char *y;
    int64_t ldy;
};

// Prepare token t of a product, whose activations are x [k].
inline void prepare_token(const Product &p, const void *x, int x_type, int64_t t) {
    prepare_part(*p.weight, x, x_type, 0, p.m, p.compute, p.scratch, int(t), int(p.m));
}

// Part's share of all products: row blocks, each computed whole by one thread, in shares of about the same work.
void run_products(const Product *products, int count, int y_type, int part, int parts);

// Sort the (token, expert) pairs `index` [m, top] by expert, stable: slots offsets[e] .. offsets[e + 1] - 1 are those of
// expert e, slot s is of token rows[s], and pair i is in slot slots[i]. offsets [count + 1], rows and slots [m top].
void sort_by_expert(const int64_t *index, int64_t m, int top, int count, int64_t *offsets, int64_t *rows,
                    int64_t *slots);

}  // namespace qk
