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
        for (int w = 0; w < WIDE; w++) row[w] = load(rows + (int64_t)i * ldr + w * LANES);
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
    constexpr int R = 4, WIDE = 2;
    int c = 0;
    for (; c + WIDE * LANES <= width; c += WIDE * LANES) {
        int r = 0;
        for (; r + R <= count_rows; r += R)
            combine<R, WIDE>(coefficient + r * ldc, ldc, rows + c, ldr, count, out + r * ldo + c, ldo);
        for (; r + 2 <= count_rows; r += 2)
            combine<2, WIDE>(coefficient + r * ldc, ldc, rows + c, ldr, count, out + r * ldo + c, ldo);
        for (; r < count_rows; r++)
            combine<1, WIDE>(coefficient + r * ldc, ldc, rows + c, ldr, count, out + r * ldo + c, ldo);
    }
    for (; c < width; c += LANES)
        for (int r = 0; r < count_rows; r++)
            combine<1, 1>(coefficient + r * ldc, ldc, rows + c, ldr, count, out + r * ldo + c, ldo);
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

// Query heads [head, head + heads) of kv head `kv`, tokens [token, token + tokens).
template <class T>
void tile(const Attention &a, float *scratch, int kv, int head, int heads, int64_t token, int64_t tokens) {
    const int rows = (int)tokens * heads, d = a.head_dim;
    float *q = scratch, *out = q + rows * d, *scores = out + rows * a.stride;
    float *maximum = scores + rows * PAGE, *mass = maximum + rows;
    for (int r = 0; r < rows; r++) {
        const float *from = a.q + (token + r / heads) * a.ldq + (int64_t)(kv * a.group + head + r % heads) * d;
        for (int i = 0; i < d; i++) q[r * d + i] = from[i] * a.scale;
        for (int i = 0; i < a.stride; i++) out[r * a.stride + i] = 0;
        maximum[r] = -1e30f;
        mass[r] = 0;
    }
    const int64_t first = a.position + token, end = first + tokens;  // positions of the tile's tokens
    const int64_t begin = a.window && first >= a.window ? first - a.window + 1 : 0;
    for (int64_t p = begin / PAGE; p * PAGE < end; p++) {
        const int64_t start = p * PAGE;
        const int low = begin > start ? (int)(begin - start) : 0;
        const int high = end < start + PAGE ? (int)(end - start) : PAGE;
        const T *page = (const T *)(a.pages[p] + a.offset);
        const T *keys = page + (int64_t)kv * d * PAGE;
        const T *values = page + (int64_t)a.kv_heads * d * PAGE + (int64_t)kv * PAGE * a.stride;
        const int left = low / LANES * LANES, width = (high - left + LANES - 1) / LANES * LANES;
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < PAGE; i++) scores[r * PAGE + i] = 0;
        combine_rows(rows, q, d, keys + left, PAGE, d, scores + left, PAGE, width);
        for (int r = 0; r < rows; r++) {
            const int64_t at = first + r / heads;
            const int64_t from = a.window && at >= a.window ? at - a.window + 1 - start : 0;
            const int64_t to = at + 1 - start;
            const int row_low = from < low ? low : from > high ? high : (int)from;
            const int row_high = to > high ? high : to < row_low ? row_low : (int)to;
            const float scale = soften(scores + r * PAGE, row_low, row_high, maximum[r], mass[r]);
            for (int i = 0; i < a.stride; i += LANES)
                store(out + r * a.stride + i, load(out + r * a.stride + i) * scale);
        }
        combine_rows(rows, scores + low, PAGE, values + (int64_t)low * a.stride, a.stride, high - low, out,
                     a.stride, a.stride);
    }
    for (int r = 0; r < rows; r++) {
        float *to = a.out + (token + r / heads) * a.ldo + (int64_t)(kv * a.group + head + r % heads) * d;
        for (int i = 0; i < d; i++) to[i] = out[r * a.stride + i] / mass[r];
    }
}

void attend(const Attention &a, float *scratch, int part, int parts) {
    const int heads = a.kv_heads * a.m >= parts ? a.group : 1;  // too few tasks otherwise
    const int64_t tokens = heads >= TILE ? 1 : TILE / heads;
    const int64_t tiles = (a.m + tokens - 1) / tokens, splits = a.group / heads;
    for (int64_t task = part; task < tiles * splits * a.kv_heads; task += parts) {
        const int kv = (int)(task % a.kv_heads), split = (int)(task / a.kv_heads % splits);
        const int64_t token = task / (a.kv_heads * splits) * tokens;
        const int64_t count = token + tokens <= a.m ? tokens : a.m - token;
        if (a.type == BF16)
            tile<bf16>(a, scratch, kv, split * heads, heads, token, count);
        else
            tile<float>(a, scratch, kv, split * heads, heads, token, count);
    }
}
