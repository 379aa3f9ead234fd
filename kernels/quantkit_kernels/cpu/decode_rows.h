// Norms, the gate, rotary embedding and the copy into the cache: everything that goes row by row.

template <class T>
void widen_from(const T *src, float *dst, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(dst + i, load(src + i));
    for (; i < n; i++) dst[i] = one(src + i);
}

void widen(const void *src, int type, float *dst, int64_t n) {
    if (type == BF16)
        widen_from((const bf16 *)src, dst, n);
    else if (type == F16)
        widen_from((const f16 *)src, dst, n);
    else
        widen_from((const float *)src, dst, n);
}

void add_norm(float *x, const float *y, const float *weight, float eps, float *out, int64_t n) {
    vf squares = {}, more = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        vf a = load(x + i), b = load(x + i + LANES);
        if (y) {
            a += load(y + i), b += load(y + i + LANES);
            store(x + i, a), store(x + i + LANES, b);
        }
        squares += a * a;
        more += b * b;
    }
    for (; i < n; i++) {
        if (y) x[i] += y[i];
        rest += x[i] * x[i];
    }
    const float factor = 1.0f / __builtin_sqrtf((sum(squares + more) + rest) / (float)n + eps);
    for (i = 0; i + LANES <= n; i += LANES) store(out + i, load(x + i) * factor * load(weight + i));
    for (; i < n; i++) out[i] = x[i] * factor * weight[i];
}

void swiglu(const float *gate, const float *up, float *out, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vf g = load(gate + i);
        store(out + i, g / (1.0f + exponential(-g)) * load(up + i));
    }
    for (; i < n; i++) {
        const vf g = all(gate[i]);
        out[i] = (g / (1.0f + exponential(-g)))[0] * up[i];
    }
}

void rotate(float *x, const float *cos, const float *sin, int dim) {
    const int half = dim / 2;
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vf a = load(x + i), b = load(x + half + i);
        store(x + i, a * load(cos + i) - b * load(sin + i));
        store(x + half + i, b * load(cos + half + i) + a * load(sin + half + i));
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[half + i] + a * sin[half + i];
    }
}

template <class T>
void append_to(const Attention &a, int head, int64_t position, const float *k, const float *v) {
    T *page = (T *)(a.pages[position / PAGE] + a.offset);
    const int64_t at = position % PAGE;
    T *keys = page + (int64_t)head * a.head_dim * PAGE + at;
    T *values = page + (int64_t)a.kv_heads * a.head_dim * PAGE + (head * (int64_t)PAGE + at) * a.stride;
    for (int d = 0; d < a.head_dim; d++) {
        put(keys + d * PAGE, k[d]);
        put(values + d, v[d]);
    }
}

void append(const Attention &a, int head, int64_t position, const float *k, const float *v) {
    if (a.type == BF16)
        append_to<bf16>(a, head, position, k, v);
    else
        append_to<float>(a, head, position, k, v);
}
