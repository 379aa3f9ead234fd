// The decoder: a sequence's cache and buffers, and the step over all layers in one parallel region.
#include "decode.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "decode_math.h"
#include "decode_mixture.h"
#include "decode_parts.h"

namespace qk {
namespace {

// Matrices that read the same activations; their outputs lie side by side.
template <int COUNT>
struct Siblings {
    const qk_matrix *of[COUNT];

    // The first of the siblings whose prepared activations matrix i can use.
    int source(int i) const {
        for (int j = 0; j < i; j++) {
            const bool same = of[j]->compute == of[i]->compute && same_activations(of[j]->weight, of[i]->weight);
            if (packed(*of[j]) && same) return j;
        }
        return i;
    }
    int own(int i, int compute) const { return compute_of(*of[i], compute); }
    size_t scratch(int64_t m, int compute) const {
        size_t bytes = 0;
        for (int i = 0; i < COUNT; i++)
            if (packed(*of[i])) bytes += lines(scratch_bytes(of[i]->weight, m, own(i, compute)));
        return bytes;
    }
    // y [m, all n] = x [m, k] W^T + bias. x is complete for every thread; so is y after it.
    void run(const Math &math, const float *x, int64_t m, int compute, char *scratch, float *y, int64_t ldy,
             Share share) const {
        char *prepared[COUNT] = {};
        bool any = false;
        for (int i = 0; i < COUNT; i++) {
            if (!packed(*of[i])) continue;
            const Weight &w = of[i]->weight;
            const int from = source(i);
            prepared[i] = from < i ? prepared[from] : scratch;
            if (from < i) continue;
            prepare_part(w, x, F32, w.k, m, own(i, compute), scratch, share.part, share.parts);
            scratch += lines(scratch_bytes(w, m, own(i, compute)));
            any = true;
        }
        if (any) barrier();
        for (int i = 0; i < COUNT; i++) {
            const Weight &w = of[i]->weight;
            if (packed(*of[i]))
                run_part(w, prepared[i], m, own(i, compute), y, F32, ldy, share.part, share.parts);
            else if (!absent(*of[i]))
                math.dense(w.units, of[i]->dense, w.bias, w.k, x, w.k, m, y, ldy, share.first(w.n),
                           share.last(w.n));
            y += w.n;
        }
        barrier();
    }
};

}  // namespace
}  // namespace qk

using namespace qk;

struct qk_decoder {
    qk_model model;
    std::vector<qk_layer> layers;
    std::vector<char *> pages;  // PAGE positions of every layer each
    size_t layer_bytes = 0;     // of one page
    Buffer exact;               // of every layer and head its first positions
    int64_t length = 0;
    Buffer x, normed, branch, qkv, mixed, gate_up, gated, scratch, own;
    size_t own_bytes = 0;  // of one thread in `own`
    Mixture mixture;       // working memory of the experts of a block
    double *seconds = nullptr;  // [PART_COUNT], where the time of steps is added; or null

    explicit qk_decoder(const qk_model &tables)
        : model(tables), layers(tables.layers, tables.layers + tables.layer_count) {
        const size_t numbers = size_t(model.kv_heads) * PAGE * (model.head_dim + stride());
        const size_t scales = scaled_by_position(model.cache_type) ? 2 * sizeof(float) * model.kv_heads * PAGE : 0;
        layer_bytes = lines(numbers * cache_bits(model.cache_type) / 8 + scales);
        if (!model.sinks) return;
        exact.reserve(exact_bytes());
        std::memset(exact.bytes(), 0, exact_bytes());  // what is not written yet is read, times 0
    }
    ~qk_decoder() {
        for (char *page : pages) ::operator delete(page, std::align_val_t(LINE));
    }

    int stride() const { return (model.head_dim + PAD - 1) / PAD * PAD; }
    size_t exact_layer() const { return model.kv_heads * exact_floats(model.sinks, model.head_dim, stride()); }
    size_t exact_bytes() const { return sizeof(float) * layers.size() * exact_layer(); }
    int query_size() const { return model.heads * model.head_dim; }
    int kv_size() const { return model.kv_heads * model.head_dim; }
    int qkv_size() const { return query_size() + 2 * kv_size(); }

    void reserve(int64_t m, int64_t keep, int threads);
    void reserve_pages(int64_t m);
    bool shares_tables_with(const qk_decoder &other) const;
    void run(const Step &step, Share share);
    Attention over(const Span &span, const qk_layer &layer, size_t offset);
    void attention(const Math &math, const qk_layer &layer, size_t offset, const Step &step, Share share, Watch &watch);
    void mlp(const Math &math, const qk_layer &layer, int64_t m, Share share, Watch &watch);
    void norm(const Math &math, const qk_norm &norm, const float *add, int64_t first, int64_t m, Share share);
};

