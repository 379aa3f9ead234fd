// Attention over the paged cache with a running softmax (Milakov and Gimelshein, arXiv 1805.02867).
//
// A tile is up to tile_rows() query vectors of one kv head, which read each page together. Keys lie transposed
// ([head_dim, PAGE]), so scores and outputs are both sums of scaled vectors, without sums across lanes.

// One block of R rows and WIDE vectors of combine_rows.
template <int R, int WIDE, class T>
void combine(const float *coefficient, int ldc, const T *rows, int ldr, int count, float *out, int ldo) {
    vf acc[R][WIDE];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < WIDE; w++) acc[r][w] = load(out + r * ldo + w * LANES);
    for (int i = 0; i < count; i++) {
        vf row[WIDE];
        for (int w = 0; w < WIDE; w++) row[w] = load(on(rows, (int64_t)i * ldr + w * LANES));
        for (int r = 0; r < R; r++) {
            const vf by = all(coefficient[r * ldc + i]);
            for (int w = 0; w < WIDE; w++) acc[r][w] = fused(row[w], by, acc[r][w]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < WIDE; w++) store(out + r * ldo + w * LANES, acc[r][w]);
}

// out[r][0..width) += sum over i < count of coefficient[r][i] * rows[i][0..width); width is a multiple of LANES.
// Both products have this form: q K (i a dimension) and p V (i a position). All rows go over one column block
// before the next, which then comes from the first-level cache.
template <class T>
void combine_rows(int count_rows, const float *coefficient, int ldc, const T *rows, int ldr, int count,
                  float *out, int ldo, int width) {
    constexpr int R = LANES == 4 ? 4 : LANES == 8 ? 6 : 12, WIDE = 2;  // what fits in the registers
    int c = 0;
    for (; c + WIDE * LANES <= width; c += WIDE * LANES) {
        int r = 0;
        for (; r + R <= count_rows && count_rows - r != 8; r += R)
            combine<R, WIDE>(coefficient + r * ldc, ldc, on(rows, c), ldr, count, out + r * ldo + c, ldo);
        for (; r + 4 <= count_rows; r += 4)
            combine<4, WIDE>(coefficient + r * ldc, ldc, on(rows, c), ldr, count, out + r * ldo + c, ldo);
        for (; r + 2 <= count_rows; r += 2)
            combine<2, WIDE>(coefficient + r * ldc, ldc, on(rows, c), ldr, count, out + r * ldo + c, ldo);
        for (; r < count_rows; r++)
            combine<1, WIDE>(coefficient + r * ldc, ldc, on(rows, c), ldr, count, out + r * ldo + c, ldo);
    }
    for (; c < width; c += LANES)
        for (int r = 0; r < count_rows; r++)
            combine<1, 1>(coefficient + r * ldc, ldc, on(rows, c), ldr, count, out + r * ldo + c, ldo);
}

// scores [PAGE] of one row, of which [low, high) count, become probabilities against the running maximum;
// returns by what earlier outputs must be multiplied.
float soften(float *scores, int low, int high, float &maximum, float &mass) {
    const float none = -__builtin_inff();
    for (int i = 0; i < low; i++) scores[i] = none;
    for (int i = high; i < PAGE; i++) scores[i] = none;
    vf best = all(maximum);
    for (int i = 0; i < PAGE; i += LANES) best = larger(best, load(scores + i));
    const float top = largest(best);
    const float scale = exponential(all(maximum - top))[0];
    vf total = {};
    for (int i = 0; i < PAGE; i += LANES) {
        const vf p = exponential(load(scores + i) - top);
        store(scores + i, p);
        total += p;
    }
    maximum = top;
    mass = mass * scale + sum(total);
    return scale;
}

// Numbers of a page as floats, for a tile that goes over them many times.
template <class T>
void widened(const T *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(on(from, i)));
}

// scores[r][first..first + width) *= scales[...], width a multiple of LANES.
inline void times(float *scores, int rows, const float *scales, int first, int width) {
    for (int r = 0; r < rows; r++)
        for (int i = first; i < first + width; i += LANES)
            store(scores + r * PAGE + i, load(scores + r * PAGE + i) * load(scales + i));
}

constexpr int WIDENED_ROWS = 8;  // from so many rows on, a page of codes is widened once

// The query vectors of a tile and their running softmax.
struct Rows {
    float *q, *out, *scores, *maximum, *mass, *wide_keys, *wide_values;
    int count, heads;
    int64_t first;  // position of the first token
};

