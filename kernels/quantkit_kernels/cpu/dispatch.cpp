// Which path runs: CPUID once, QUANTKIT_ISA once, then a table of functions. And the plain C entry points.
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "kv_pages.h"
#include "linear.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qk {
namespace {

constexpr int ISAS = 4;
const char *const NAMES[ISAS] = {"portable", "avx2", "avx512", "amx"};

struct Cpu {
    bool isa[ISAS] = {true, false, false, false};
    bool amd = false;
    char text[256] = "";
};

#if defined(QK_EMULATE)  // the sources of AVX-512 and AMX on scalar twins of their intrinsics: for tests
Cpu detect() {
    Cpu cpu;
    cpu.isa[AVX512] = cpu.isa[AMX] = true;
    snprintf(cpu.text, sizeof cpu.text, "emulated");
    return cpu;
}
#elif defined(__x86_64__)
bool tiles_permitted() {
#if defined(__linux__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
    return false;
#endif
}

Cpu detect() {
    Cpu cpu;
    unsigned a = 0, b = 0, c = 0, d = 0, family = 0, model = 0;
    char vendor[13] = "";
    __get_cpuid(0, &a, &b, &c, &d);
    memcpy(vendor, &b, 4);
    memcpy(vendor + 4, &d, 4);
    memcpy(vendor + 8, &c, 4);
    cpu.amd = strcmp(vendor, "AuthenticAMD") == 0;
    __get_cpuid(1, &a, &b, &c, &d);
    family = (a >> 8 & 15) + (a >> 20 & 255);
    model = (a >> 4 & 15) | (a >> 12 & 0xf0);
    const bool fma = c >> 12 & 1, f16c = c >> 29 & 1, osxsave = c >> 27 & 1;
    unsigned low = 0, high = 0;
    if (osxsave) __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6, tiles = (low & 0x60000) == 0x60000;
    unsigned b7 = 0, c7 = 0, d7 = 0;
    __get_cpuid_count(7, 0, &a, &b7, &c7, &d7);
    const bool avx2 = (b7 >> 5 & 1) && fma && f16c && ymm;
    const bool avx512 = avx2 && zmm && (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1);
    const bool vnni = avx512 && (c7 >> 11 & 1);
    const bool amx = vnni && tiles && (d7 >> 24 & 1) && (d7 >> 25 & 1) && (d7 >> 22 & 1);
    cpu.isa[AVX2] = avx2;
    cpu.isa[AVX512] = vnni;
    cpu.isa[AMX] = amx && tiles_permitted();
    snprintf(cpu.text, sizeof cpu.text, "%s family %u model %u%s%s%s%s", vendor, family, model,
             avx2 ? " avx2 fma f16c" : "", avx512 ? " avx512f/bw/dq/vl" : "", vnni ? " avx512_vnni" : "",
             cpu.isa[AMX] ? " amx_int8 amx_bf16" : "");
    return cpu;
}
#else
Cpu detect() {
    Cpu cpu;
    snprintf(cpu.text, sizeof cpu.text, "not x86-64");
    return cpu;
}
#endif

const Path &path_of(int isa) {
    switch (isa) {
#if defined(__x86_64__)
#ifndef QK_EMULATE
        case AVX2: return path_avx2;
#endif
        case AVX512: return path_avx512;
        case AMX: return path_amx;
#endif
        default: return path_portable;
    }
}

// What the processor says it has, less what does not compute as it should.
Cpu checked(Cpu found) {
    for (int isa = AVX2; isa < ISAS; ++isa)
        if (found.isa[isa] && !(agrees_with_portable(path_of(isa)) && kv_pages_agree(isa))) {
            found.isa[isa] = false;
            const size_t used = strlen(found.text);
            snprintf(found.text + used, sizeof found.text - used, "; %s fails its self-check", NAMES[isa]);
        }
    return found;
}

const Cpu &cpu() {
    static const Cpu found = checked(detect());
    return found;
}

int best() {
    int isa = PORTABLE;
    for (int i = 0; i < ISAS; ++i)
        if (cpu().isa[i]) isa = i;
    return isa;
}

int first_isa() {
    const char *name = getenv("QUANTKIT_ISA");
    if (!name || !*name || strcmp(name, "auto") == 0) return best();
    for (int i = 0; i < ISAS; ++i)
        if (strcmp(name, NAMES[i]) == 0) return cpu().isa[i] ? i : -1;
    return -1;
}

std::atomic<int> &current() {
    static std::atomic<int> isa{first_isa()};
    return isa;
}

const Path &path() { return path_of(current().load(std::memory_order_relaxed)); }

// AMD's prefetchers follow one stream and are disturbed by more; Intel's leave room for several.
Tuning tuning() {
    static const Tuning chosen = cpu().amd ? Tuning{1, 0} : Tuning{4, 2048};
    return chosen;
}

}  // namespace

