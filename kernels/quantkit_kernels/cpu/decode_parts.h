// What the parts of the decoder share: memory, this thread's share of a parallel region, matrices.
#pragma once

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

inline bool absent(const qk_matrix &m) { return m.weight.n == 0; }
inline bool packed(const qk_matrix &m) { return m.dense < 0 && !absent(m); }
inline int compute_of(const qk_matrix &m, int models) { return m.compute < 0 ? models : m.compute; }

}  // namespace
}  // namespace qk