// Working memory of a step of m rows, before its parallel region, where nothing may throw.
void qk_decoder::reserve(int64_t m, int64_t keep, int threads) {
    x.reserve(4 * m * model.hidden);
    normed.reserve(4 * m * model.hidden);
    branch.reserve(4 * m * model.hidden);
    qkv.reserve(4 * m * qkv_size());
    mixed.reserve(4 * m * query_size());
    gate_up.reserve(4 * m * 2 * model.intermediate);
    gated.reserve(4 * m * model.intermediate);
    own_bytes = lines(4 * attention_floats(model.heads / model.kv_heads, model.head_dim, stride()));
    own.reserve(own_bytes * threads);

    size_t most = Siblings<1>{{&model.head}}.scratch(keep, model.compute);
    for (const qk_layer &l : layers) {
        if (l.mixture) mixture.reserve(*l.mixture, model.hidden, m, model.compute);
        for (size_t bytes : {Siblings<3>{{&l.q, &l.k, &l.v}}.scratch(m, model.compute),
                             Siblings<1>{{&l.o}}.scratch(m, model.compute),
                             Siblings<2>{{&l.gate, &l.up}}.scratch(m, model.compute),
                             Siblings<1>{{&l.down}}.scratch(m, model.compute)})
            if (bytes > most) most = bytes;
    }
    scratch.reserve(most);
}

// The pages of m more tokens.
void qk_decoder::reserve_pages(int64_t m) {
    const size_t bytes = layer_bytes * layers.size();
    while (int64_t(pages.size()) * PAGE < length + m) {
        pages.reserve(pages.size() + 1);
        pages.push_back(static_cast<char *>(::operator new(bytes, std::align_val_t(LINE))));
        std::memset(pages.back(), 0, bytes);  // what is not written yet is read, times 0
    }
}

// normed[i] = norm(x[first + i]) for i < m, after x += add.
void qk_decoder::norm(const Math &math, const qk_norm &norm, const float *add, int64_t first, int64_t m,
                      Share share) {
    const int64_t n = model.hidden;
    for (int64_t i = share.first(m); i < share.last(m); i++) {
        const int64_t row = (first + i) * n;
        math.add_norm(x.floats() + row, add ? add + row : add, norm.weight, norm.eps, normed.floats() + i * n, n);
    }
    barrier();
}

// Attention of a span's rows over its own cache.
Attention qk_decoder::over(const Span &span, const qk_layer &layer, size_t offset) {
    Attention a{};
    a.q = qkv.floats() + span.first * qkv_size(), a.ldq = qkv_size();
    a.out = mixed.floats() + span.first * query_size(), a.ldo = query_size();
    a.pages = span.of->pages.data(), a.offset = offset, a.type = model.cache_type;
    a.exact = span.of->exact.floats() + offset / layer_bytes * exact_layer(), a.sinks = model.sinks;
    a.k_scales = layer.k_scales, a.v_scales = layer.v_scales;
    a.kv_heads = model.kv_heads, a.group = model.heads / model.kv_heads, a.head_dim = model.head_dim;
    a.stride = stride();
    a.position = span.of->length, a.m = span.count, a.window = layer.window, a.scale = layer.scale;
    return a;
}

void qk_decoder::attention(const Math &math, const qk_layer &layer, size_t offset, const Step &step, Share share,
                           Watch &watch) {
    const int d = model.head_dim;
    const int64_t ld = qkv_size(), m = step.m;
    Siblings<3>{{&layer.q, &layer.k, &layer.v}}.run(math, normed.floats(), m, model.compute, scratch.bytes(),
                                                    qkv.floats(), ld, share);
    watch.lap(PART_LINEARS);
    if (layer.whole_norms) {
        for (int64_t t = share.first(m); t < share.last(m); t++) {
            float *q = qkv.floats() + t * ld, *k = q + query_size();
            math.add_norm(q, nullptr, layer.q_norm.weight, layer.q_norm.eps, q, query_size());
            math.add_norm(k, nullptr, layer.k_norm.weight, layer.k_norm.eps, k, kv_size());
        }
        barrier();
    }
    // Queries in place; keys in place and, with the values, into the cache. One head is one thread's.
    const int heads = model.heads + model.kv_heads;
    for (const Span *s = step.spans; s < step.spans + step.span_count; s++) {
        const Attention a = over(*s, layer, offset);
        for (int h = int(share.first(heads)); h < share.last(heads); h++) {
            const qk_norm &norm = h < model.heads ? layer.q_norm : layer.k_norm;
            for (int64_t i = 0; i < s->count; i++) {
                const int64_t t = s->first + i, angle = t * model.rotary_dim;
                float *head = qkv.floats() + t * ld + int64_t(h) * d;
                if (norm.weight && !layer.whole_norms) math.add_norm(head, nullptr, norm.weight, norm.eps, head, d);
                math.rotate(head, step.cos + angle, step.sin + angle, model.rotary_dim);
                if (model.rotate) math.hadamard(head, d);
                if (h >= model.heads) math.append(a, h - model.heads, a.position + i, head, head + kv_size());
            }
        }
    }
    barrier();
    float *of_thread = reinterpret_cast<float *>(own.bytes() + own_bytes * share.part);
    for (int i = 0; i < step.span_count; i++)  // another thread is first at each, so that all have as much to do
        math.attend(over(step.spans[i], layer, offset), of_thread, (share.part + i) % share.parts, share.parts);
    barrier();
    watch.lap(PART_ATTENTION);
    Siblings<1>{{&layer.o}}.run(math, mixed.floats(), m, model.compute, scratch.bytes(), branch.floats(),
                                model.hidden, share);
    watch.lap(PART_LINEARS);
}

