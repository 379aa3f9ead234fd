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

void hadamard(float *x, int dim) {
    for (int half = 1; half < dim; half *= 2)
        for (int start = 0; start < dim; start += 2 * half)
            for (int i = start; i < start + half; i++) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
    const float factor = 1.0f / __builtin_sqrtf((float)dim);
    for (int i = 0; i < dim; i++) x[i] *= factor;
}

// Where the parts of one head's page begin.
struct Place {
    char *keys, *values;  // [head_dim, PAGE], [PAGE, stride] of the type's bits each
    float *k_scales, *v_scales;  // [PAGE]
};
inline Place place(const Attention &a, int64_t page, int head) {
    const size_t bits = cache_bits(a.type), k = (size_t)a.head_dim * PAGE * bits / 8, v = (size_t)PAGE * a.stride * bits / 8;
    char *start = a.pages[page] + a.offset;
    float *scales = (float *)(start + a.kv_heads * (k + v));
    return {start + head * k, start + a.kv_heads * k + head * v, scales + head * PAGE,
            scales + (a.kv_heads + head) * PAGE};
}

// Where one head's exact first tokens lie, fp32.
struct Exact {
    float *keys, *values;  // [head_dim, sink_places], [sink_places, stride]
};
inline Exact exact(const Attention &a, int head) {
    float *start = a.exact + head * exact_floats(a.sinks, a.head_dim, a.stride);
    return {start, start + (size_t)sink_places(a.sinks) * a.head_dim};
}

template <class T>
void append_to(const Attention &a, int head, int64_t position, const float *k, const float *v) {
    const Place to = place(a, position / PAGE, head);
    const int64_t at = position % PAGE;
    for (int d = 0; d < a.head_dim; d++) {
        put((T *)to.keys + d * PAGE + at, k[d]);
        put((T *)to.values + at * a.stride + d, v[d]);
    }
}

// The scale of a head's numbers whose largest code is `most`.
inline float integer_scale(const float *x, int n, float most) {
    float largest = 0;
    for (int i = 0; i < n; i++) {
        const float size = __builtin_fabsf(x[i]);
        if (!(size <= largest)) largest = size;  // NaN too
    }
    const float scale = largest / most;
    return scale < 1e-6f ? 1e-6f : scale;
}

// Halves go away from zero: vLLM's caches per token and head.
inline int integer_code(float x, float inverse, float most) {
    float level = x * inverse;
    level = level > 0 ? level + 0.5f : level < 0 ? level - 0.5f : level;
    level = level > most ? most : level < -most - 1 ? -most - 1 : level;
    return level == level ? (int)level : 0;
}

inline void put_code(char *codes, int64_t i, int code, bool wide) {
    if (wide) {
        codes[i] = (char)code;
        return;
    }
    uint8_t *byte = (uint8_t *)codes + i / 2;
    const int shift = i % 2 * 4;
    *byte = (uint8_t)((*byte & ~(15 << shift)) | (code + 8) << shift);
}

void append_integers(const Attention &a, int head, int64_t position, const float *k, const float *v) {
    const bool wide = a.type == CACHE_I8;
    const float most = wide ? 127.0f : 7.0f;
    const Place to = place(a, position / PAGE, head);
    const int64_t at = position % PAGE;
    to.k_scales[at] = integer_scale(k, a.head_dim, most);
    to.v_scales[at] = integer_scale(v, a.head_dim, most);
    const float k_inverse = 1.0f / to.k_scales[at], v_inverse = 1.0f / to.v_scales[at];
    for (int d = 0; d < a.head_dim; d++) {
        put_code(to.keys, d * PAGE + at, integer_code(k[d], k_inverse, most), wide);
        put_code(to.values, at * a.stride + d, integer_code(v[d], v_inverse, most), wide);
    }
}

// The E4M3 code nearest to x, halves to even, at most 448. NaN gets its code, which attention reads as 480: the
// token's own output is NaN already.
inline uint8_t fp8_code(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
    const float size = __builtin_fabsf(x);
    if (!(size == size)) return sign | 0x7f;
    if (size >= 448.0f) return sign | 0x7e;
    if (size < 0x1p-6f) {  // subnormal: steps of 2^-9
        const float shift = 12582912.0f;
        return sign | (uint8_t)(int)((size * 512.0f + shift) - shift);
    }
    bits &= 0x7fffffff;
    return sign | (uint8_t)(((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - 960);  // the bias is 120 less
}

void append_fp8(const Attention &a, int head, int64_t position, const float *k, const float *v) {
    const Place to = place(a, position / PAGE, head);
    const int64_t at = position % PAGE;
    for (int d = 0; d < a.head_dim; d++) {
        to.keys[d * PAGE + at] = (char)fp8_code(k[d] / a.k_scales[head]);
        to.values[at * a.stride + d] = (char)fp8_code(v[d] / a.v_scales[head]);
    }
}

void append(const Attention &a, int head, int64_t position, const float *k, const float *v) {
    if (position < a.sinks) {
        const Exact to = exact(a, head);
        for (int d = 0; d < a.head_dim; d++) {
            to.keys[d * sink_places(a.sinks) + position] = k[d];
            to.values[position * a.stride + d] = v[d];
        }
        return;
    }
    if (a.type == CACHE_BF16)
        append_to<bf16>(a, head, position, k, v);
    else if (a.type == CACHE_F32)
        append_to<float>(a, head, position, k, v);
    else if (a.type == CACHE_FP8)
        append_fp8(a, head, position, k, v);
    else
        append_integers(a, head, position, k, v);
}
