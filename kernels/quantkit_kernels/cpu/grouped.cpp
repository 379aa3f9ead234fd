// The share of each thread in many products, and one call for all experts of a mixture.
#include "grouped.h"

#include <omp.h>
#include <stdlib.h>

#include <new>
#include <vector>

namespace qk {
namespace {

// What a row block of a product costs, in multiples of a column's: reading it counts as much as four more tokens.
constexpr int64_t READING = 4;
int64_t block_cost(const Product &p) { return (p.m + READING) * chunks(*p.weight) * chunk(*p.weight); }

// The first row block whose cost begins at `at` or later, of blocks that cost `each` and begin at `start`.
int block_at(int64_t at, int64_t start, int64_t each, int blocks) {
    if (at <= start) return 0;
    const int64_t block = (at - start + each - 1) / each;
    return block < blocks ? int(block) : blocks;
}

}  // namespace

void run_products(const Product *products, int count, int y_type, int part, int parts) {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += block_cost(products[i]) * row_blocks(*products[i].weight);
    const int64_t from = total / parts * part + total % parts * part / parts;
    const int64_t to = total / parts * (part + 1) + total % parts * (part + 1) / parts;
    int64_t start = 0;
    for (int i = 0; i < count && start < to; ++i) {
        const Product &p = products[i];
        const int64_t each = block_cost(p);
        const int blocks = row_blocks(*p.weight);
        const int b0 = block_at(from, start, each, blocks), b1 = block_at(to, start, each, blocks);
        if (b0 < b1) run_blocks_of(*p.weight, p.scratch, p.m, p.y, y_type, p.ldy, b0, b1);
        start += each * blocks;
    }
}

void sort_by_expert(const int64_t *index, int64_t m, int top, int count, int64_t *offsets, int64_t *rows,
                    int64_t *slots) {
    for (int e = 0; e <= count; ++e) offsets[e] = 0;
    for (int64_t i = 0; i < m * top; ++i) ++offsets[index[i] + 1];
    for (int e = 0; e < count; ++e) offsets[e + 1] += offsets[e];
    for (int64_t i = 0; i < m * top; ++i) {  // offsets[e] moves to the end of e, which is the beginning of e + 1
        slots[i] = offsets[index[i]]++;
        rows[slots[i]] = i / top;
    }
    for (int e = count; e > 0; --e) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
}

namespace {

size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Activations of slots [first, first + m), as product `of` wants them, in scratch memory from byte `at` on.
struct Prepared {
    int of;
    int64_t first, m;
    size_t at;
};

// All products of a call, and what they read: from[i] is an index into `prepared`.
struct Plan {
    std::vector<Product> products;
    std::vector<int> from;
    std::vector<Prepared> prepared;
    size_t scratch = 0;
    int64_t tokens = 0, work = 0;  // tokens to prepare; multiplications
};

// Products of the experts that have slots. alike: all slots read the same row of x.
Plan plan_of(const qk_grouped &g, int compute, bool alike, char *y, int64_t value) {
    Plan plan;
    int64_t ldy = 0;
    for (int r = 0; r < g.each; ++r) ldy += g.weights[r].n;
    for (int e = 0; e < g.count; ++e) {
        const int64_t first = g.offsets[e], m = g.offsets[e + 1] - first;
        if (m <= 0) continue;
        char *to = y + first * ldy * value;
        const int mine = int(plan.prepared.size());
        for (int r = 0; r < g.each; ++r) {
            const Weight &w = g.weights[e * g.each + r];
            int from = alike ? 0 : mine;
            const int known = int(plan.prepared.size());
            while (from < known && !same_activations(w, *plan.products[plan.prepared[from].of].weight)) ++from;
            if (from == known) {
                plan.prepared.push_back({int(plan.products.size()), first, m, plan.scratch});
                plan.scratch += lines(scratch_bytes(w, m, compute));
                plan.tokens += m;
            }
            plan.products.push_back({&w, compute, m, nullptr, to, ldy});
            plan.from.push_back(from);
            plan.work += m * w.n * w.k;
            to += w.n * value;
        }
    }
    return plan;
}

// Part's share of the tokens to prepare; the columns of one are shared, too, where that is all there is.
void prepare_share(const qk_grouped &g, const Plan &plan, const void *x, int x_type, int part, int parts) {
    const int64_t row_bytes = int64_t(g.weights[0].k) * (x_type == F32 ? 4 : 2);
    const auto *from = static_cast<const char *>(x);
    const int64_t low = plan.tokens * part / parts, high = plan.tokens * (part + 1) / parts;
    int64_t at = 0;
    for (const Prepared &each : plan.prepared) {
        const Product &p = plan.products[each.of];
        if (plan.tokens == 1) {
            const char *row = from + g.rows[each.first] * row_bytes;
            prepare_part(*p.weight, row, x_type, 0, 1, p.compute, p.scratch, part, parts);
        }
        for (int64_t t = at < low ? low - at : 0; plan.tokens > 1 && t < each.m && at + t < high; ++t)
            prepare_token(p, from + g.rows[each.first + t] * row_bytes, x_type, t);
        at += each.m;
    }
}

bool takes(const qk_grouped &g, int compute) {
    if (compute < FLOAT || compute > FP8_GROUP || g.count < 1 || g.each < 1) return false;
    for (int i = 0; i < g.count * g.each; ++i) {
        const Weight &w = g.weights[i];
        if (!supported(w) || (w.table && is_int8(compute))) return false;
        if (w.k != g.weights[0].k || w.n != g.weights[i % g.each].n) return false;
    }
    return true;
}

bool in_range(const qk_grouped &g, int64_t m) {
    if (g.offsets[0] != 0 || g.offsets[g.count] != g.slots) return false;
    for (int e = 0; e < g.count; ++e)
        if (g.offsets[e] > g.offsets[e + 1]) return false;
    for (int64_t s = 0; s < g.slots; ++s)
        if (g.rows[s] < 0 || g.rows[s] >= m) return false;
    return true;
}

}  // namespace
}  // namespace qk

using namespace qk;

extern "C" int qk_grouped_linear(const qk_grouped *g, const void *x, int x_type, int64_t m, int compute, void *y,
                                 int y_type, int threads) {
    if (qk_isa() < 0 || !takes(*g, compute)) return 1;
    if (!in_range(*g, m)) return 3;
    try {
        Plan plan = plan_of(*g, compute, m == 1, static_cast<char *>(y), y_type == F32 ? 4 : 2);
        if (plan.products.empty()) return 0;
        void *scratch = nullptr;
        if (posix_memalign(&scratch, 64, plan.scratch)) return 2;
        for (size_t i = 0; i < plan.products.size(); ++i)
            plan.products[i].scratch = static_cast<char *>(scratch) + plan.prepared[plan.from[i]].at;
        const int count = int(plan.products.size());
        // Below some ten microseconds of work waking a second thread costs more than it gives.
        const int most = plan.work < (1 << 18) || threads < 1 ? 1 : threads;
        if (most == 1) {
            prepare_share(*g, plan, x, x_type, 0, 1);
            run_products(plan.products.data(), count, y_type, 0, 1);
        } else {
#pragma omp parallel num_threads(most)
            {
                const int part = omp_get_thread_num(), parts = omp_get_num_threads();
                prepare_share(*g, plan, x, x_type, part, parts);
#pragma omp barrier
                run_products(plan.products.data(), count, y_type, part, parts);
            }
        }
        free(scratch);
        return 0;
    } catch (const std::bad_alloc &) {
        return 2;
    }
}
