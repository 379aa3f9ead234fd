// What this machine can do at best: bytes read per second, multiply-adds per second.
//
// Peaks are chains of volatile asm on registers: compilers merge identical chains written in C++, and the number is
// then up to three times too high. The asm needs no -m flags; which path runs is asked of qk_isa().

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

extern "C" int qk_isa(void);
extern "C" double qk_read_bandwidth(size_t bytes, int threads, int rounds);
extern "C" double qk_peak(int kind, int threads);

namespace {

constexpr size_t LINE = 64, HUGE_PAGE = size_t(1) << 21;
constexpr int PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3;  // as qk_isa() answers
constexpr int INT8 = 0, FP32 = 1, BF16 = 2, INT16 = 3;      // kinds of qk_peak()

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const size_t half = values.size() / 2;
    return values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
}

inline void touch_line(const uint8_t *at, uint64_t &sum, bool vectors) {
#if defined(__x86_64__)
    if (vectors) {
        asm volatile("vmovdqa (%0), %%ymm0\n\tvmovdqa 32(%0), %%ymm1" ::"r"(at) : "xmm0", "xmm1");
        return;
    }
#endif
    (void)vectors;
    uint64_t words[LINE / 8];
    std::memcpy(words, at, LINE);
    for (uint64_t word : words) sum += word;
}

struct Pattern {
    int streams;   // runs read side by side
    size_t ahead;  // bytes prefetched ahead in each, 0: none
};

uint64_t read_all(const uint8_t *begin, size_t bytes, Pattern pattern, bool vectors) {
    uint64_t sum = 0;
    const size_t length = bytes / pattern.streams / LINE * LINE;
    for (size_t at = 0; at < length; at += LINE) {
        for (int stream = 0; stream < pattern.streams; ++stream) {
            const uint8_t *line = begin + stream * length + at;
            if (pattern.ahead) __builtin_prefetch(line + pattern.ahead);
            touch_line(line, sum, vectors);
        }
    }
#if defined(__x86_64__)
    if (vectors) asm volatile("vzeroupper");
#endif
    return sum;
}

#if defined(__x86_64__)
// Twelve independent accumulators hide the latency of every instruction used; one step is all twelve.
#define EACH_OF_12(STEP) \
    STEP("0") STEP("1") STEP("2") STEP("3") STEP("4") STEP("5") STEP("6") STEP("7") STEP("8") STEP("9") STEP("10") \
        STEP("11")
#define VECTORS_USED                                                                                              \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "xmm14", "xmm15"
#define ZERO(I) "vpxor %%xmm" I ", %%xmm" I ", %%xmm" I "\n\t"
#define CLEAR()                                                                                             \
    asm volatile(EACH_OF_12(ZERO) ZERO("12") ZERO("13") ZERO("14") ZERO("15")::: VECTORS_USED)

#define VNNI(I) "vpdpbusd %%zmm12, %%zmm13, %%zmm" I "\n\t"
#define VNNI_16(I) "vpdpwssd %%zmm12, %%zmm13, %%zmm" I "\n\t"
#define DOT_BF16(I) "vdpbf16ps %%zmm12, %%zmm13, %%zmm" I "\n\t"
#define FMA_512(I) "vfmadd231ps %%zmm12, %%zmm13, %%zmm" I "\n\t"
#define FMA_256(I) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" I "\n\t"
// AVX2 has no int8 dot product: bytes to pairs, pairs to dwords, add.
#define DOT_256(I)                          \
    "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n\t" \
    "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n\t"   \
    "vpaddd %%ymm14, %%ymm" I ", %%ymm" I "\n\t"

#define DOT16_256(I) \
    "vpmaddwd %%ymm12, %%ymm13, %%ymm14\n\t" \
    "vpaddd %%ymm14, %%ymm" I ", %%ymm" I "\n\t"

#define LOOP(NAME, STEP)                                                                \
    void NAME(int64_t steps) {                                                          \
        CLEAR();                                                                        \
        for (int64_t i = 0; i < steps; ++i) asm volatile(EACH_OF_12(STEP)::: VECTORS_USED); \
        asm volatile("vzeroupper");                                                     \
    }

LOOP(vnni_512, VNNI)
LOOP(int16_512, VNNI_16)
LOOP(bf16_512, DOT_BF16)
LOOP(fp32_512, FMA_512)
LOOP(fp32_256, FMA_256)
LOOP(int8_256, DOT_256)
LOOP(int16_256, DOT16_256)

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns[16];  // bytes per row
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "what ldtilecfg reads");

