// Attention over pages of a quantized KV cache as transformers' path keeps it: keys and values lie token by token.
// Included once per path (decode_path.h), after decode_attention.h.

// What decode_simd.h does not have: E4M3 with its NaN, still over 256, and signed codes of 4 bits.
struct e4m3 {
    uint8_t bits;
};
struct s4 {  // two codes
    uint8_t bits;
};
inline const s4 *on(const s4 *p, int64_t count) { return p + count / 2; }

inline vf load(const e4m3 *p) {
    const vf x = load((const fp8 *)p);
    return (vf)((vu)x | (vu)((vu)x << 1 == 0x3ff00000u << 1));  // 480 / 256 is the NaN's place
}
inline vf load(const s4 *p) {
    return __builtin_convertvector((vi)(nibbles(p) << (28 - nibble_places())) >> 28, vf);
}

// Element i, for what is left over.
inline float lane(const float *p, int64_t i) { return p[i]; }
inline float lane(const i8 *p, int64_t i) { return p[i].code; }
inline float lane(const s4 *p, int64_t i) {
    const int code = p[i / 2].bits >> i % 2 * 4 & 15;
    return (float)((code ^ 8) - 8);
}
inline float lane(const e4m3 *p, int64_t i) {
    const int size = p[i].bits & 0x7f;
    f16 half = {(uint16_t)(size << 7)};
    const float x = size == 0x7f ? __builtin_nanf("") : one(&half);
    return p[i].bits & 0x80 ? -x : x;
}

#if defined(__clang__)
#define QK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define QK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
typedef float v4 __attribute__((vector_size(16)));
typedef float v4_at __attribute__((vector_size(16), aligned(4), may_alias));

// In every four lanes: two sums of neighbours in a, then two in b.
inline vf neighbours(vf a, vf b) {
#if LANES == 4
    return QK_SHUFFLE(a, b, 0, 2, 4, 6) + QK_SHUFFLE(a, b, 1, 3, 5, 7);
#elif LANES == 8
    return QK_SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + QK_SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
    return QK_SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           QK_SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#endif
}
#undef QK_SHUFFLE

// The sums of four vectors.
inline v4 sums_of_four(const vf *of) {
    const vf fours = neighbours(neighbours(of[0], of[1]), neighbours(of[2], of[3]));
    const v4_at *parts = (const v4_at *)&fours;
    v4 total = parts[0];
    for (int i = 1; i < LANES / 4; i++) total += parts[i];
    return total;
}

// scores[r * KV_BLOCK + p] = q[r] keys[p] for R rows and P places.
template <int R, int P, class T>
void dots(const float *q, const T *keys, int64_t d, float *scores) {
    vf acc[R][P] = {};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES)
        for (int p = 0; p < P; p++) {
            const vf key = load(on(keys, p * d + i));
            for (int r = 0; r < R; r++) acc[r][p] = fused(key, load(q + r * d + i), acc[r][p]);
        }
    for (int r = 0; r < R; r++) {
        float *to = scores + r * KV_BLOCK;
        if (P == 4)
            *(v4_at *)to = sums_of_four(acc[r]);
        else
            for (int p = 0; p < P; p++) to[p] = sum(acc[r][p]);
        for (int64_t j = i; j < d; j++)
            for (int p = 0; p < P; p++) to[p] += lane(keys, p * d + j) * q[r * d + j];
    }
}

template <int R, class T>
void dots_of_rows(const float *q, const T *keys, int64_t d, int count, float *scores) {
    int p = 0;
    for (; p + 4 <= count; p += 4) dots<R, 4>(q, on(keys, p * d), d, scores + p);
    for (; p < count; p++) dots<R, 1>(q, on(keys, p * d), d, scores + p);
}

template <class T>
void scores_of(const float *q, int rows, const T *keys, int64_t d, int count, float *scores) {
    int r = 0;
    for (; r + 3 <= rows; r += 3) dots_of_rows<3>(q + r * d, keys, d, count, scores + r * KV_BLOCK);
    if (rows - r == 2) dots_of_rows<2>(q + r * d, keys, d, count, scores + r * KV_BLOCK);
    if (rows - r == 1) dots_of_rows<1>(q + r * d, keys, d, count, scores + r * KV_BLOCK);
}