// Positions [start + low, start + high), all of which somebody sees. keys: [head_dim, ldk], values: [ldk, stride];
// scales of positions, or null.
template <class T>
void visit(const Attention &a, const Rows &of, const T *keys, const T *values, const float *k_scales,
           const float *v_scales, int ldk, int64_t start, int low, int high, bool widen) {
    const int rows = of.count, d = a.head_dim;
    const int left = low / LANES * LANES, width = (high - left + LANES - 1) / LANES * LANES;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < PAGE; i++) of.scores[r * PAGE + i] = 0;
    if (widen) {
        widened(keys, of.wide_keys, (int64_t)d * ldk);
        widened(values, of.wide_values, (int64_t)high * a.stride);
        combine_rows(rows, of.q, d, of.wide_keys + left, ldk, d, of.scores + left, PAGE, width);
    } else {
        combine_rows(rows, of.q, d, on(keys, left), ldk, d, of.scores + left, PAGE, width);
    }
    if (k_scales) times(of.scores, rows, k_scales, left, width);
    for (int r = 0; r < rows; r++) {
        const int64_t position = of.first + r / of.heads;
        const int64_t from = a.window && position >= a.window ? position - a.window + 1 - start : 0;
        const int64_t to = position + 1 - start;
        const int row_low = from < low ? low : from > high ? high : (int)from;
        const int row_high = to > high ? high : to < row_low ? row_low : (int)to;
        const float shrink = soften(of.scores + r * PAGE, row_low, row_high, of.maximum[r], of.mass[r]);
        for (int i = 0; i < a.stride; i += LANES)
            store(of.out + r * a.stride + i, load(of.out + r * a.stride + i) * shrink);
    }
    if (v_scales) times(of.scores, rows, v_scales, left, width);
    if (widen)
        combine_rows(rows, of.scores + low, PAGE, of.wide_values + (int64_t)low * a.stride, a.stride, high - low, of.out,
                     a.stride, a.stride);
    else
        combine_rows(rows, of.scores + low, PAGE, on(values, (int64_t)low * a.stride), a.stride, high - low, of.out,
                     a.stride, a.stride);
}

// Query heads [head, head + heads) of kv head `kv`, tokens [token, token + tokens).
template <class T>
void tile(const Attention &a, float *scratch, int kv, int head, int heads, int64_t token, int64_t tokens) {
    const int rows = (int)tokens * heads, d = a.head_dim;
    const bool by_position = scaled_by_position(a.type), by_head = a.type == CACHE_FP8;
    float *q = scratch, *out = q + rows * d, *scores = out + rows * a.stride;
    float *maximum = scores + rows * PAGE, *mass = maximum + rows;
    float *wide_keys = mass + rows, *wide_values = wide_keys + PAGE * d;
    const int64_t first = a.position + token, end = first + tokens;  // positions of the tile's tokens
    const Rows of = {q, out, scores, maximum, mass, wide_keys, wide_values, rows, heads, first};
    const float scale = a.scale * (by_head ? a.k_scales[kv] * 256.0f : 1.0f);
    for (int r = 0; r < rows; r++) {
        const float *from = a.q + (token + r / heads) * a.ldq + (int64_t)(kv * a.group + head + r % heads) * d;
        for (int i = 0; i < d; i++) q[r * d + i] = from[i] * scale;
        for (int i = 0; i < a.stride; i++) out[r * a.stride + i] = 0;
        maximum[r] = -1e30f;
        mass[r] = 0;
    }
    int64_t begin = a.window && first >= a.window ? first - a.window + 1 : 0;
    if (begin < a.sinks) {
        const Exact at = exact(a, kv);
        const int high = end < a.sinks ? (int)end : a.sinks;
        visit(a, of, (const float *)at.keys, (const float *)at.values, nullptr, nullptr, sink_places(a.sinks), 0,
              (int)begin, high, false);
        begin = a.sinks;
    }
    for (int64_t p = begin / PAGE; p * PAGE < end; p++) {
        const int64_t start = p * PAGE;
        const int low = begin > start ? (int)(begin - start) : 0;
        const int high = end < start + PAGE ? (int)(end - start) : PAGE;
        if (low >= high) continue;  // exact ones only
        const Place at = place(a, p, kv);
        visit(a, of, (const T *)at.keys, (const T *)at.values, by_position ? at.k_scales : nullptr,
              by_position ? at.v_scales : nullptr, PAGE, start, low, high,
              cache_bits(a.type) < 16 && rows >= WIDENED_ROWS);
    }
    const float value_scale = by_head ? a.v_scales[kv] * 256.0f : 1.0f;
    for (int r = 0; r < rows; r++) {
        float *to = a.out + (token + r / heads) * a.ldo + (int64_t)(kv * a.group + head + r % heads) * d;
        const float factor = value_scale / mass[r];
        for (int i = 0; i < d; i++) to[i] = by_head ? out[r * a.stride + i] * factor : out[r * a.stride + i] / mass[r];
    }
}

template <class T>
void attend_to(const Attention &a, float *scratch, int part, int parts) {
    const int heads = a.kv_heads * a.m >= parts ? a.group : 1;  // too few tasks otherwise
    const int64_t tokens = heads >= TILE ? 1 : TILE / heads;
    const int64_t tiles = (a.m + tokens - 1) / tokens, splits = a.group / heads;
    for (int64_t task = part; task < tiles * splits * a.kv_heads; task += parts) {
        const int kv = (int)(task % a.kv_heads), split = (int)(task / a.kv_heads % splits);
        const int64_t token = task / (a.kv_heads * splits) * tokens;
        const int64_t count = token + tokens <= a.m ? tokens : a.m - token;
        tile<T>(a, scratch, kv, split * heads, heads, token, count);
    }
}

void attend(const Attention &a, float *scratch, int part, int parts) {
    switch (a.type) {
        case CACHE_BF16: return attend_to<bf16>(a, scratch, part, parts);
        case CACHE_I8: return attend_to<i8>(a, scratch, part, parts);
        case CACHE_I4: return attend_to<i4>(a, scratch, part, parts);
        case CACHE_FP8: return attend_to<fp8>(a, scratch, part, parts);
        default: return attend_to<float>(a, scratch, part, parts);
    }
}
