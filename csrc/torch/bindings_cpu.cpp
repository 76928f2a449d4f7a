// The CPU ops: check, allocate, decide how many threads the work is worth, run the kernels.

#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernel_table.h"
#include "cpu/pack.h"
#include "threads.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

// ---- rows, outputs and scratch ----------------------------------------------------------------------------

// x as rows that the kernels can read; `owner` keeps the copy alive where one was needed (fp64, odd strides).
Rows rows_of(const Tensor& x, int rotation_block, Tensor& owner) {
  owner = x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x;
  const int64_t k = owner.size(-1);
  const bool strided_rows = owner.dim() == 2 && owner.stride(1) == 1;
  if (!strided_rows && !owner.is_contiguous()) owner = owner.contiguous();
  const auto type = owner.scalar_type();
  const Dtype dtype = type == at::kFloat      ? Dtype::kFloat32
                      : type == at::kBFloat16 ? Dtype::kBFloat16
                                              : Dtype::kFloat16;
  return Rows{owner.const_data_ptr(), strided_rows ? owner.stride(0) : k, k, dtype, rotation_block};
}

// Memory for the duration of a call: small calls use the stack, an allocation would cost as much as their
// work.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > static_cast<int64_t>(sizeof(small_))) {
      large_ = c10::GetCPUAllocator()->allocate(static_cast<size_t>(bytes));
    }
    at_ = large_ ? static_cast<uint8_t*>(large_.get()) : small_;
  }

  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    at_ += bytes_of<T>(count);
    return taken;
  }

  template <typename T>
  static int64_t bytes_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  alignas(64) uint8_t small_[8192];
  at::DataPtr large_;
  uint8_t* at_;
};

// ---- how the work is cut ----------------------------------------------------------------------------------

constexpr double kFloatsPerMicrosecond = 4e3;  // what one core finds the range of, or quantizes

// How a GEMM is cut: into rows first (each thread quantizes its own), into channels where there are too few.
struct Cut {
  int64_t row_parts, channel_parts;

  int64_t tasks() const { return row_parts * channel_parts; }
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t blocks_of(int64_t n) { return divide_up(n, kBlock); }

Cut cut_gemm(const Kernels& kernel, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kLeastRows = 24;
  const double weight = static_cast<double>(n) * static_cast<double>(k);
  const double microseconds =
      std::max(2.0 * static_cast<double>(m) * weight / (kernel.gops * 1e3), microseconds_to_read(weight));
  const int64_t threads = threads_for(microseconds);
  const int64_t row_parts = std::clamp<int64_t>(m / kLeastRows, 1, threads);
  return Cut{row_parts, std::clamp<int64_t>(threads / row_parts, 1, blocks_of(n))};
}

// All tiles of m rows, as many for each of `parts` threads.
RowTiles row_tiles(const Kernels& kernel, int64_t m, int64_t parts) {
  const int64_t of_part = divide_up(m, kernel.max_rows * parts);
  return {m, of_part * parts, 0, of_part * parts};
}

// Share t of `parts` of all tiles.
RowTiles share_of(RowTiles all, int64_t parts, int64_t t) {
  const auto [begin, end] = share(all.count, parts, t);
  return {all.m, all.count, begin, end};
}

// The operand of rows of k elements, in a call's scratch.
int64_t operand_bytes(const Kernels& kernel, RowTiles all, int64_t k) {
  return all.m * kernel.operand_stride(k) + all.count * kernel.plan_bytes(all.m, k);
}

Operand operand_at(const Kernels& kernel, uint8_t* at, int64_t m, int64_t k) {
  const int64_t stride = kernel.operand_stride(k);
  return {at, stride, at + m * stride, kernel.plan_bytes(m, k)};
}

// Bytes of GEMM scratch for each task.
int64_t gemm_scratch(const Kernels& kernel, const Cut& cut, int64_t m, int64_t k) {
  const int64_t rows = m / cut.row_parts + 2 * kernel.max_rows;  // tiles are shared out, and may be uneven
  return Scratch::bytes_of<int8_t>(kernel.gemm_scratch(m, k, rows));
}

// What rows are quantized into and multiplied from.
struct Workspace {
  Operand a;
  QParams* qparams;
  float* row;
  int8_t* gemm;
};

// How a workspace lies in memory.
class WorkspaceLayout {
 public:
  // Of m rows, or one less, that are multiplied by themselves. row: floats of scratch for one.
  WorkspaceLayout(const Kernels& kernel, int64_t m, int64_t k, int64_t row)
      : WorkspaceLayout(kernel, m, k, row, row_tiles(kernel, m, 1),
                        std::max(kernel.gemm_scratch(m, k, m), kernel.gemm_scratch(m - 1, k, m))) {}

