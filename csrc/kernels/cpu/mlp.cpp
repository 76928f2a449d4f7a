#include "cpu/mlp.h"

#include <algorithm>
#include <array>

#include "cpu/isa/dispatch.h"
#include "cpu/linear.h"
#include "cpu/product_steps.h"
#include "cpu/quantize.h"
#include "cpu/row_pieces.h"

namespace dynquant::cpu {
namespace {

// Calls body(layer, K) for each layer that is present.
template <typename Body>
void for_layers(const Mlp& args, const Body& body) {
  for (const PackedLayer* layer : {args.layer, args.gate, args.up, args.down}) {
    if (layer != nullptr) body(*layer);
  }
}

bool norms_x(const Mlp& args) {
  return args.norm_in.kind != NormKind::kNone && (args.layer == nullptr || args.up == nullptr);
}

// Bytes of the fp32 rows between the steps, in memory order.
struct BufferLayout {
  int64_t normed, sum, inner, gate, outer;

  BufferLayout(const Mlp& args, int64_t rows) {
    const int64_t n = (args.down != nullptr ? args.down : args.layer)->weight.n;
    normed = piece_bytes<float>(rows * (norms_x(args) ? std::max(args.x.k, n) : n));
    sum = piece_bytes<float>(rows * n);
    inner = args.up == nullptr ? 0 : piece_bytes<float>(rows * args.up->weight.n);
    gate = args.gate == nullptr ? 0 : inner;
    outer = sum;
  }

  int64_t bytes() const { return normed + sum + inner + gate + outer; }
};

// The bytes that the products of `rows` rows need, the largest of all layers.
WorkspaceLayout layout_of_products(const KernelTable& kernels, const Mlp& args, int64_t rows) {
  WorkspaceLayout most{};
  for_layers(args, [&](const PackedLayer& layer) { most = widened(most, kernels, layer, rows); });
  return most;
}

// x as fp32 rows; `converted` has room for them.
Rows in_fp32(const Rows& x, float* converted) {
  if (x.dtype == Dtype::kFloat32) return x;
  for (int64_t m = 0; m < x.m; ++m) read_row(x, m, converted + m * x.k);
  return fp32_rows(converted, x.m, x.k);
}

template <typename Steps>
void run_steps(const Mlp& args, const Steps& steps, const Rows& x, const Rows* residual,
               const Destination& out, uint8_t* memory) {
  const BufferLayout sizes(args, x.m);
  const auto next = [&](int64_t bytes) {
    float* at = reinterpret_cast<float*>(memory);
    memory += bytes;
    return at;
  };
  float *normed = next(sizes.normed), *sum = next(sizes.sum), *inner = next(sizes.inner),
        *gate = next(sizes.gate), *outer = next(sizes.outer);
  const KernelTable& kernels = steps.kernels;
  const auto add_norm = [&](const Rows& y, const Rows* added, float* sums, const Norm& norm,
                            const Destination& to) {
    steps.by_rows([&] {
      const Rows values = in_fp32(y, normed);
      kernels.add_norm(static_cast<const float*>(values.data), values.stride, added, sums, norm, y.m, y.k,
                       to);
    });
  };

  Rows in = x;
  if (norms_x(args)) {
    add_norm(x, nullptr, nullptr, args.norm_in, fp32_destination(normed, x.k));
    in = fp32_rows(normed, x.m, x.k);
  }
  if (args.layer != nullptr) {
    steps.multiply(in, std::array{Product{args.layer, outer}});
    in = fp32_rows(outer, x.m, args.layer->weight.n);
    if (args.up == nullptr) return add_norm(in, residual, sum, args.norm_out, out);
    add_norm(in, residual, sum, args.norm_in, fp32_destination(normed, in.k));
    in = fp32_rows(normed, x.m, in.k);
  }
  if (args.gate != nullptr) {
    steps.multiply(in, std::array{Product{args.gate, gate}, Product{args.up, inner}});
    steps.by_rows([&] { kernels.multiply(inner, gate, x.m * args.up->weight.n); });
  } else {
    steps.multiply(in, std::array{Product{args.up, inner}});
  }
  steps.multiply(fp32_rows(inner, x.m, args.up->weight.n), std::array{Product{args.down, outer}});
  // After a first layer its result is the residual of the MLP: before its norm (pre-norm) or after it.
  const Rows first = fp32_rows(args.pre_norm ? sum : normed, x.m, args.down->weight.n);
  add_norm(fp32_rows(outer, x.m, args.down->weight.n), args.layer != nullptr ? &first : residual, outer,
           args.norm_out, out);
}

}  // namespace

MlpPlan plan_mlp(const Mlp& args, const Parallel& parallel) {
  const int64_t m = args.x.m;
  bool full_range = false;
  for_layers(args, [&](const PackedLayer& layer) { full_range |= layer.weight.full_range; });
  const KernelTable& kernels = kernels_of_rows(m, full_range);
  double microseconds = 0.0;
  for_layers(args, [&](const PackedLayer& layer) {
    microseconds += microseconds_to_multiply(kernels, m, layer.weight);
  });
  const int64_t threads = threads_for(microseconds, parallel);
  MlpPlan plan{};
  plan.kernels = &kernels;
  plan.threads = std::clamp<int64_t>(m / kLeastRows, 1, threads);
  if (plan.threads < threads) {
    plan.threads = 0;
    for_layers(args, [&](const PackedLayer& layer) {
      const Rows x{nullptr, Dtype::kFloat32, m, layer.weight.k, layer.weight.k, layer.rotation};
      const Linear product{x, layer.weight, false, nullptr, fp32_destination(nullptr, layer.weight.n)};
      plan.products_bytes = std::max(plan.products_bytes, plan_linear(product, parallel).workspace_bytes);
    });
    plan.products_bytes = piece_bytes<uint8_t>(plan.products_bytes);
    plan.workspace_bytes = plan.products_bytes + BufferLayout(args, m).bytes();
    return plan;
  }
  plan.pieces = plan.threads * divide_up(m, plan.threads * kernels.rows_at_once);
  const int64_t rows = divide_up(m, plan.pieces);
  plan.layout = layout_of_products(kernels, args, rows);
  plan.products_bytes = plan.layout.bytes();
  plan.workspace_bytes = plan.threads * (plan.products_bytes + BufferLayout(args, rows).bytes());
  return plan;
}

void mlp(const Mlp& args, const MlpPlan& plan, void* workspace, const Parallel& parallel) {
  const KernelTable& kernels = *plan.kernels;
  uint8_t* memory = static_cast<uint8_t*>(workspace);
  if (plan.threads == 0) {
    const CallSteps steps{kernels, parallel, memory};
    return run_steps(args, steps, args.x, args.residual, args.out, memory + plan.products_bytes);
  }
  const int64_t of_thread = plan.workspace_bytes / plan.threads;
  parallel.run(*kernels.scope, plan.threads, [&](int64_t t) {
    uint8_t* own = memory + t * of_thread;
    const PieceSteps steps{kernels, plan.layout, own};
    const auto [p0, p1] = share(plan.pieces, plan.threads, t);
    for (int64_t p = p0; p < p1; ++p) {
      const auto [m0, m1] = share(args.x.m, plan.pieces, p);
      Rows x = from_row(args.x, m0), residual{};
      x.m = m1 - m0;
      if (args.residual != nullptr) residual = from_row(*args.residual, m0);
      run_steps(args, steps, x, args.residual != nullptr ? &residual : nullptr, from_row(args.out, m0),
                own + plan.products_bytes);
    }
  });
}

}  // namespace dynquant::cpu