void qk_decoder::mlp(const Math &math, const qk_layer &layer, int64_t m, Share share, Watch &watch) {
    const int64_t n = model.intermediate, ld = 2 * n;
    Siblings<2>{{&layer.gate, &layer.up}}.run(math, normed.floats(), m, model.compute, scratch.bytes(),
                                              gate_up.floats(), ld, share);
    watch.lap(PART_LINEARS);
    const int64_t first = share.first(n / PAD) * PAD;
    const int64_t last = share.part + 1 == share.parts ? n : share.last(n / PAD) * PAD;
    for (int64_t t = 0; t < m; t++) {
        const float *gate = gate_up.floats() + t * ld;
        math.swiglu(gate + first, gate + n + first, gated.floats() + t * n + first, last - first);
    }
    barrier();
    watch.lap(PART_REST);
    Siblings<1>{{&layer.down}}.run(math, gated.floats(), m, model.compute, scratch.bytes(), branch.floats(),
                                   model.hidden, share);
    watch.lap(PART_LINEARS);
}

void qk_decoder::run(const Step &step, Share share) {
    Math math = math_of(qk_isa());
    if (step.each) math.dense = math.dense_each;
    Watch watch(share.part == 0 ? seconds : nullptr);
    const int64_t n = model.hidden, m = step.m;
    const size_t value = model.embedding.dense == F32 ? 4 : 2;
    for (int64_t t = share.first(m); t < share.last(m); t++)
        math.widen(model.embedding.weight.units + value * n * step.tokens[t], model.embedding.dense,
                   x.floats() + t * n, n);
    const float *add = nullptr;  // what the last branch adds to x; the row's owner stays the same
    for (size_t i = 0; i < layers.size(); i++) {
        norm(math, layers[i].input, add, 0, m, share);
        watch.lap(PART_REST);
        attention(math, layers[i], i * layer_bytes, step, share, watch);
        add = branch.floats();
        norm(math, layers[i].post, add, 0, m, share);
        watch.lap(PART_REST);
        if (layers[i].mixture) {
            mixture.run(math, *layers[i].mixture, normed.floats(), model.hidden, m, model.compute, branch.floats(), share);
            watch.lap(PART_EXPERTS);
        } else {
            mlp(math, layers[i], m, share, watch);
        }
    }
    if (step.keep == 0) return;
    norm(math, model.final, add, m - step.keep, step.keep, share);
    watch.lap(PART_REST);
    Siblings<1>{{&model.head}}.run(math, normed.floats(), step.keep, model.compute, scratch.bytes(), step.logits,
                                   model.head.weight.n, share);
    watch.lap(PART_HEAD);
}

// Whether one step may go over rows of both.
bool qk_decoder::shares_tables_with(const qk_decoder &other) const {
    const qk_model &a = model, &b = other.model;
    return a.layers == b.layers && a.layer_count == b.layer_count && a.compute == b.compute &&
           a.cache_type == b.cache_type && a.rotate == b.rotate && a.sinks == b.sinks;
}