// Six accumulator tiles of 16 x 16. The whole struct is a memory operand: gcc 12's intrinsic names 8 bytes of it only.
template <bool FLOATS>
void tiles(int64_t steps) {
    TileConfig before, mine{};
    mine.palette = 1;
    for (int tile = 0; tile < 8; ++tile) mine.rows[tile] = 16, mine.columns[tile] = 64;
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" ::"m"(mine));
    asm volatile(
        "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
        "tilezero %%tmm4\n\ttilezero %%tmm5\n\ttilezero %%tmm6\n\ttilezero %%tmm7" ::);
    for (int64_t i = 0; i < steps; ++i) {
        if (FLOATS)
            asm volatile(
                "tdpbf16ps %%tmm7, %%tmm6, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm1\n\t"
                "tdpbf16ps %%tmm7, %%tmm6, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm3\n\t"
                "tdpbf16ps %%tmm7, %%tmm6, %%tmm4\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm5" ::);
        else
            asm volatile(
                "tdpbusd %%tmm7, %%tmm6, %%tmm0\n\ttdpbusd %%tmm7, %%tmm6, %%tmm1\n\t"
                "tdpbusd %%tmm7, %%tmm6, %%tmm2\n\ttdpbusd %%tmm7, %%tmm6, %%tmm3\n\t"
                "tdpbusd %%tmm7, %%tmm6, %%tmm4\n\ttdpbusd %%tmm7, %%tmm6, %%tmm5" ::);
    }
    asm volatile("ldtilecfg %0" ::"m"(before));
}
#endif

struct Loop {
    void (*run)(int64_t steps);
    double operations;  // per step, a multiply-add counts 2
};

Loop loop_of([[maybe_unused]] int kind, [[maybe_unused]] int isa) {
#if defined(__x86_64__)
    if (isa == AMX && kind == INT8) return {tiles<false>, 6.0 * 2 * 16 * 16 * 64};
    if (isa == AMX && kind == BF16) return {tiles<true>, 6.0 * 2 * 16 * 16 * 32};
    if (isa >= AVX512) {
        if (kind == INT8) return {vnni_512, 12.0 * 2 * 64};
        if (kind == INT16) return {int16_512, 12.0 * 2 * 32};
        if (kind == BF16 && __builtin_cpu_supports("avx512bf16")) return {bf16_512, 12.0 * 2 * 32};
        if (kind == FP32) return {fp32_512, 12.0 * 2 * 16};
    }
    if (isa == AVX2) {
        if (kind == INT8) return {int8_256, 12.0 * 2 * 32};
        if (kind == INT16) return {int16_256, 12.0 * 2 * 16};
        if (kind == FP32) return {fp32_256, 12.0 * 2 * 8};
    }
#endif
    return {nullptr, 0};
}

double seconds(const Loop &loop, int64_t steps, int threads) {
    const double start = now();
#pragma omp parallel num_threads(threads)
    loop.run(steps);
    return now() - start;
}

}  // namespace

// Bytes per second `threads` threads read together from a buffer of `bytes` (huge pages if the system gives them; 0 if
// it gives no memory): the median of `rounds`, and the best of the access patterns that suit one machine or another.
extern "C" double qk_read_bandwidth(size_t bytes, int threads, int rounds) {
    threads = std::max(threads, 1);
    bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    auto *buffer = static_cast<uint8_t *>(std::aligned_alloc(HUGE_PAGE, bytes));
    if (!buffer) return 0;
#if defined(__linux__)
    madvise(buffer, bytes, MADV_HUGEPAGE);  // refused: 4 KB pages, and a lower number
#endif
    const size_t part = bytes / threads / LINE * LINE;
    const bool vectors = qk_isa() >= AVX2;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) std::memset(buffer + thread * part, thread + 1, part);

    double best = 0;
    volatile uint64_t sink = 0;
    for (const Pattern pattern : {Pattern{1, 0}, Pattern{1, 2048}, Pattern{4, 0}, Pattern{4, 1024}}) {
        std::vector<double> speeds;
        for (int round = 0; round < std::max(rounds, 1); ++round) {
            uint64_t sum = 0;
            const double start = now();
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : sum)
            for (int thread = 0; thread < threads; ++thread)
                sum += read_all(buffer + thread * part, part, pattern, vectors);
            speeds.push_back(double(part) * threads / (now() - start));
            sink = sink + sum;
        }
        best = std::max(best, median(speeds));
    }
    std::free(buffer);
    return best;
}

// Operations per second in registers (a multiply-add is two) of the path in use: kind 0 int8, 1 fp32, 2 bf16, 3 int16
// products. 0 if the path has no such instruction.
extern "C" double qk_peak(int kind, int threads) {
    const Loop loop = loop_of(kind, qk_isa());
    if (!loop.run) return 0;
    threads = std::max(threads, 1);
    int64_t steps = 1 << 16;  // a millisecond at least, however busy the machine is
    while (seconds(loop, steps, 1) < 0.01) steps *= 2;
    double fastest = 1e9;
    for (int round = 0; round < 5; ++round) fastest = std::min(fastest, seconds(loop, steps, threads));
    return loop.operations * double(steps) * threads / fastest;
}
