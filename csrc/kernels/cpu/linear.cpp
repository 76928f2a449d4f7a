#include "cpu/linear.h"

#include <algorithm>

#include "cpu/isa/dispatch.h"
#include "cpu/partition.h"
#include "cpu/row_pieces.h"

namespace dynquant::cpu {
namespace {

Partition partition_gemm(const KernelTable& kernels, int64_t m, const Weight& weight,
                         const Parallel& parallel) {
  const int64_t threads = threads_for(microseconds_to_multiply(kernels, m, weight), parallel);
  const int64_t row_parts = std::clamp<int64_t>(m / kLeastRows, 1, threads);
  return Partition{row_parts, std::clamp<int64_t>(threads / row_parts, 1, blocks_of(weight.n))};
}

// Bytes of GEMM scratch per task.
int64_t gemm_bytes_of_task(const KernelTable& kernels, const Partition& partition, int64_t m, int64_t k) {
  // Shares are whole tiles, and tiles differ in height.
  const int64_t rows = m / partition.row_parts + 2 * kernels.max_rows;
  return piece_bytes<int8_t>(kernels.gemm_scratch(m, k, rows));
}

// shared: the qparams of all rows unless each row has its own.
void quantize_rows(const Linear& args, const KernelTable& kernels, const Rows& x, RowTiles tiles,
                   const QParams& shared, const Workspace& work) {
  if (args.given != nullptr || args.per_tensor) {
    kernels.quantize_per_tensor(x, tiles, shared, args.given != nullptr, work.a, work.qparams, work.row);
  } else {
    kernels.quantize_per_token(x, tiles, work.a, work.qparams, work.row);
  }
}

// Each thread quantizes and multiplies its rows piece by piece: packed activations stay in its caches.
void linear_by_rows(const Linear& args, const LinearPlan& plan, const QParams& shared, uint8_t* memory,
                    const Parallel& parallel) {
  const KernelTable& kernels = *plan.kernels;
  const int64_t row_parts = plan.partition.row_parts, blocks = blocks_of(args.weight.n);
  const int64_t rows_of_piece = divide_up(args.x.m, plan.pieces);
  parallel.run(*kernels.scope, row_parts, [&](int64_t t) {
    const Workspace work =
        workspace_at(kernels, plan.layout, memory + t * plan.layout.bytes(), rows_of_piece, args.x.k);
    const auto [p0, p1] = share(plan.pieces, row_parts, t);
    for (int64_t p = p0; p < p1; ++p) {
      const auto [m0, m1] = share(args.x.m, plan.pieces, p);
      const RowTiles tiles = row_tiles(kernels, m1 - m0, 1);
      quantize_rows(args, kernels, from_row(args.x, m0), tiles, shared, work);
      kernels.linear(work.a, work.qparams, args.weight, from_row(args.out, m0), work.gemm, tiles, 0, blocks);
    }
  });
}

// All rows are quantized, then each thread multiplies them by its channels.
void linear_by_channels(const Linear& args, const LinearPlan& plan, const QParams& shared, uint8_t* memory,
                        const Parallel& parallel) {
  const KernelTable& kernels = *plan.kernels;
  const Partition& partition = plan.partition;
  const Workspace work = workspace_at(kernels, plan.layout, memory, args.x.m, args.x.k);
  const int64_t row = row_scratch(args.x), blocks = blocks_of(args.weight.n);
  parallel.run(*kernels.scope, plan.quantize_threads, [&](int64_t t) {
    Workspace of_thread = work;
    of_thread.row += t * row;
    quantize_rows(args, kernels, args.x, share_of(plan.tiles, plan.quantize_threads, t), shared, of_thread);
  });
  parallel.run(*kernels.scope, partition.tasks(), [&](int64_t t) {
    const auto [b0, b1] = share(blocks, partition.channel_parts, t % partition.channel_parts);
    const RowTiles tiles = share_of(plan.tiles, partition.row_parts, t / partition.channel_parts);
    kernels.linear(work.a, work.qparams, args.weight, args.out, work.gemm + t * plan.gemm_bytes, tiles, b0,
                   b1);
  });
}

}  // namespace

Int8MmPlan plan_int8_mm(const Int8Mm& args, const Parallel& parallel) {
  const int64_t m = args.m, k = args.weight.k;
  const KernelTable& kernels = kernels_of_rows(m, args.weight.full_range);
  Int8MmPlan plan{};
  plan.kernels = &kernels;
  plan.partition = partition_gemm(kernels, m, args.weight, parallel);
  plan.tiles = row_tiles(kernels, m, plan.partition.row_parts);
  plan.activation_bytes = activation_bytes(kernels, plan.tiles, k);
  plan.gemm_bytes = gemm_bytes_of_task(kernels, plan.partition, m, k);
  plan.workspace_bytes = plan.activation_bytes + plan.partition.tasks() * plan.gemm_bytes;
  return plan;
}

void int8_mm(const Int8Mm& args, const Int8MmPlan& plan, void* workspace, const Parallel& parallel) {
  const KernelTable& kernels = *plan.kernels;
  const Partition& partition = plan.partition;
  uint8_t* memory = static_cast<uint8_t*>(workspace);
  int8_t* gemm = reinterpret_cast<int8_t*>(memory + plan.activation_bytes);
  const PackedActivations a = activations_at(kernels, memory, args.m, args.weight.k);
  {
    const InThreadScope scope(*kernels.scope);
    kernels.pack_int8(args.q, args.weight.k, plan.tiles, a);
  }
  parallel.run(*kernels.scope, partition.tasks(), [&](int64_t t) {
    const RowTiles tiles = share_of(plan.tiles, partition.row_parts, t / partition.channel_parts);
    const auto [b0, b1] =
        share(blocks_of(args.weight.n), partition.channel_parts, t % partition.channel_parts);
    kernels.int8_mm(a, args.weight, args.out, gemm + t * plan.gemm_bytes, tiles, b0, b1);
  });
}

LinearPlan plan_linear(const Linear& args, const Parallel& parallel) {
  const int64_t m = args.x.m, k = args.x.k, row = row_scratch(args.x);
  const KernelTable& kernels = kernels_of_rows(m, args.weight.full_range);
  LinearPlan plan{};
  plan.kernels = &kernels;
  plan.partition = partition_gemm(kernels, m, args.weight, parallel);
  const int64_t row_parts = plan.partition.row_parts;
  if (plan.partition.channel_parts == 1) {
    plan.pieces = row_parts * divide_up(m, row_parts * kernels.rows_at_once);
    const int64_t rows = divide_up(m, plan.pieces);  // of a piece; some have one less
    const int64_t gemm =
        std::max(kernels.gemm_scratch(rows, k, rows), kernels.gemm_scratch(rows - 1, k, rows));
    plan.layout = layout_of(kernels, row_tiles(kernels, rows, 1), k, row, gemm);
    plan.workspace_bytes = row_parts * plan.layout.bytes();
  } else {
    plan.quantize_threads = threads_over_rows(args.x, parallel);
    plan.tiles = row_tiles(kernels, m, row_parts);
    plan.gemm_bytes = gemm_bytes_of_task(kernels, plan.partition, m, k);
    plan.layout = layout_of(kernels, plan.tiles, k, plan.quantize_threads * row,
                            plan.partition.tasks() * plan.gemm_bytes);
    plan.workspace_bytes = plan.layout.bytes();
  }
  if (args.per_tensor && args.given == nullptr) {
    // At least the threads that later quantize rows, so that each finds its rows in its caches.
    plan.range = plan_min_max(args.x, row_parts, parallel);
    plan.workspace_bytes = std::max(plan.workspace_bytes, plan.range.workspace_bytes);
  }
  return plan;
}

void linear(const Linear& args, const LinearPlan& plan, void* workspace, const Parallel& parallel) {
  QParams shared{};
  if (args.given != nullptr) {
    shared = *args.given;
  } else if (args.per_tensor) {
    const InThreadScope scope(*plan.kernels->scope);
    shared = choose_qparams(min_max(args.x, plan.range, workspace, parallel));
  }
  uint8_t* memory = static_cast<uint8_t*>(workspace);
  if (plan.partition.channel_parts == 1) {
    linear_by_rows(args, plan, shared, memory, parallel);
  } else {
    linear_by_channels(args, plan, shared, memory, parallel);
  }
}

}  // namespace dynquant::cpu
