// llama.cpp's matrix products alone, for quantkit.bench.models.llamacpp: commands on stdin, one answer line each.
//
//   open TYPE N K M COPIES PER   weights [N, K] of TYPE (Q4_0, Q8_0) in the buffer llama.cpp would choose -> its name
//   run CALLS                    at least CALLS products, each with the next copy, PER of them in a graph -> seconds
//                                per product
//
// Times hold ggml's own quantization of the activations and its barrier per product.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

struct Free {
    void operator()(ggml_context *c) const { ggml_free(c); }
    void operator()(ggml_backend_buffer *b) const { ggml_backend_buffer_free(b); }
};

struct Cell {
    std::unique_ptr<ggml_context, Free> weights, rest;
    std::unique_ptr<ggml_backend_buffer, Free> weight_memory, rest_memory;
    std::vector<ggml_cgraph *> graphs;
    int64_t per = 1;
    size_t next = 0;
};

ggml_context *context(size_t tensors, size_t graphs, size_t nodes) {
    const size_t bytes = tensors * ggml_tensor_overhead() + graphs * ggml_graph_overhead_custom(nodes, false);
    return ggml_init({bytes, nullptr, true});
}

// The first of the special buffers (AMX, repacked) that takes this product, else plain memory.
ggml_backend_buffer_type_t choose(ggml_backend_dev_t device, ggml_tensor *product) {
    auto *registry = ggml_backend_dev_backend_reg(device);
    auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts"));
    for (auto *type = extra ? extra(device) : nullptr; type && *type; ++type) {
        std::unique_ptr<ggml_backend_buffer, Free> empty(ggml_backend_buft_alloc_buffer(*type, 0));
        product->src[0]->buffer = empty.get();
        const bool takes = ggml_backend_dev_supports_op(device, product);
        product->src[0]->buffer = nullptr;
        if (takes) return *type;
    }
    return ggml_backend_dev_buffer_type(device);
}

Cell open(ggml_backend_t backend, ggml_type type, int64_t n, int64_t k, int64_t m, int64_t copies, int64_t per) {
    Cell cell;
    cell.per = per;
    const int64_t graphs = (copies + per - 1) / per, nodes = 2 * per + 2;
    cell.weights.reset(context(graphs * per, 0, 0));
    cell.rest.reset(context(graphs * per + 1, graphs, nodes));
    auto *x = ggml_new_tensor_2d(cell.rest.get(), GGML_TYPE_F32, k, m);
    std::vector<ggml_tensor *> all;
    for (int64_t g = 0; g < graphs; ++g) {
        cell.graphs.push_back(ggml_new_graph_custom(cell.rest.get(), nodes, false));
        for (int64_t i = 0; i < per; ++i) {
            all.push_back(ggml_new_tensor_2d(cell.weights.get(), type, k, n));
            ggml_build_forward_expand(cell.graphs.back(), ggml_mul_mat(cell.rest.get(), all.back(), x));
        }
    }
    auto *where = choose(ggml_backend_get_device(backend), ggml_graph_node(cell.graphs[0], 0));
    cell.weight_memory.reset(ggml_backend_alloc_ctx_tensors_from_buft(cell.weights.get(), where));
    cell.rest_memory.reset(ggml_backend_alloc_ctx_tensors(cell.rest.get(), backend));

    std::vector<float> values(n * k);
    for (size_t i = 0; i < values.size(); ++i) values[i] = float(int(i * 2654435761u >> 16 & 255) - 128) / 128;
    std::vector<uint8_t> codes(ggml_nbytes(all[0]));
    ggml_quantize_chunk(type, values.data(), codes.data(), 0, n, k, nullptr);
    for (auto *weight : all) ggml_backend_tensor_set(weight, codes.data(), 0, codes.size());
    std::vector<float> activations(k * m);
    for (size_t i = 0; i < activations.size(); ++i) activations[i] = values[i % values.size()];
    ggml_backend_tensor_set(x, activations.data(), 0, ggml_nbytes(x));
    return cell;
}

int main(int count, char **words) {
    auto *backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, count > 1 ? std::atoi(words[1]) : 1);
    Cell cell;
    std::string command, name;
    while (std::cin >> command) {
        if (command == "open") {
            int64_t n, k, m, copies, per;
            std::cin >> name >> n >> k >> m >> copies >> per;
            cell = Cell();
            cell = open(backend, name == "Q8_0" ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_0, n, k, m, copies, per);
            std::cout << ggml_backend_buffer_name(cell.weight_memory.get()) << std::endl;
        } else {
            int64_t calls;
            std::cin >> calls;
            const auto start = std::chrono::steady_clock::now();
            int64_t done = 0;
            for (; done < calls; done += cell.per)
                ggml_backend_graph_compute(backend, cell.graphs[cell.next++ % cell.graphs.size()]);
            const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
            std::cout << spent.count() / double(done) << std::endl;
        }
    }
    ggml_backend_free(backend);
}