// out[r] += sum of p[r][i] values[i].
template <class T>
void add_values(const float *p, int rows, const T *values, int64_t d, int count, float *out) {
    const int whole = (int)d / LANES * LANES;
    combine_rows(rows, p, KV_BLOCK, values, (int)d, count, out, (int)d, whole);
    for (int64_t c = whole; c < d; c++)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < count; i++) out[r * d + c] += p[r * KV_BLOCK + i] * lane(values, i * d + c);
}

// What every code is multiplied by, but for scales of places: the stored scale, and 256 where FP8 is read without it.
inline float kv_factor(const qk_kv_side &side, int64_t head) {
    return (side.stored ? side.stored[head] : 1.0f) * (side.type == QK_KV_FP8 ? 256.0f : 1.0f);
}
inline const char *kv_codes(const qk_kv_side &side, int64_t page, int64_t place) {
    const int64_t bytes = side.type == QK_KV_INT4 ? side.dim / 2 : side.dim;
    return (const char *)side.codes[page] + place * bytes;
}
// [KV_BLOCK] scales of `count` places, times the factor; zero behind them.
inline void kv_scales(const qk_kv_side &side, int64_t page, int64_t place, int count, float factor, float *to) {
    for (int i = 0; i < KV_BLOCK; i++) to[i] = i >= count ? 0 : side.scales ? side.scales[page][place + i] * factor : factor;
}

inline vf cap(vf x, float most) {  // most tanh(x / most)
    const vf power = exponential(x * (2.0f / most));
    const vf capped = most - (2.0f * most) / (power + 1.0f);
    return (vf)((vi)capped | (x != x));  // NaN stays
}

// What a bool mask says of `count` places.
enum { NONE, SOME, ALL };
inline int seen_in(const uint8_t *mask, int count) {
    const uint64_t ones = 0x0101010101010101u;
    uint64_t any = 0, every = ones;
    int i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t word;
        __builtin_memcpy(&word, mask + i, 8);
        any |= word, every &= word;
    }
    for (; i < count; i++) any |= mask[i], every &= mask[i] == 1 ? ones : 0;
    return any == 0 ? NONE : every == ones ? ALL : SOME;
}

// Where the mask of a row's query begins, in its elements.
inline int64_t mask_place(const qk_kv_pages &a, int64_t batch, int64_t head, int64_t row, int64_t first) {
    const int64_t token = row % a.tokens, query_head = head * (a.rows / a.tokens) + row / a.tokens;
    return batch * a.mask_batch + query_head * a.mask_head + token * a.mask_token + first;
}

// Row `row` of a head under the mask, places [first, first + count); -inf behind them. False: it sees none of them.
inline bool under_mask(const qk_kv_pages &a, int64_t batch, int64_t head, int64_t row, int64_t first, int count,
                       float *scores) {
    const float none = -__builtin_inff();
    int seen = count;
    if (a.mask_type == QK_MASK_BOOL) {
        const uint8_t *mask = (const uint8_t *)a.mask + mask_place(a, batch, head, row, first);
        seen = seen_in(mask, count);
        if (seen == SOME)
            for (int i = 0; i < count; i++) scores[i] = mask[i] ? scores[i] : none;
    } else if (a.mask_type == QK_MASK_FP32) {
        const float *mask = (const float *)a.mask + mask_place(a, batch, head, row, first);
        for (int i = 0; i < count; i++) scores[i] += mask[i];
    } else {
        const int64_t high = a.position + row % a.tokens + 1 - first;
        seen = high < 0 ? 0 : high < count ? (int)high : count;
        for (int i = seen; i < count; i++) scores[i] = none;
    }
    for (int i = count; i < KV_BLOCK; i++) scores[i] = none;
    return seen > 0;
}

// Whether a row of [row, row + rows) sees one of the places: what nobody sees is not read.
inline bool anyone_sees(const qk_kv_pages &a, int64_t batch, int64_t head, int64_t row, int rows, int64_t first,
                        int count) {
    if (a.mask_type == QK_MASK_FP32) return true;
    for (int r = 0; r < rows; r++) {
        if (a.mask_type == QK_MASK_CAUSAL) {
            if (a.position + (row + r) % a.tokens >= first) return true;
        } else if (seen_in((const uint8_t *)a.mask + mask_place(a, batch, head, row + r, first), count)) {
            return true;
        }
    }
    return false;
}

