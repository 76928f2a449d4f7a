// Pieces of rows on their way through a product: tiles, and the memory between quantization and product.
// Shared by linear.cpp and mlp.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/linear.h"
#include "cpu/partition.h"

namespace dynquant::cpu {

inline int64_t blocks_of(int64_t n) { return divide_up(n, kBlock); }

// Rows that a thread must have to be worth quantizing rows of its own: below, threads share channels.
constexpr int64_t kLeastRows = 24;

// Estimate for one core to multiply m rows by a weight.
inline double microseconds_to_multiply(const KernelTable& kernels, int64_t m, const Weight& weight) {
  const double size = static_cast<double>(weight.n) * static_cast<double>(weight.k);
  return std::max(2.0 * static_cast<double>(m) * size / (kernels.gops * 1e3), microseconds_to_read(size));
}

// All tiles of m rows, the same number for each of `parts` threads.
inline RowTiles row_tiles(const KernelTable& kernels, int64_t m, int64_t parts) {
  const int64_t of_part = divide_up(m, kernels.max_rows * parts);
  return {m, of_part * parts, 0, of_part * parts};
}

// Share t of `parts` of all tiles.
inline RowTiles share_of(RowTiles all, int64_t parts, int64_t t) {
  const auto [begin, end] = share(all.count, parts, t);
  return {all.m, all.count, begin, end};
}

inline int64_t activation_bytes(const KernelTable& kernels, RowTiles all, int64_t k) {
  return piece_bytes<uint8_t>(all.m * kernels.activation_stride(k) +
                              all.count * kernels.plan_bytes(all.m, k));
}

inline PackedActivations activations_at(const KernelTable& kernels, uint8_t* at, int64_t m, int64_t k) {
  const int64_t stride = kernels.activation_stride(k);
  return {at, stride, at + m * stride, kernels.plan_bytes(m, k)};
}

// Memory between quantization and product.
struct Workspace {
  PackedActivations a;
  QParams* qparams;
  float* row;
  int8_t* gemm;
};

inline WorkspaceLayout layout_of(const KernelTable& kernels, RowTiles tiles, int64_t k, int64_t row_floats,
                                 int64_t gemm_bytes) {
  return {activation_bytes(kernels, tiles, k), piece_bytes<QParams>(tiles.m), piece_bytes<float>(row_floats),
          piece_bytes<int8_t>(gemm_bytes)};
}

inline Workspace workspace_at(const KernelTable& kernels, const WorkspaceLayout& layout, uint8_t* memory,
                              int64_t m, int64_t k) {
  uint8_t* qparams = memory + layout.activations;
  uint8_t* row = qparams + layout.qparams;
  return {activations_at(kernels, memory, m, k), reinterpret_cast<QParams*>(qparams),
          reinterpret_cast<float*>(row), reinterpret_cast<int8_t*>(row + layout.row)};
}

inline Rows from_row(const Rows& x, int64_t m) {
  Rows rest = x;
  rest.data = static_cast<const uint8_t*>(x.data) + m * x.stride * element_size(x.dtype);
  rest.m -= m;
  return rest;
}

inline Destination from_row(const Destination& out, int64_t m) {
  Destination rest = out;
  rest.data = static_cast<uint8_t*>(out.data) + m * out.stride * element_size(out.dtype);
  return rest;
}

}  // namespace dynquant::cpu