size_t scratch_bytes(const Weight &w, int64_t m, int compute) {
    // What an fp32 x needs in any path is the most.
    return bytes_of(describe(w, F32, m, compute, false));
}

void prepare_part(const Weight &w, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                  int part, int parts) {
    path().prepare(w, x, x_type, ldx, m, compute, scratch, part, parts);
}

void run_part(const Weight &w, const void *scratch, int64_t m, int, void *y, int y_type, int64_t ldy, int part,
              int parts) {
    const int64_t blocks = row_blocks(w);
    run_blocks_of(w, scratch, m, y, y_type, ldy, int(blocks * part / parts), int(blocks * (part + 1) / parts));
}

void run_blocks_of(const Weight &w, const void *scratch, int64_t m, void *y, int y_type, int64_t ldy, int b0, int b1) {
    path().run(w, scratch, m, y, y_type, ldy, b0, b1, tuning());
}

}  // namespace qk

using namespace qk;

extern "C" {

int qk_linear(const qk_weight *w, const void *x, int x_type, int64_t m, int compute, void *y, int y_type, int threads) {
    const bool known = compute >= FLOAT && compute <= FP8_GROUP;
    if (qk_isa() < 0 || !supported(*w) || !known || (w->table && is_int8(compute))) return 1;
    if (m == 0) return 0;
    void *scratch = nullptr;
    if (posix_memalign(&scratch, 64, scratch_bytes(*w, m, compute))) return 2;
    // Below some ten microseconds of work waking a second thread costs more than it gives.
    const int most = int64_t(w->n) * w->k * m < (1 << 18) ? 1 : row_blocks(*w) < threads ? row_blocks(*w) : threads;
    if (most <= 1) {
        prepare_part(*w, x, x_type, w->k, m, compute, scratch, 0, 1);
        run_part(*w, scratch, m, compute, y, y_type, w->n, 0, 1);
    } else {
#pragma omp parallel num_threads(most)
        {
            const int part = omp_get_thread_num(), parts = omp_get_num_threads();
            prepare_part(*w, x, x_type, w->k, m, compute, scratch, part, parts);
#pragma omp barrier
            run_part(*w, scratch, m, compute, y, y_type, w->n, part, parts);
        }
    }
    free(scratch);
    return 0;
}

int qk_isa(void) { return current().load(); }

int qk_isa_available(int isa) { return isa >= 0 && isa < ISAS && cpu().isa[isa]; }

int qk_set_isa(int isa) {
    if (!qk_isa_available(isa)) return -1;
    current().store(isa);
    return 0;
}

const char *qk_isa_name(int isa) { return isa >= 0 && isa < ISAS ? NAMES[isa] : "none"; }

const char *qk_cpu_flags(void) { return cpu().text; }

#ifndef QK_SOURCES
#define QK_SOURCES ""
#endif
const char *qk_sources(void) { return QK_SOURCES; }

void *qk_arena_new(size_t bytes) {
    constexpr size_t PAGE = size_t(2) << 20;
    void *arena = nullptr;
    if (posix_memalign(&arena, PAGE, (bytes + PAGE - 1) / PAGE * PAGE)) return nullptr;
#if defined(__linux__)
    madvise(arena, (bytes + PAGE - 1) / PAGE * PAGE, MADV_HUGEPAGE);
#endif
    return arena;
}

void qk_arena_free(void *arena) { free(arena); }

}  // extern "C"