  WorkspaceLayout(const Kernels& kernel, int64_t m, int64_t k, int64_t row, RowTiles tiles, int64_t gemm)
      : kernel_(kernel),
        m_(m),
        k_(k),
        operand_(Scratch::bytes_of<uint8_t>(operand_bytes(kernel, tiles, k))),
        qparams_(Scratch::bytes_of<QParams>(m)),
        row_(Scratch::bytes_of<float>(row)),
        gemm_(Scratch::bytes_of<int8_t>(gemm)) {}

  int64_t bytes() const { return operand_ + qparams_ + row_ + gemm_; }

  Workspace at(uint8_t* memory) const {
    uint8_t* qparams = memory + operand_;
    uint8_t* row = qparams + qparams_;
    return {operand_at(kernel_, memory, m_, k_), reinterpret_cast<QParams*>(qparams),
            reinterpret_cast<float*>(row), reinterpret_cast<int8_t*>(row + row_)};
  }

 private:
  const Kernels& kernel_;
  int64_t m_, k_, operand_, qparams_, row_, gemm_;
};

Rows from_row(const Rows& x, int64_t m) {
  Rows rest = x;
  rest.data = static_cast<const uint8_t*>(x.data) + m * x.stride * element_size(x.dtype);
  return rest;
}

Output from_row(const Output& out, int64_t m) {
  Output rest = out;
  rest.data = static_cast<uint8_t*>(out.data) + m * out.stride * element_size(out.dtype);
  return rest;
}

// ---- quantize ---------------------------------------------------------------------------------------------

// Scratch of the row that is being rotated, one for each thread.
int64_t row_scratch(const Rows& x) { return x.rotation_block > 0 ? row_floats(x.k) : 0; }

int64_t threads_over_rows(const Rows& x, int64_t m) {
  const double floats = static_cast<double>(m) * static_cast<double>(x.k);
  return std::min(m, threads_for(floats / kFloatsPerMicrosecond));
}

Range range_of_all(const Kernels& kernel, const Rows& x, int64_t m, int64_t threads) {
  const int64_t row = row_scratch(x);
  Scratch scratch(Scratch::bytes_of<float>(threads * row) + Scratch::bytes_of<Range>(threads));
  float* rows = scratch.take<float>(threads * row);
  Range* ranges = scratch.take<Range>(threads);
  run(threads, [&](int64_t t) {
    const auto [m0, m1] = share(m, threads, t);
    ranges[t] = kernel.min_max(x, m0, m1, rows + t * row);
  });
  Range all = ranges[0];
  for (int64_t t = 1; t < threads; ++t) {
    const Range r = ranges[t];
    if (std::isnan(r.lo) || std::isnan(all.lo)) return Range{std::nanf(""), std::nanf("")};
    all = Range{std::min(all.lo, r.lo), std::max(all.hi, r.hi)};
  }
  return all;
}

std::tuple<Tensor, Tensor> min_max(const Tensor& x, bool per_token) {
  check_float("min_max", "x", x);
  const Kernels& kernel = kernels();
  Tensor owner;
  const Rows rows = rows_of(x, 0, owner);
  const int64_t m = leading_size(x);
  const auto options = x.options().dtype(at::kFloat);
  Tensor lo = at::empty({per_token ? m : 1}, options), hi = at::empty({per_token ? m : 1}, options);
  float* lo_data = lo.mutable_data_ptr<float>();
  float* hi_data = hi.mutable_data_ptr<float>();
  if (!per_token) {
    const Range range = range_of_all(kernel, rows, m, std::max<int64_t>(1, threads_over_rows(rows, m)));
    *lo_data = range.lo;
    *hi_data = range.hi;
    return {lo, hi};
  }
  const int64_t threads = std::max<int64_t>(1, threads_over_rows(rows, m));
  run(threads, [&](int64_t t) {
    const auto [m0, m1] = share(m, threads, t);
    for (int64_t i = m0; i < m1; ++i) {
      const Range range = kernel.min_max(rows, i, i + 1, nullptr);
      lo_data[i] = range.lo;
      hi_data[i] = range.hi;
    }
  });
  return {lo, hi};
}

std::tuple<Tensor, Tensor> choose_qparams_op(const Tensor& lo, const Tensor& hi) {
  check_ranges("choose_qparams", lo, hi);
  const Tensor lows = lo.contiguous(), highs = hi.contiguous();
  Tensor scale = at::empty(lo.sizes(), lo.options()),
         zero_point = at::empty(lo.sizes(), lo.options().dtype(at::kInt));
  const FloatEnvironment environment;
  for (int64_t i = 0; i < lows.numel(); ++i) {
    const QParams q =
        choose_qparams(Range{lows.const_data_ptr<float>()[i], highs.const_data_ptr<float>()[i]});
    scale.mutable_data_ptr<float>()[i] = q.scale;
    zero_point.mutable_data_ptr<int32_t>()[i] = q.zero_point;
  }
  return {scale, zero_point};
}

Tensor quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point) {
  check_float("quantize", "x", x);
  const int64_t m = leading_size(x);
  check_qparams("quantize", m, scale, zero_point);
  check_device("quantize", x, "scale", scale);
  check_device("quantize", x, "zero_point", zero_point);
  const Kernels& kernel = kernels();
  Tensor owner;
  const Rows rows = rows_of(x, 0, owner);
  Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  const float* s = scales.const_data_ptr<float>();
  const int32_t* z = zero_points.const_data_ptr<int32_t>();
  int8_t* out = q.mutable_data_ptr<int8_t>();
  const bool per_row = scale.size(0) != 1;
  const int64_t threads = std::max<int64_t>(1, threads_over_rows(rows, m));
  run(threads, [&](int64_t t) {
    const auto [m0, m1] = share(m, threads, t);
    for (int64_t i = m0; i < m1; ++i) {
      const int64_t at = per_row ? i : 0;
      kernel.quantize(rows, i, QParams{s[at], z[at]}, out + i * rows.k, nullptr);
    }
  });
  return q;
}

