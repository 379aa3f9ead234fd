// The experts of a block in the decoder: routing, their products and the weighted sum, inside its parallel region.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "decode_math.h"
#include "decode_parts.h"
#include "grouped.h"

namespace qk {
namespace {

constexpr int MOST_TOP = 64;

// Working memory of one block's experts at a time. A slot is a pair of a token and an expert, sorted by expert.
class Mixture {
  public:
    // Everything that `run` needs for m tokens; nothing in it may throw.
    void reserve(const qk_mixture &x, int hidden, int64_t m, int compute);
    // out [m, hidden] from in [m, hidden], which is complete for every thread; so is out after it.
    void run(const Math &math, const qk_mixture &x, const float *in, int64_t hidden, int64_t m, int compute, float *out,
             Share share);

  private:
    void route(const qk_mixture &x, int64_t t);
    void plan(const qk_mixture &x, int64_t hidden, int64_t m, int compute);
    void choose(const Math &math, const qk_mixture &x, const float *in, int64_t hidden, int64_t m, int compute,
                Share share);
    void gate(const Math &math, const qk_mixture &x, int64_t m, Share share);
    void add_up(const qk_mixture &x, int64_t hidden, int64_t m, float *out, Share share);

    int64_t *rows() { return offsets_.data() + count_ + 1; }
    int64_t *slots() { return rows() + slot_count_; }

