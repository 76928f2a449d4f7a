// The products of a call with several layers: on the calling thread for a piece of its rows, or each over all
// threads for all rows. Shared by mlp.cpp and rnn.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/row_pieces.h"

namespace dynquant::cpu {

inline Rows fp32_rows(const float* data, int64_t m, int64_t k) { return {data, Dtype::kFloat32, m, k, k, 0}; }

inline Destination fp32_destination(float* data, int64_t n, Epilogue epilogue = Epilogue::kNone) {
  return {data, n, Dtype::kFloat32, epilogue};
}

// `most`, or more where the product of up to `rows` rows by a layer needs more.
inline WorkspaceLayout widened(const WorkspaceLayout& most, const KernelTable& kernels,
                               const PackedLayer& layer, int64_t rows) {
  const int64_t k = layer.weight.k, row = layer.rotation.block > 0 ? row_floats(k) : 0;
  // Some pieces have one row less.
  const int64_t gemm = std::max(kernels.gemm_scratch(rows, k, rows), kernels.gemm_scratch(rows - 1, k, rows));
  const WorkspaceLayout own = layout_of(kernels, row_tiles(kernels, rows, 1), k, row, gemm);
  return {std::max(most.activations, own.activations), std::max(most.qparams, own.qparams),
          std::max(most.row, own.row), std::max(most.gemm, own.gemm)};
}

struct Product {
  const PackedLayer* layer;
  float* out;
};

// The steps on the calling thread, for a piece of rows.
struct PieceSteps {
  const KernelTable& kernels;
  const WorkspaceLayout& layout;
  uint8_t* memory;

  // All products are of the same quantized x, as the first layer has it.
  template <size_t kCount>
  void multiply(Rows x, const std::array<Product, kCount>& products) const {
    const Workspace work = workspace_at(kernels, layout, memory, x.m, x.k);
    const RowTiles tiles = row_tiles(kernels, x.m, 1);
    x.rotation = products[0].layer->rotation;
    if (products[0].layer->per_tensor) {
      const QParams shared = choose_qparams(kernels.min_max(x, 0, x.m, work.row));
      kernels.quantize_per_tensor(x, tiles, shared, false, work.a, work.qparams, work.row);
    } else {
      kernels.quantize_per_token(x, tiles, work.a, work.qparams, work.row);
    }
    for (const Product& product : products) {
      const Weight& weight = product.layer->weight;
      kernels.linear(work.a, work.qparams, weight,
                     fp32_destination(product.out, weight.n, product.layer->epilogue), work.gemm, tiles, 0,
                     blocks_of(weight.n));
    }
  }

  // Calls body(begin, end) for shares of `count` elements.
  template <typename Body>
  void share_out(int64_t count, double, const Body& body) const {
    body(0, count);
  }

  template <typename Body>
  void by_rows(const Body& body) const {
    body();
  }
};

// The steps for all rows of a call, each over all threads.
struct CallSteps {
  const KernelTable& kernels;
  const Parallel& parallel;
  uint8_t* memory;

  static Linear linear_of(Rows x, const Product& product) {
    const PackedLayer& layer = *product.layer;
    x.rotation = layer.rotation;
    return {x, layer.weight, layer.per_tensor, nullptr,
            fp32_destination(product.out, layer.weight.n, layer.epilogue)};
  }

  template <size_t kCount>
  void multiply(const Rows& x, const std::array<Product, kCount>& products) const {
    for (const Product& product : products) {
      const Linear args = linear_of(x, product);
      linear(args, plan_linear(args, parallel), memory, parallel);
    }
  }

  // On as many threads as `microseconds` of work justify.
  template <typename Body>
  void share_out(int64_t count, double microseconds, const Body& body) const {
    const int64_t threads = threads_for(microseconds, parallel);
    parallel.run(*kernels.scope, threads, [&](int64_t t) {
      const auto [begin, end] = share(count, threads, t);
      body(begin, end);
    });
  }

  // Rows are few here.
  template <typename Body>
  void by_rows(const Body& body) const {
    parallel.run(*kernels.scope, 1, [&](int64_t) { body(); });
  }
};

}  // namespace dynquant::cpu
