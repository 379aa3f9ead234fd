// Attention over pages of a quantized KV cache for many rows at once, as a prompt has them: a block of keys and values
// is made floats once, with its scales, keys as columns; both products then go over it in registers (combine_rows).
// Included once per path (decode_path.h), after kv_pages_path.h.

#if defined(__clang__)
#define QK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define QK_SHUFFLE4 QK_SHUFFLE
#else
#define QK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#define QK_SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, (v4i){__VA_ARGS__})
#endif
typedef int32_t v4i __attribute__((vector_size(16)));

// The first and the second halves of a and b, lane by lane in turn.
inline void mingle(vf a, vf b, vf *to) {
#if LANES == 4
    to[0] = QK_SHUFFLE(a, b, 0, 4, 1, 5);
    to[1] = QK_SHUFFLE(a, b, 2, 6, 3, 7);
#elif LANES == 8
    to[0] = QK_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    to[1] = QK_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    to[0] = QK_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    to[1] = QK_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

// Rows of LANES vectors become columns: with n = log2(LANES), each step turns the 2n bits of (row, lane) by one.
inline void transpose(vf *rows) {
    for (int step = 1; step < LANES; step *= 2) {
        vf turned[LANES];
        for (int i = 0; i < LANES / 2; i++) mingle(rows[i], rows[i + LANES / 2], turned + 2 * i);
        for (int i = 0; i < LANES; i++) rows[i] = turned[i];
    }
}

// The largest lane, and the sum of all lanes.
inline float peak(vf v) {
    const v4_at *parts = (const v4_at *)&v;
    v4 best = parts[0];
    for (int i = 1; i < LANES / 4; i++) best = best > parts[i] ? best : (v4)parts[i];
    const v4 across = QK_SHUFFLE4(best, best, 2, 3, 0, 1);
    best = best > across ? best : across;
    return best[0] > best[1] ? best[0] : best[1];
}
inline float total(vf v) {
    const v4_at *parts = (const v4_at *)&v;
    v4 whole = parts[0];
    for (int i = 1; i < LANES / 4; i++) whole += parts[i];
    whole += QK_SHUFFLE4(whole, whole, 2, 3, 0, 1);
    return whole[0] + whole[1];
}
#undef QK_SHUFFLE
#undef QK_SHUFFLE4

// to[i * KV_BLOCK + p] = channel i of key p times its scale. Behind `count`, up to a whole vector: any numbers.
template <class T>
void as_columns(const T *keys, int64_t d, int count, const float *scales, float *to) {
    for (int p = 0; p < count; p += LANES) {
        const int last = count - 1 - p;
        const vf scale = load(scales + p);
        int64_t i = 0;
        for (; i + LANES <= d; i += LANES) {
            vf square[LANES];
            for (int j = 0; j < LANES; j++) square[j] = load(on(keys, (p + (j < last ? j : last)) * d + i));
            transpose(square);
            for (int j = 0; j < LANES; j++) store(to + (i + j) * KV_BLOCK + p, square[j] * scale);
        }
        for (; i < d; i++)
            for (int j = 0; j < LANES; j++)
                to[i * KV_BLOCK + p + j] = lane(keys, (p + (j < last ? j : last)) * d + i) * scales[p + j];
    }
}

// to[p * stride + i] = channel i of value p times its scale; what is behind d stays.
template <class T>
void as_rows(const T *values, int64_t d, int count, const float *scales, float *to, int64_t stride) {
    for (int p = 0; p < count; p++) {
        int64_t i = 0;
        for (; i + LANES <= d; i += LANES) store(to + p * stride + i, load(on(values, p * d + i)) * scales[p]);
        for (; i < d; i++) to[p * stride + i] = lane(values, p * d + i) * scales[p];
    }
}

inline void as_columns(const qk_kv_side &side, const char *codes, int count, const float *scales, float *to) {
    if (side.type == QK_KV_INT8)
        as_columns((const i8 *)codes, side.dim, count, scales, to);
    else if (side.type == QK_KV_FP8)
        as_columns((const e4m3 *)codes, side.dim, count, scales, to);
    else
        as_columns((const s4 *)codes, side.dim, count, scales, to);
}
inline void as_rows(const qk_kv_side &side, const char *codes, int count, const float *scales, float *to, int64_t stride) {
    if (side.type == QK_KV_INT8)
        as_rows((const i8 *)codes, side.dim, count, scales, to, stride);
    else if (side.type == QK_KV_FP8)
        as_rows((const e4m3 *)codes, side.dim, count, scales, to, stride);
    else
        as_rows((const s4 *)codes, side.dim, count, scales, to, stride);
}

// Scores [KV_BLOCK] become probabilities against the running maximum, to which out [stride] is scaled. A NaN or an
// infinity makes the mass NaN, and so the row.
inline void soften_wide(float *scores, float &top, float &mass, float *out, int64_t stride) {
    vf best = all(top);
    for (int i = 0; i < KV_BLOCK; i += LANES) best = larger(best, load(scores + i));
    const float found = peak(best), most = found > top ? found : top;
    const float base = most == -__builtin_inff() ? 0.0f : most;  // nothing seen: every probability is 0
    if (most > top) {
        const float shrink = exponential(all(top - base))[0];
        for (int64_t i = 0; i < stride; i += LANES) store(out + i, load(out + i) * shrink);
        mass *= shrink;
        top = most;
    }
    vf sums = {};
    for (int i = 0; i < KV_BLOCK; i += LANES) {
        const vf s = load(scores + i);
        const vf p = (vf)((vi)exponential(s - base) | (s != s));
        store(scores + i, p);
        sums += p;
    }
    mass += most > 3.4028234e38f ? __builtin_nanf("") : total(sums);
}

// Rows [row, row + rows) of one head of one sequence, over all places.
inline void kv_wide_tile(const qk_kv_pages &a, float *scratch, int64_t batch, int64_t head, int64_t row, int rows) {
    const int64_t pair = batch * a.kv_heads + head, dk = a.k.dim, dv = a.v.dim, stride = kv_stride(dv);
    float *scores = scratch, *out = scores + KV_WIDE_TILE * KV_BLOCK, *keys = out + KV_WIDE_TILE * stride;
    float *values = keys + KV_BLOCK * dk, *scales = values + KV_BLOCK * stride, *v_scales = scales + KV_BLOCK;
    const float k_factor = kv_factor(a.k, head), v_factor = kv_factor(a.v, head);
    const float *q = a.q + (pair * a.rows + row) * dk;
    float *top = a.top + pair * a.rows + row, *mass = a.mass + pair * a.rows + row;
    float *sums = a.out + (pair * a.rows + row) * dv;
    for (int64_t i = 0; i < KV_BLOCK * stride; i++) values[i] = 0;
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < stride; i++) out[r * stride + i] = i < dv ? sums[r * dv + i] : 0;
    for (int64_t first = 0; first < a.places;) {
        const int64_t page = first / a.page, at = first % a.page, left = a.places - first;
        const int64_t fits = a.page - at < left ? a.page - at : left;
        const int count = fits < KV_BLOCK ? (int)fits : KV_BLOCK;
        if (anyone_sees(a, batch, head, row, rows, first, count)) {
            const int64_t place = pair * a.page + at;
            kv_scales(a.k, page, place, count, k_factor, scales);
            kv_scales(a.v, page, place, count, v_factor, v_scales);
            as_columns(a.k, kv_codes(a.k, page, place), count, scales, keys);
            as_rows(a.v, kv_codes(a.v, page, place), count, v_scales, values, stride);
            const int width = (count + LANES - 1) / LANES * LANES;
            for (int i = 0; i < rows * KV_BLOCK; i++) scores[i] = 0;
            combine_rows(rows, q, (int)dk, keys, KV_BLOCK, (int)dk, scores, KV_BLOCK, width);
            for (int r = 0; r < rows; r++) {
                float *of = scores + r * KV_BLOCK;
                if (a.softcap != 0)
                    for (int i = 0; i < KV_BLOCK; i += LANES) store(of + i, cap(load(of + i), a.softcap));
                if (under_mask(a, batch, head, row + r, first, count, of))
                    soften_wide(of, top[r], mass[r], out + r * stride, stride);
                else
                    for (int i = 0; i < KV_BLOCK; i++) of[i] = 0;
            }
            combine_rows(rows, scores, KV_BLOCK, values, (int)stride, count, out, (int)stride, (int)stride);
        }
        first += count;
    }
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < dv; i++) sums[r * dv + i] = out[r * stride + i];
}

// Fewer rows to a tile where there are too few tiles for all parts.
void kv_pages(const qk_kv_pages &a, float *scratch, int part, int parts) {
    const int64_t pairs = a.batch * a.kv_heads, share = (a.rows * pairs + parts - 1) / parts;
    const int64_t size = share < KV_WIDE_TILE ? share : KV_WIDE_TILE, tiles = (a.rows + size - 1) / size;
    for (int64_t task = part; task < tiles * pairs; task += parts) {
        const int64_t pair = task / tiles, row = task % tiles * size;
        const int rows = (int)(row + size <= a.rows ? size : a.rows - row);
        (rows < KV_WIDE_ROWS ? kv_tile : kv_wide_tile)(a, scratch, pair / a.kv_heads, pair % a.kv_heads, row, rows);
    }
}