Tensor rotate(const Tensor& x, int64_t block) {
  check_float("rotate", "x", x);
  check_rotation("rotate", x.size(-1), block);
  const Kernels& kernel = kernels();
  Tensor owner;
  const Rows rows = rows_of(x, static_cast<int>(block), owner);
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  float* data = out.mutable_data_ptr<float>();
  const int64_t m = leading_size(x), threads = std::max<int64_t>(1, threads_over_rows(rows, m));
  run(threads, [&](int64_t t) {
    const auto [m0, m1] = share(m, threads, t);
    for (int64_t i = m0; i < m1; ++i) kernel.rotate(rows, i, data + i * rows.k);
  });
  return out;
}

// ---- weights ----------------------------------------------------------------------------------------------

[[noreturn]] void report_non_finite(const Rows& weight, int64_t n) {
  const Rows plain{weight.data, weight.stride, weight.k, weight.dtype, 0};
  std::vector<float> values(static_cast<size_t>(weight.k));
  // The identity rotation reads any dtype as fp32.
  kernels().rotate(Rows{plain.data, plain.stride, plain.k, plain.dtype, 1}, n, values.data());
  for (int64_t k = 0; k < weight.k; ++k) {
    const float value = values[static_cast<size_t>(k)];
    TORCH_CHECK(std::isfinite(value), "quantize_weight: expected weight to be finite, got ", value,
                " at weight[", n, ", ", k, "]");
  }
  TORCH_CHECK(false, "quantize_weight: expected the rotated weight to be finite, but row ", n, " overflows");
}

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight, int64_t code) {
  const Config config = check_config(code);
  TORCH_CHECK(weight.dim() == 2, "quantize_weight: expected weight with 2 dimensions [N, K], got ",
              weight.dim());
  check_float("quantize_weight", "weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  if (config.rotation_block > 0) check_rotation("quantize_weight", k, config.rotation_block);
  const Kernels& kernel = kernels();
  Tensor owner;
  const Rows rows = rows_of(weight, config.rotation_block, owner);
  Tensor q = at::empty({n, k}, weight.options().dtype(at::kChar));
  Tensor scale = at::empty({config.weight_per_tensor ? 1 : n}, weight.options().dtype(at::kFloat));
  int8_t* q_data = q.mutable_data_ptr<int8_t>();
  float* scale_data = scale.mutable_data_ptr<float>();
  std::vector<float> largest(static_cast<size_t>(n));

  const auto scale_of = [](float magnitude) {
    return magnitude == 0.0f ? 1.0f : std::max(magnitude / 127.0f, 0x1p-126f);
  };
  const int64_t threads = std::max<int64_t>(1, threads_over_rows(rows, n)), row = row_scratch(rows);
  Scratch scratch(Scratch::bytes_of<float>(threads * row));
  float* row_data = scratch.take<float>(threads * row);
  run(threads, [&](int64_t t) {
    const auto [n0, n1] = share(n, threads, t);
    for (int64_t i = n0; i < n1; ++i) {
      const float magnitude = kernel.weight_range(rows, i, row_data + t * row);
      largest[static_cast<size_t>(i)] = magnitude;
      if (config.weight_per_tensor || !std::isfinite(magnitude)) continue;
      scale_data[i] = scale_of(magnitude);
      kernel.quantize_weight(rows, i, scale_data[i], q_data + i * k, row_data + t * row);
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(largest[static_cast<size_t>(i)])) report_non_finite(rows, i);
  }
  if (config.weight_per_tensor) {
    float magnitude = 0.0f;
    for (const float value : largest) magnitude = std::max(magnitude, value);
    *scale_data = scale_of(magnitude);
    run(threads, [&](int64_t t) {
      const auto [n0, n1] = share(n, threads, t);
      for (int64_t i = n0; i < n1; ++i) {
        kernel.quantize_weight(rows, i, *scale_data, q_data + i * k, row_data + t * row);
      }
    });
  }
  return {q, scale};
}

std::array<int64_t, 4> packed_shape(int64_t n, int64_t k) {
  const int64_t panel = panel_width(n);
  return {(n + panel - 1) / panel, (k + 3) / 4, panel, 4};
}

int64_t threads_to_pack(int64_t n, int64_t k) {
  constexpr double kPackedBytesPerMicrosecond = 2e3;
  return threads_for(static_cast<double>(n) * static_cast<double>(k) / kPackedBytesPerMicrosecond);
}

// The AVX2 products count on a weight that can change its sign.
void check_symmetric(const int8_t* weight, int64_t n, int64_t k) {
  int8_t lowest = 0;
  for (int64_t i = 0; i < n * k; ++i) lowest = std::min(lowest, weight[i]);
  if (lowest > -128) return;
  const int64_t at = std::find(weight, weight + n * k, static_cast<int8_t>(-128)) - weight;
  TORCH_CHECK(false, "pack_weight: expected weight in [-127, 127], got -128 at weight[", at / k, ", ", at % k,
              "]");
}

std::tuple<Tensor, Tensor> pack_weight(const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kChar && weight.dim() == 2,
              "pack_weight: expected weight to be int8 with 2 dimensions [N, K], got ",
              dtype_name(weight.scalar_type()), " with ", weight.dim());
  const int64_t n = weight.size(0), k = weight.size(1);
  const Tensor rows = weight.contiguous();
  check_symmetric(rows.const_data_ptr<int8_t>(), n, k);
  const auto shape = packed_shape(n, k);
  Tensor packed = at::empty(shape, weight.options()), sum = at::empty({n}, weight.options().dtype(at::kInt));
  const int64_t threads = std::min(std::max<int64_t>(1, shape[0]), threads_to_pack(n, k));
  run(threads, [&](int64_t t) {
    const auto [p0, p1] = share(shape[0], threads, t);
    pack_panels(rows.const_data_ptr<int8_t>(), n, k, shape[2], p0, p1, packed.mutable_data_ptr<int8_t>(),
                sum.mutable_data_ptr<int32_t>());
  });
  return {packed, sum};
}

Tensor unpack_weight(const Tensor& packed_weight, int64_t n, int64_t k) {
  const auto shape = packed_shape(n, k);
  check_packed("unpack_weight", packed_weight, shape, n, k);
  Tensor weight = at::empty({n, k}, packed_weight.options());
  const int64_t threads = std::min(std::max<int64_t>(1, shape[0]), threads_to_pack(n, k));
  run(threads, [&](int64_t t) {
    const auto [p0, p1] = share(shape[0], threads, t);
    unpack_panels(packed_weight.const_data_ptr<int8_t>(), n, k, shape[2], p0, p1,
                  weight.mutable_data_ptr<int8_t>());
  });
  return weight;
}

// ---- products ---------------------------------------------------------------------------------------------

Tensor int8_mm(const Tensor& q, const Tensor& packed_weight, const Tensor& weight_sum) {
  check_int8_mm(q, packed_weight, weight_sum);
  const int64_t m = q.size(0), k = q.size(1), n = weight_sum.numel();
  const auto shape = packed_shape(n, k);
  check_packed("int8_mm", packed_weight, shape, n, k);
  Tensor out = at::empty({m, n}, q.options().dtype(at::kInt));
  if (m == 0 || n == 0) return out;

  const Kernels& kernel = kernels_of_rows(m);
  const Tensor rows = q.contiguous();
  const Cut cut = cut_gemm(kernel, m, n, k);
  const RowTiles all = row_tiles(kernel, m, cut.row_parts);
  const int64_t bytes = operand_bytes(kernel, all, k), gemm_bytes = gemm_scratch(kernel, cut, m, k);
  Scratch scratch(Scratch::bytes_of<uint8_t>(bytes) + Scratch::bytes_of<int8_t>(cut.tasks() * gemm_bytes));
  const Operand a = operand_at(kernel, scratch.take<uint8_t>(bytes), m, k);
  int8_t* gemm_data = scratch.take<int8_t>(cut.tasks() * gemm_bytes);
  kernel.operand_from_int8(rows.const_data_ptr<int8_t>(), k, all, a);
  const Weight w{packed_weight.const_data_ptr<int8_t>(), n,       k,      shape[2],
                 weight_sum.const_data_ptr<int32_t>(),   nullptr, nullptr};
  int32_t* data = out.mutable_data_ptr<int32_t>();
  run(cut.tasks(), [&](int64_t t) {
    const RowTiles tiles = share_of(all, cut.row_parts, t / cut.channel_parts);
    const auto [b0, b1] = share(blocks_of(n), cut.channel_parts, t % cut.channel_parts);
    kernel.int8_mm(a, w, data, gemm_data + t * gemm_bytes, tiles, b0, b1);
  });
  return out;
}

// given: the qparams of linear_static, null for linear_dynamic.
Tensor linear(const char* op, const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
              const Tensor& weight_scale, const std::optional<Tensor>& bias, const QParams* given,
              int64_t code) {
  check_linear(op, x, packed_weight, weight_sum, weight_scale, bias);
  const Config config = check_config(code);
  const int64_t m = leading_size(x), n = weight_scale.size(0), k = x.size(-1);
  const auto shape = packed_shape(n, k);
  check_packed(op, packed_weight, shape, n, k);
  check_k(op, k, code);
  if (config.rotation_block > 0) check_rotation(op, k, config.rotation_block);

  // fp64 is computed through fp32.
  const at::ScalarType wanted = out_dtype(config, x);
  const at::ScalarType computed = wanted == at::kDouble ? at::kFloat : wanted;
  c10::SmallVector<int64_t, 5> out_shape(x.sizes().begin(), x.sizes().end());
  out_shape.back() = n;
  Tensor out = at::empty(out_shape, x.options().dtype(computed));
  if (m == 0 || n == 0) return wanted == computed ? out : out.to(wanted);

  const Kernels& kernel = kernels_of_rows(m);
  Tensor owner;
  const Rows rows = rows_of(x, config.rotation_block, owner);
  const Weight w{packed_weight.const_data_ptr<int8_t>(),
                 n,
                 k,
                 shape[2],
                 weight_sum.const_data_ptr<int32_t>(),
                 weight_scale.const_data_ptr<float>(),
                 bias.has_value() ? bias->const_data_ptr<float>() : nullptr};
  const Output to{out.mutable_data_ptr(), n,
                  computed == at::kFloat      ? Dtype::kFloat32
                  : computed == at::kBFloat16 ? Dtype::kBFloat16
                                              : Dtype::kFloat16,
                  config.epilogue};

  const Cut cut = cut_gemm(kernel, m, n, k);
  const bool per_tensor = given != nullptr || config.per_tensor;
  QParams shared{};
  if (given != nullptr) {
    shared = *given;
  } else if (config.per_tensor) {
    const FloatEnvironment environment;
    // Threads that will have rows of their own look at them before: these then lie in their caches.
    shared =
        choose_qparams(range_of_all(kernel, rows, m, std::max(cut.row_parts, threads_over_rows(rows, m))));
  }
  const auto quantize_rows = [&](const Rows& part, RowTiles tiles, const Workspace& work) {
    if (per_tensor) {
      kernel.quantize_per_tensor(part, tiles, shared, given != nullptr, work.a, work.qparams, work.row);
    } else {
      kernel.quantize_per_token(part, tiles, work.a, work.qparams, work.row);
    }
  };
  const int64_t blocks = blocks_of(n), row = row_scratch(rows);
  if (cut.channel_parts == 1) {
    // Each thread quantizes and multiplies some rows after the other: their operand stays next to the core.
    const int64_t pieces = cut.row_parts * divide_up(m, cut.row_parts * kernel.rows_at_once);
    const WorkspaceLayout layout(kernel, divide_up(m, pieces), k, row);
    Scratch scratch(cut.row_parts * layout.bytes());
    uint8_t* memory = scratch.take<uint8_t>(cut.row_parts * layout.bytes());
    run(cut.row_parts, [&](int64_t t) {
      const Workspace work = layout.at(memory + t * layout.bytes());
      const auto [p0, p1] = share(pieces, cut.row_parts, t);
      for (int64_t p = p0; p < p1; ++p) {
        const auto [m0, m1] = share(m, pieces, p);
        const RowTiles tiles = row_tiles(kernel, m1 - m0, 1);
        quantize_rows(from_row(rows, m0), tiles, work);
        kernel.linear(work.a, work.qparams, w, from_row(to, m0), work.gemm, tiles, 0, blocks);
      }
    });
  } else {
    const RowTiles all = row_tiles(kernel, m, cut.row_parts);
    const int64_t threads = std::max<int64_t>(1, threads_over_rows(rows, m));
    const int64_t gemm_bytes = gemm_scratch(kernel, cut, m, k);
    const WorkspaceLayout layout(kernel, m, k, threads * row, all, cut.tasks() * gemm_bytes);
    Scratch scratch(layout.bytes());
    const Workspace work = layout.at(scratch.take<uint8_t>(layout.bytes()));
    run(threads, [&](int64_t t) {
      Workspace mine = work;
      mine.row += t * row;
      quantize_rows(rows, share_of(all, threads, t), mine);
    });
    run(cut.tasks(), [&](int64_t t) {
      const auto [b0, b1] = share(blocks, cut.channel_parts, t % cut.channel_parts);
      const RowTiles tiles = share_of(all, cut.row_parts, t / cut.channel_parts);
      kernel.linear(work.a, work.qparams, w, to, work.gemm + t * gemm_bytes, tiles, b0, b1);
    });
  }
  return wanted == computed ? out : out.to(wanted);
}

Tensor linear_dynamic(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                      const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t config) {
  return linear("linear_dynamic", x, packed_weight, weight_sum, weight_scale, bias, nullptr, config);
}

Tensor linear_static(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                     const Tensor& weight_scale, const std::optional<Tensor>& bias, const Tensor& scale,
                     const Tensor& zero_point, int64_t config) {
  check_qparams("linear_static", 1, scale, zero_point);
  check_device("linear_static", x, "scale", scale);
  check_device("linear_static", x, "zero_point", zero_point);
  const QParams given{*scale.const_data_ptr<float>(), *zero_point.const_data_ptr<int32_t>()};
  TORCH_CHECK(-128 <= given.zero_point && given.zero_point <= 127,
              "linear_static: expected zero_point in [-128, 127], got ", given.zero_point);
  return linear("linear_static", x, packed_weight, weight_sum, weight_scale, bias, &given, config);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CPU, m) {
  m.impl("min_max", min_max);
  m.impl("choose_qparams", choose_qparams_op);
  m.impl("quantize", quantize);
  m.impl("rotate", rotate);
  m.impl("quantize_weight", quantize_weight);
  m.impl("pack_weight", pack_weight);
  m.impl("unpack_weight", unpack_weight);
  m.impl("int8_mm", int8_mm);
  m.impl("linear_dynamic", linear_dynamic);
  m.impl("linear_static", linear_static);
}

}  // namespace dynquant::cpu
