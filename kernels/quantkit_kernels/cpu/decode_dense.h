// y = x W^T + bias for W [n, k] as it lies in the checkpoint: heads, and models that are not quantized.

// One row times one token: one stream, four sums.
template <class T>
float dot(const T *w, const float *x, int64_t k) {
    vf s0 = {}, s1 = {}, s2 = {}, s3 = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= k; i += 4 * LANES) {
        s0 = fused(load(w + i), load(x + i), s0);
        s1 = fused(load(w + i + LANES), load(x + i + LANES), s1);
        s2 = fused(load(w + i + 2 * LANES), load(x + i + 2 * LANES), s2);
        s3 = fused(load(w + i + 3 * LANES), load(x + i + 3 * LANES), s3);
    }
    for (; i + LANES <= k; i += LANES) s0 = fused(load(w + i), load(x + i), s0);
    float total = sum((s0 + s1) + (s2 + s3));
    for (; i < k; i++) total += one(w + i) * x[i];
    return total;
}

// 4 rows times TOKENS tokens, so that a weight is widened once for all of them.
template <class T, int TOKENS>
void block(const T *w, const float *bias, int64_t k, const float *x, int64_t ldx, float *y, int64_t ldy) {
    vf acc[TOKENS][4] = {};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES)
        for (int r = 0; r < 4; r++) {
            const vf row = load(w + r * k + i);
            for (int t = 0; t < TOKENS; t++) acc[t][r] = fused(row, load(x + t * ldx + i), acc[t][r]);
        }
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < 4; r++) {
            float total = sum(acc[t][r]);
            for (int64_t j = i; j < k; j++) total += one(w + r * k + j) * x[t * ldx + j];
            y[t * ldy + r] = total + (bias ? bias[r] : 0.0f);
        }
}

// Rows [first, last), which stay in the second-level cache while all tokens go over them.
template <class T>
void panel(const T *w, const float *bias, int64_t k, const float *x, int64_t ldx, int64_t m, float *y,
           int64_t ldy, int64_t first, int64_t last) {
    for (int64_t t = 0; t < m; t += 3) {
        const float *from = x + t * ldx;
        for (int64_t n = first; n < last; n += 4) {
            const float *b = bias ? bias + n : bias;
            float *to = y + t * ldy + n;
            if (m - t > 2)
                block<T, 3>(w + n * k, b, k, from, ldx, to, ldy);
            else if (m - t == 2)
                block<T, 2>(w + n * k, b, k, from, ldx, to, ldy);
            else
                block<T, 1>(w + n * k, b, k, from, ldx, to, ldy);
        }
    }
}

template <class T>
void dense_of(const T *w, const float *bias, int64_t k, const float *x, int64_t ldx, int64_t m, float *y,
              int64_t ldy, int64_t first, int64_t last) {
    constexpr int64_t PANEL = 1 << 18;  // bytes
    int64_t rows = PANEL / (k * (int64_t)sizeof(T)) / 4 * 4;
    if (rows < 4) rows = 4;
    const int64_t whole = m > 1 ? first + (last - first) / 4 * 4 : first;
    for (int64_t n = first; n < whole; n += rows)
        panel(w, bias, k, x, ldx, m, y, ldy, n, n + rows < whole ? n + rows : whole);
    for (int64_t n = whole; n < last; n++)
        for (int64_t t = 0; t < m; t++)
            y[t * ldy + n] = dot(w + n * k, x + t * ldx, k) + (bias ? bias[n] : 0.0f);
}

void dense(const void *w, int type, const float *bias, int64_t k, const float *x, int64_t ldx, int64_t m,
           float *y, int64_t ldy, int64_t first, int64_t last) {
    if (type == BF16)
        dense_of((const bf16 *)w, bias, k, x, ldx, m, y, ldy, first, last);
    else if (type == F16)
        dense_of((const f16 *)w, bias, k, x, ldx, m, y, ldy, first, last);
    else
        dense_of((const float *)w, bias, k, x, ldx, m, y, ldy, first, last);
}

// One row times TOKENS tokens, each with the four sums of `dot`.
template <class T, int TOKENS>
void dots(const T *w, float bias, int64_t k, const float *x, int64_t ldx, float *y, int64_t ldy) {
    vf acc[TOKENS][4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= k; i += 4 * LANES)
        for (int s = 0; s < 4; s++) {
            const vf row = load(w + i + s * LANES);
            for (int t = 0; t < TOKENS; t++) acc[t][s] = fused(row, load(x + t * ldx + i + s * LANES), acc[t][s]);
        }
    for (; i + LANES <= k; i += LANES)
        for (int t = 0; t < TOKENS; t++) acc[t][0] = fused(load(w + i), load(x + t * ldx + i), acc[t][0]);
    for (int t = 0; t < TOKENS; t++) {
        float total = sum((acc[t][0] + acc[t][1]) + (acc[t][2] + acc[t][3]));
        for (int64_t j = i; j < k; j++) total += one(w + j) * x[t * ldx + j];
        y[t * ldy] = total + bias;
    }
}

template <class T>
void dense_each_of(const T *w, const float *bias, int64_t k, const float *x, int64_t ldx, int64_t m, float *y,
                   int64_t ldy, int64_t first, int64_t last) {
    constexpr int64_t PANEL = 1 << 18;  // bytes, as above
    int64_t rows = PANEL / (k * (int64_t)sizeof(T));
    if (rows < 1) rows = 1;
    for (int64_t begin = first; begin < last; begin += rows) {
        const int64_t end = begin + rows < last ? begin + rows : last;
        for (int64_t t = 0; t < m; t += 3)
            for (int64_t n = begin; n < end; n++) {
                const float b = bias ? bias[n] : 0.0f, *from = x + t * ldx;
                if (m - t > 2)
                    dots<T, 3>(w + n * k, b, k, from, ldx, y + t * ldy + n, ldy);
                else if (m - t == 2)
                    dots<T, 2>(w + n * k, b, k, from, ldx, y + t * ldy + n, ldy);
                else
                    dots<T, 1>(w + n * k, b, k, from, ldx, y + t * ldy + n, ldy);
            }
    }
}

void dense_each(const void *w, int type, const float *bias, int64_t k, const float *x, int64_t ldx, int64_t m,
                float *y, int64_t ldy, int64_t first, int64_t last) {
    if (type == BF16)
        dense_each_of((const bf16 *)w, bias, k, x, ldx, m, y, ldy, first, last);
    else if (type == F16)
        dense_each_of((const f16 *)w, bias, k, x, ldx, m, y, ldy, first, last);
    else
        dense_each_of((const float *)w, bias, k, x, ldx, m, y, ldy, first, last);
}