    Buffer logits_, weights_, switches_, gate_up_, gated_, out_, scratch_;
    std::vector<int64_t> index_, offsets_;        // index [m, top]; offsets [count + 1], rows [slots], slots [slots]
    std::vector<Product> inner_, outer_;          // gate and up of the experts that have slots, then the shared one's; down
    std::vector<int64_t> first_;                  // of each of `outer_`: its first slot
    int inner_count_ = 0, outer_count_ = 0, count_ = 0;
    int64_t slot_count_ = 0;
};

inline int own_compute(const qk_mixture &x, int models) { return x.compute < 0 ? models : x.compute; }
inline int64_t shared_width(const qk_mixture &x) { return absent(x.shared_gate) ? 0 : x.shared_gate.weight.n; }

// At least the scratch of m tokens, however experts share them: tiles pad the rows of each to less than twice as many.
inline size_t most_scratch(const Weight &w, int64_t m, int compute) {
    return size_t(m) * 2 * lines(scratch_bytes(w, 1, compute));
}

inline void Mixture::reserve(const qk_mixture &x, int hidden, int64_t m, int compute) {
    const int64_t slots = m * x.top, wide = shared_width(x);
    const int own = own_compute(x, compute);
    size_t before = most_scratch(x.gate_up[0], slots, own), behind = most_scratch(x.down[0], slots, own);
    if (wide) {
        before += lines(scratch_bytes(x.shared_gate.weight, m, compute_of(x.shared_gate, compute)));
        before += lines(scratch_bytes(x.shared_up.weight, m, compute_of(x.shared_up, compute)));
        behind += lines(scratch_bytes(x.shared_down.weight, m, compute_of(x.shared_down, compute)));
    }
    scratch_.reserve(before > behind ? before : behind);
    logits_.reserve(4 * m * x.count);
    weights_.reserve(4 * slots);
    switches_.reserve(4 * m);
    gate_up_.reserve(4 * 2 * (slots * x.intermediate + m * wide));
    gated_.reserve(4 * (slots * x.intermediate + m * wide));
    out_.reserve(4 * (slots + m) * hidden);
    const auto grow = [](auto &vector, size_t size) {
        if (vector.size() < size) vector.resize(size);
    };
    grow(index_, size_t(slots));
    grow(offsets_, size_t(x.count + 1 + 2 * slots));
    const size_t most = size_t(slots < x.count ? slots : x.count) + 1;
    grow(inner_, 2 * most);
    grow(outer_, most);
    grow(first_, most);
}

// The experts of token t and their weights, the largest first.
inline void Mixture::route(const qk_mixture &x, int64_t t) {
    const float *logits = logits_.floats() + t * x.count;
    float largest = logits[0];
    for (int e = 1; e < x.count; ++e) largest = logits[e] > largest ? logits[e] : largest;
    float total = 0, chosen = 0;
    for (int e = 0; e < x.count; ++e) total += std::exp(logits[e] - largest);
    int64_t *index = index_.data() + t * x.top;
    float *weights = weights_.floats() + t * x.top;
    for (int j = 0; j < x.top; ++j) {
        int best = -1;
        for (int e = 0; e < x.count; ++e) {
            bool taken = false;
            for (int i = 0; i < j; ++i) taken |= index[i] == e;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        index[j] = best;
        weights[j] = std::exp(logits[best] - largest) / total;
        chosen += weights[j];
    }
    if (x.normalise)
        for (int j = 0; j < x.top; ++j) weights[j] /= chosen;
}

// The products of the experts that tokens chose. A single token is prepared once for all that read it.
inline void Mixture::plan(const qk_mixture &x, int64_t hidden, int64_t m, int compute) {
    count_ = x.count, slot_count_ = m * x.top;
    sort_by_expert(index_.data(), m, x.top, x.count, offsets_.data(), rows(), slots());
    const int own = own_compute(x, compute);
    const int64_t width = x.intermediate, wide = shared_width(x);
    char *before = scratch_.bytes(), *behind = before;
    inner_count_ = outer_count_ = 0;
    for (int e = 0; e < x.count; ++e) {
        const int64_t first = offsets_[e], own_slots = offsets_[e + 1] - first;
        if (!own_slots) continue;
        float *both = gate_up_.floats() + first * 2 * width;
        for (int r = 0; r < 2; ++r)
            inner_[inner_count_++] = {&x.gate_up[2 * e + r], own, own_slots, before,
                                      reinterpret_cast<char *>(both + r * width), 2 * width};
        first_[outer_count_] = first;
        outer_[outer_count_++] = {&x.down[e], own, own_slots, behind,
                                  reinterpret_cast<char *>(out_.floats() + first * hidden), hidden};
        if (m > 1) before += lines(scratch_bytes(x.gate_up[2 * e], own_slots, own));
        behind += lines(scratch_bytes(x.down[e], own_slots, own));
    }
    if (!wide) return;
    if (m == 1) before += lines(scratch_bytes(x.gate_up[0], 1, own));
    float *both = gate_up_.floats() + slot_count_ * 2 * width;
    const qk_matrix *inner[] = {&x.shared_gate, &x.shared_up};
    for (int r = 0; r < 2; ++r) {
        const int its = compute_of(*inner[r], compute);
        inner_[inner_count_++] = {&inner[r]->weight, its, m, before, reinterpret_cast<char *>(both + r * wide), 2 * wide};
        before += lines(scratch_bytes(inner[r]->weight, m, its));
    }
    first_[outer_count_] = slot_count_;
    outer_[outer_count_++] = {&x.shared_down.weight, compute_of(x.shared_down, compute), m, behind,
                              reinterpret_cast<char *>(out_.floats() + slot_count_ * hidden), hidden};
}

// Router, plan and the prepared inputs of gate and up.
inline void Mixture::choose(const Math &math, const qk_mixture &x, const float *in, int64_t hidden, int64_t m,
                            int compute, Share share) {
    const Weight &router = x.router.weight;
    math.dense(router.units, x.router.dense, router.bias, hidden, in, hidden, m, logits_.floats(), x.count,
               share.first(x.count), share.last(x.count));
    if (!absent(x.shared_switch) && share.part == 0)
        math.dense(x.shared_switch.weight.units, x.shared_switch.dense, x.shared_switch.weight.bias, hidden, in, hidden,
                   m, switches_.floats(), 1, 0, 1);
    barrier();
    for (int64_t t = share.first(m); t < share.last(m); ++t) route(x, t);
    if (m > 1) barrier();
    if (share.part + 1 == share.parts) plan(x, hidden, m, compute);  // a single token is the last part's, too
    barrier();
    const int shared = absent(x.shared_gate) ? 0 : 2;
    for (int i = inner_count_ - shared; i < inner_count_; ++i)
        prepare_part(*inner_[i].weight, in, F32, hidden, m, inner_[i].compute, inner_[i].scratch, share.part, share.parts);
    if (m == 1) {
        prepare_part(*inner_[0].weight, in, F32, hidden, 1, inner_[0].compute, inner_[0].scratch, share.part, share.parts);
    } else {
        int i = 0;  // of the expert whose slots these are
        for (int64_t s = share.first(slot_count_); s < share.last(slot_count_); ++s) {
            while (s >= first_[i] + inner_[2 * i].m) ++i;
            prepare_token(inner_[2 * i], in + rows()[s] * hidden, F32, s - first_[i]);
        }
    }
    barrier();
}

// silu(gate) up of every slot, and that prepared for down.
inline void Mixture::gate(const Math &math, const qk_mixture &x, int64_t m, Share share) {
    const int64_t total = slot_count_ + (absent(x.shared_gate) ? 0 : m);
    int i = 0;
    for (int64_t s = share.first(total); s < share.last(total); ++s) {
        while (s >= first_[i] + outer_[i].m) ++i;
        const int64_t before = (s < slot_count_ ? s : slot_count_) * x.intermediate;  // numbers of the slots before it
        const int64_t width = outer_[i].weight->k, at = before + (s < slot_count_ ? 0 : s - slot_count_) * width;
        const float *both = gate_up_.floats() + 2 * at;
        float *to = gated_.floats() + at;
        math.swiglu(both, both + width, to, width);
        prepare_token(outer_[i], to, F32, s - first_[i]);
    }
    barrier();
}

// The weighted outputs of each token, in the order of its experts, and the shared one's.
inline void Mixture::add_up(const qk_mixture &x, int64_t hidden, int64_t m, float *out, Share share) {
    const int64_t c0 = m == 1 ? share.first(hidden / PAD) * PAD : 0;
    const int64_t c1 = m > 1 || share.part + 1 == share.parts ? hidden : share.last(hidden / PAD) * PAD;
    const int64_t t0 = m == 1 ? 0 : share.first(m), t1 = m == 1 ? 1 : share.last(m);
    for (int64_t t = t0; t < t1; ++t) {
        int64_t order[MOST_TOP];
        for (int j = 0; j < x.top; ++j) {  // sorted by slot
            int at = j;
            for (; at > 0 && slots()[order[at - 1]] > slots()[t * x.top + j]; --at) order[at] = order[at - 1];
            order[at] = t * x.top + j;
        }
        float *to = out + t * hidden;
        std::memset(to + c0, 0, sizeof(float) * size_t(c1 - c0));
        for (int j = 0; j < x.top; ++j) {
            const float weight = weights_.floats()[order[j]];
            const float *from = out_.floats() + slots()[order[j]] * hidden;
            for (int64_t c = c0; c < c1; ++c) to[c] += from[c] * weight;
        }
        if (absent(x.shared_gate)) continue;
        const float open = absent(x.shared_switch) ? 1.f : 1.f / (1.f + std::exp(-switches_.floats()[t]));
        const float *from = out_.floats() + (slot_count_ + t) * hidden;
        for (int64_t c = c0; c < c1; ++c) to[c] += from[c] * open;
    }
    barrier();
}

inline void Mixture::run(const Math &math, const qk_mixture &x, const float *in, int64_t hidden, int64_t m, int compute,
                         float *out, Share share) {
    choose(math, x, in, hidden, m, compute, share);
    run_products(inner_.data(), inner_count_, F32, share.part, share.parts);
    barrier();
    gate(math, x, m, share);
    run_products(outer_.data(), outer_count_, F32, share.part, share.parts);
    barrier();
    add_up(x, hidden, m, out, share);
}

// Whether a mixture's matrices are of the sizes that `Mixture` trusts.
inline bool sensible_mixture(const qk_mixture &x, int hidden, int compute) {
    if (x.count < 1 || x.top < 1 || x.top > x.count || x.top > MOST_TOP || x.intermediate < 1) return false;
    const auto dense = [&](const qk_matrix &a, int n) { return a.dense >= 0 && a.weight.n == n && a.weight.k == hidden; };
    const auto is = [](const Weight &w, int n, int k, int its) {
        return supported(w) && w.n == n && w.k == k && !(w.table && is_int8(its));
    };
    const int own = own_compute(x, compute);
    for (int e = 0; e < x.count; ++e) {
        for (int r = 0; r < 2; ++r) {
            const Weight &w = x.gate_up[2 * e + r];
            if (!is(w, x.intermediate, hidden, own) || !same_activations(w, x.gate_up[0])) return false;
        }
        if (!is(x.down[e], hidden, x.intermediate, own)) return false;
    }
    if (!dense(x.router, x.count) || (!absent(x.shared_switch) && !dense(x.shared_switch, 1))) return false;
    if (absent(x.shared_gate)) return absent(x.shared_up) && absent(x.shared_down);
    const int wide = x.shared_gate.weight.n;
    if (!packed(x.shared_gate) || !packed(x.shared_up) || !packed(x.shared_down)) return false;
    return is(x.shared_gate.weight, wide, hidden, compute_of(x.shared_gate, compute)) &&
           is(x.shared_up.weight, wide, hidden, compute_of(x.shared_up, compute)) &&
           is(x.shared_down.weight, hidden, wide, compute_of(x.shared_down, compute));
}

}  // namespace
}  // namespace qk