// Scores [KV_BLOCK] become probabilities against the running maximum; out is scaled to it. A NaN or an infinity makes
// the mass NaN, and so the row.
inline void soften_row(float *scores, float &top, float &mass, float *out, int64_t d) {
    vf best = all(top);
    vi odd = {};
    for (int i = 0; i < KV_BLOCK; i += LANES) {
        const vf s = load(scores + i);
        best = larger(best, s);
        odd |= s != s;
    }
    float most = top;
    for (int i = 0; i < LANES; i++) {
        most = best[i] > most ? best[i] : most;
        if (odd[i]) mass = __builtin_nanf("");
    }
    if (most > 3.4028234e38f) mass = __builtin_nanf("");
    const float base = most == -__builtin_inff() ? 0.0f : most;  // nothing seen: every probability is 0
    vf total = {};
    for (int i = 0; i < KV_BLOCK; i += LANES) {
        const vf p = exponential(load(scores + i) - base);
        store(scores + i, p);
        total += p;
    }
    const float shrink = exponential(all(top - base))[0];
    if (most > top) {
        int64_t i = 0;
        for (; i + LANES <= d; i += LANES) store(out + i, load(out + i) * shrink);
        for (; i < d; i++) out[i] *= shrink;
        mass *= shrink;
        top = most;
    }
    mass += sum(total);
}

// Fewer than KV_WIDE_ROWS rows [row, row + rows) of one head of one sequence, over all places.
inline void kv_tile(const qk_kv_pages &a, float *scratch, int64_t batch, int64_t head, int64_t row, int rows) {
    const int64_t pair = batch * a.kv_heads + head, dk = a.k.dim, dv = a.v.dim;
    float *scores = scratch, *scales = scores + KV_WIDE_ROWS * KV_BLOCK, *v_scales = scales + KV_BLOCK;
    const float k_factor = kv_factor(a.k, head), v_factor = kv_factor(a.v, head);
    const float *q = a.q + (pair * a.rows + row) * dk;
    float *top = a.top + pair * a.rows + row, *mass = a.mass + pair * a.rows + row;
    float *out = a.out + (pair * a.rows + row) * dv;
    for (int64_t first = 0; first < a.places;) {
        const int64_t page = first / a.page, at = first % a.page, left = a.places - first;
        int64_t fits = a.page - at < left ? a.page - at : left;
        const int count = fits < KV_BLOCK ? (int)fits : KV_BLOCK;
        if (anyone_sees(a, batch, head, row, rows, first, count)) {
            const int64_t place = pair * a.page + at;
            const char *keys = kv_codes(a.k, page, place), *values = kv_codes(a.v, page, place);
            if (a.k.type == QK_KV_INT8)
                scores_of(q, rows, (const i8 *)keys, dk, count, scores);
            else if (a.k.type == QK_KV_FP8)
                scores_of(q, rows, (const e4m3 *)keys, dk, count, scores);
            else
                scores_of(q, rows, (const s4 *)keys, dk, count, scores);
            kv_scales(a.k, page, place, count, k_factor, scales);
            kv_scales(a.v, page, place, count, v_factor, v_scales);
            for (int r = 0; r < rows; r++) {
                float *of = scores + r * KV_BLOCK;
                for (int i = count; i < KV_BLOCK; i++) of[i] = 0;
                for (int i = 0; i < KV_BLOCK; i += LANES) {
                    const vf s = load(of + i) * load(scales + i);
                    store(of + i, a.softcap != 0 ? cap(s, a.softcap) : s);
                }
                if (!under_mask(a, batch, head, row + r, first, count, of)) {
                    for (int i = 0; i < KV_BLOCK; i++) of[i] = 0;
                    continue;
                }
                soften_row(of, top[r], mass[r], out + r * dv, dv);
                for (int i = 0; i < KV_BLOCK; i += LANES) store(of + i, load(of + i) * load(v_scales + i));
            }
            if (a.v.type == QK_KV_INT8)
                add_values(scores, rows, (const i8 *)values, dv, count, out);
            else if (a.v.type == QK_KV_FP8)
                add_values(scores, rows, (const e4m3 *)values, dv, count, out);
            else
                add_values(scores, rows, (const s4 *)values, dv, count, out);
        }
        first += count;
    }
}