namespace {

bool sensible(const qk_model &m) {
    if (m.layer_count < 1 || m.heads <= 0 || m.kv_heads <= 0 || m.head_dim <= 0) return false;
    if (m.heads % m.kv_heads) return false;
    if (m.rotary_dim < 0 || m.rotary_dim % 2 || m.rotary_dim > m.head_dim) return false;
    const int type = m.cache_type;
    if (type != CACHE_F32 && type != CACHE_BF16 && type != CACHE_FP8 && !scaled_by_position(type)) return false;
    if (m.rotate && (m.head_dim & (m.head_dim - 1))) return false;
    if (m.sinks < 0 || m.sinks > PAGE || (m.sinks && !scaled_by_position(type))) return false;
    const auto is = [](const qk_matrix &matrix, int64_t n, int64_t k) {
        return matrix.weight.n == n && matrix.weight.k == k && (matrix.dense >= 0 || supported(matrix.weight));
    };
    const auto are = [&](const qk_matrix &first, int64_t n, const qk_matrix &second, int64_t more) {
        if (absent(second)) return is(first, n + more, m.hidden);
        return is(first, n, m.hidden) && is(second, more, m.hidden);
    };
    const int64_t query = int64_t(m.heads) * m.head_dim, kv = int64_t(m.kv_heads) * m.head_dim;
    for (int i = 0; i < m.layer_count; i++) {
        const qk_layer &l = m.layers[i];
        if (absent(l.k) != absent(l.v) || !are(l.q, query, l.k, absent(l.k) ? 2 * kv : kv)) return false;
        if (!absent(l.v) && !is(l.v, kv, m.hidden)) return false;
        if (!is(l.o, m.hidden, query)) return false;
        if (l.mixture) {
            if (!sensible_mixture(*l.mixture, m.hidden, m.compute)) return false;
        } else if (!are(l.gate, m.intermediate, l.up, m.intermediate) || !is(l.down, m.hidden, m.intermediate)) {
            return false;
        }
        if (l.whole_norms && !(l.q_norm.weight && l.k_norm.weight)) return false;
        if (l.window < 0) return false;
        if (type == CACHE_FP8 && !(l.k_scales && l.v_scales)) return false;
    }
    const int64_t vocabulary = m.head.weight.n;
    return m.embedding.dense >= 0 && is(m.embedding, vocabulary, m.hidden) && is(m.head, vocabulary, m.hidden);
}

// Run a step in the working memory of `decoder` and lengthen its sequences; 0, 1 or 2 as qk_decoder_step says.
int take(qk_decoder *decoder, const Step &step, int threads) {
    if (threads < 1 || qk_isa() < 0) return 1;
    for (int64_t t = 0; t < step.m; t++)
        if (step.tokens[t] < 0 || step.tokens[t] >= decoder->model.embedding.weight.n) return 1;
    try {
        decoder->reserve(step.m, step.keep, threads);
        for (int i = 0; i < step.span_count; i++) step.spans[i].of->reserve_pages(step.spans[i].count);
    } catch (const std::bad_alloc &) {
        return 2;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    decoder->run(step, {omp_get_thread_num(), omp_get_num_threads()});
#else
    decoder->run(step, {0, 1});
#endif
    for (int i = 0; i < step.span_count; i++) step.spans[i].of->length += step.spans[i].count;
    return 0;
}

}  // namespace

extern "C" {

qk_decoder *qk_decoder_new(const qk_model *model) {
    try {
        return sensible(*model) ? new qk_decoder(*model) : nullptr;
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

void qk_decoder_free(qk_decoder *decoder) { delete decoder; }

int qk_decoder_step(qk_decoder *decoder, const int64_t *tokens, int64_t m, const float *cos, const float *sin,
                    int64_t keep, float *logits, int threads) {
    if (m < 1 || keep < 0 || keep > m) return 1;
    const Span span = {decoder, 0, m};
    return take(decoder, {&span, 1, m, keep, tokens, cos, sin, logits, false}, threads);
}

int qk_decoder_step_together(qk_decoder *const *decoders, int64_t count, const int64_t *tokens, const float *cos,
                             const float *sin, float *logits, int threads) {
    if (count < 1 || count > MOST_TOGETHER) return 1;
    try {
        std::vector<qk_decoder *> sorted(decoders, decoders + count);
        std::sort(sorted.begin(), sorted.end(), std::less<qk_decoder *>());
        if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) return 1;
        std::vector<Span> spans;
        for (int64_t i = 0; i < count; i++) {
            if (!decoders[i]->shares_tables_with(*decoders[0])) return 1;
            spans.push_back({decoders[i], i, 1});
        }
        return take(decoders[0], {spans.data(), int(count), count, count, tokens, cos, sin, logits, true}, threads);
    } catch (const std::bad_alloc &) {
        return 2;
    }
}

void qk_decoder_time(qk_decoder *decoder, double *seconds) { decoder->seconds = seconds; }

int64_t qk_decoder_length(const qk_decoder *decoder) { return decoder->length; }

int qk_decoder_truncate(qk_decoder *decoder, int64_t length) {
    if (length < 0 || length > decoder->length) return 1;
    decoder->length = length;
    return 0;
}

size_t qk_decoder_cache_bytes(const qk_decoder *decoder) {
    return decoder->pages.size() * decoder->layer_bytes * decoder->layers.size() + decoder->exact_bytes();
}

}  // extern "C"
