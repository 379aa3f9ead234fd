// What the parts of the decoder share: memory, this thread's share of a parallel region, matrices.
#pragma once

#include <chrono>
#include <new>

#include "common.h"
#include "decode.h"

namespace qk {
namespace {

constexpr size_t LINE = 64;
inline size_t lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

// Aligned memory that only grows and keeps nothing when it does.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { ::operator delete(data_, std::align_val_t(LINE)); }
    void reserve(size_t bytes) {
        if (bytes <= size_) return;
        ::operator delete(data_, std::align_val_t(LINE));
        data_ = nullptr, size_ = 0;
        data_ = ::operator new(bytes, std::align_val_t(LINE));
        size_ = bytes;
    }
    char *bytes() const { return static_cast<char *>(data_); }
    float *floats() const { return static_cast<float *>(data_); }

  private:
    void *data_ = nullptr;
    size_t size_ = 0;
};

// This thread's share of the work of a parallel region.
struct Share {
    int part, parts;
    int64_t first(int64_t count) const { return count * part / parts; }
    int64_t last(int64_t count) const { return count * (part + 1) / parts; }
};

inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// The rows of a step that continue one sequence, from `first` on.
struct Span {
    qk_decoder *of;
    int64_t first, count;
};

// A step over rows of one sequence or of several. each: whether a row is computed as if it were alone, to the bit.
struct Step {
    const Span *spans;
    int span_count;
    int64_t m, keep;  // rows, and how many of them, the last ones, have logits
    const int64_t *tokens;
    const float *cos, *sin;  // [m, rotary_dim]
    float *logits;
    bool each;
};

constexpr int64_t MOST_TOGETHER = 1 << 16;  // sequences of a step
enum Part : int { PART_LINEARS, PART_EXPERTS, PART_HEAD, PART_ATTENTION, PART_REST };

// Adds the time since the last lap to a part; without seconds it does nothing.
class Watch {
  public:
    explicit Watch(double *seconds) : seconds_(seconds) {
        if (seconds_) last_ = Clock::now();
    }
    void lap(Part part) {
        if (!seconds_) return;
        const Clock::time_point now = Clock::now();
        seconds_[part] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

  private:
    using Clock = std::chrono::steady_clock;
    double *seconds_;
    Clock::time_point last_;
};

inline bool absent(const qk_matrix &m) { return m.weight.n == 0; }
inline bool packed(const qk_matrix &m) { return m.dense < 0 && !absent(m); }
inline int compute_of(const qk_matrix &m, int models) { return m.compute < 0 ? models : m.compute; }

}  // namespace
}  // namespace qk
