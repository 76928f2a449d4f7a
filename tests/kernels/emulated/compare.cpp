// Compares kernels, compiled over emulated intrinsics because this CPU may lack their instructions, with the
// scalar table, which other tests compare with the reference: every kernel, every dtype, all tails. Prints
// the first difference.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/pack.h"

namespace dynquant::cpu {
extern const KernelTable kScalar;
extern const KernelTable kAvx2;
extern const KernelTable kAvxVnni;
extern const KernelTable kAvx512VlVnni;
extern const KernelTable kAvx512Vnni;
}  // namespace dynquant::cpu

using namespace dynquant;
using namespace dynquant::cpu;

namespace {

std::mt19937 generator(123);
const char* isa = "";
int64_t checks = 0;

// The library runs without torch: its caller provides the threads, here the calling one.
class OneThread final : public Parallel {
 public:
  int64_t threads() const override { return 1; }
  bool in_region() const override { return false; }

 protected:
  void run_on_threads(int64_t tasks, const void* state,
                      void (*some)(const void* state, int64_t begin, int64_t end)) const override {
    some(state, 0, tasks);
  }
};

[[noreturn]] void fail(const char* what, int64_t m, int64_t k, int64_t n) {
  std::printf("%s differs from scalar: %s at M = %ld, K = %ld, N = %ld\n", isa, what, long(m), long(k),
              long(n));
  std::exit(1);
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {  // NaN equals NaN
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(T)) == 0) continue;
    if constexpr (std::is_same_v<T, float>) {
      if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    }
    return false;
  }
  ++checks;
  return true;
}

std::vector<float> random_floats(int64_t count, float scale) {
  std::normal_distribution<float> normal(0.3f, scale);
  std::vector<float> x(static_cast<size_t>(count) + 64);  // vectors of capacity, so that data() is never null
  for (float& value : x) value = normal(generator);
  return x;
}

// Bytes of x in a dtype: for the 16-bit dtypes, the top halves of fp32 patterns or any finite half patterns.
std::vector<uint8_t> rows_bytes(const std::vector<float>& x, Dtype dtype) {
  std::vector<uint8_t> bytes(x.size() * 4);
  if (dtype == Dtype::kFloat32) {
    std::memcpy(bytes.data(), x.data(), x.size() * 4);
    return bytes;
  }
  for (size_t i = 0; i < x.size(); ++i) {
    uint32_t pattern;
    std::memcpy(&pattern, &x[i], 4);
    uint16_t half = static_cast<uint16_t>(pattern >> 16);
    if (dtype == Dtype::kFloat16) half = static_cast<uint16_t>(generator() & 0xbfff);
    std::memcpy(&bytes[i * 2], &half, 2);
  }
  return bytes;
}

bool same_qparams(const std::vector<QParams>& a, const std::vector<QParams>& b, int64_t m) {
  std::vector<float> left, right;
  for (int64_t i = 0; i < m; ++i) {
    left.insert(left.end(), {a[size_t(i)].scale, float(a[size_t(i)].zero_point)});
    right.insert(right.end(), {b[size_t(i)].scale, float(b[size_t(i)].zero_point)});
  }
  return same(left, right);
}

struct Result {
  std::vector<float> out;
  std::vector<uint16_t> out16;
  std::vector<int32_t> acc;
  std::vector<QParams> qparams;
};

enum class Activations { kPerToken, kPerTensor, kStatic };

Result gemm(const KernelTable& kernel, const Rows& x, int64_t m, const Weight& w, Dtype out_dtype,
            Epilogue epilogue, Activations activations, const std::vector<int8_t>& q) {
  const int64_t stride = kernel.activation_stride(w.k), plan = kernel.plan_bytes(m, w.k);
  const int64_t count = (m + kernel.max_rows - 1) / kernel.max_rows;
  const RowTiles tiles{m, count, 0, count};
  std::vector<uint8_t> operand(static_cast<size_t>(m * stride + tiles.end * plan) + 64);
  std::vector<int8_t> scratch(static_cast<size_t>(kernel.gemm_scratch(m, w.k, m)) + 64);
  std::vector<float> row(static_cast<size_t>(row_floats(w.k)) + 64);
  Result r{std::vector<float>(size_t(m * w.n)), std::vector<uint16_t>(size_t(m * w.n)),
           std::vector<int32_t>(size_t(m * w.n)), std::vector<QParams>(size_t(m) + 1)};
  const PackedActivations a{operand.data(), stride, operand.data() + m * stride, plan};
  switch (activations) {
    case Activations::kPerToken: kernel.quantize_per_token(x, tiles, a, r.qparams.data(), row.data()); break;
    case Activations::kPerTensor: {
      const QParams own = choose_qparams(kernel.min_max(x, 0, m, row.data()));
      kernel.quantize_per_tensor(x, tiles, own, false, a, r.qparams.data(), row.data());
      break;
    }
    case Activations::kStatic:  // with some values outside the range
      kernel.quantize_per_tensor(x, tiles, QParams{0.01f, -7}, true, a, r.qparams.data(), row.data());
      break;
  }
  void* data =
      out_dtype == Dtype::kFloat32 ? static_cast<void*>(r.out.data()) : static_cast<void*>(r.out16.data());
  const int64_t blocks = (w.n + kBlock - 1) / kBlock;
  kernel.linear(a, r.qparams.data(), w, Destination{data, w.n, out_dtype, epilogue}, scratch.data(), tiles, 0,
                blocks);
  kernel.pack_int8(q.data(), w.k, tiles, a);
  kernel.int8_mm(a, w, r.acc.data(), scratch.data(), tiles, 0, blocks);
  return r;
}

void check(const KernelTable& kernel, int64_t m, int64_t k, int64_t n, Rotation rotation) {
  std::vector<float> x = random_floats(m * k, 2.0f);
  // Not always: with per_tensor, one such element makes the whole output NaN.
  if (m > 2 && generator() % 2 == 0) {
    x[static_cast<size_t>(k + k / 2)] = generator() % 2 == 0 ? NAN : INFINITY;
  }
  const std::vector<float> weights = random_floats(n * k, 1.0f), bias = random_floats(n, 1.0f);
  std::vector<float> row(static_cast<size_t>(row_floats(k)) + 64), row2 = row;

  // Weights.
  const Rows weight_rows{weights.data(), Dtype::kFloat32, n, k, k, rotation};
  std::vector<int8_t> q(size_t(n * k) + 64), q2 = q;
  std::vector<float> scales(size_t(n) + 64), scales2 = scales;
  for (int64_t i = 0; i < n; ++i) {
    scales[size_t(i)] = kScalar.weight_range(weight_rows, i, row.data()) / 127.0f;
    scales2[size_t(i)] = kernel.weight_range(weight_rows, i, row2.data()) / 127.0f;
    kScalar.quantize_weight(weight_rows, i, scales[size_t(i)], q.data() + i * k, row.data());
    kernel.quantize_weight(weight_rows, i, scales[size_t(i)], q2.data() + i * k, row2.data());
  }
  if (!same(scales, scales2)) fail("weight_range", m, k, n);
  if (!same(q, q2)) fail("quantize_weight", m, k, n);

  const int64_t panel = panel_width(n), panels = (n + panel - 1) / panel;
  std::vector<int8_t> packed(size_t(panels * panel * ((k + 3) / 4) * 4));
  std::vector<int32_t> sums(static_cast<size_t>(n));
  pack_weight(q.data(), n, k, packed.data(), sums.data(), OneThread());
  const std::vector<float> exact_scales(scales.begin(), scales.begin() + n);
  const Weight w{packed.data(), n, k, panel, sums.data(), exact_scales.data(), bias.data()};

  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    const std::vector<uint8_t> data = rows_bytes(x, dtype);
    const Rows rows{data.data(), dtype, m, k, k, rotation};
    for (int64_t i = 0; i < m; ++i) {
      const Range a = kScalar.min_max(rows, i, i + 1, row.data()),
                  b = kernel.min_max(rows, i, i + 1, row2.data());
      if (!same(std::vector<float>{a.lo, a.hi}, std::vector<float>{b.lo, b.hi})) fail("min_max", m, k, n);
      const QParams given{0.01f + 0.02f * float(i), int32_t(i % 256) - 128};
      std::vector<int8_t> s(static_cast<size_t>(k) + 64), t = s;
      kScalar.quantize(rows, i, given, s.data(), row.data());
      kernel.quantize(rows, i, given, t.data(), row2.data());
      if (!same(s, t)) fail("quantize", m, k, n);
      if (rotation.block > 0) {
        std::vector<float> u(static_cast<size_t>(k) + 64), v = u;
        kScalar.rotate(rows, i, u.data());
        kernel.rotate(rows, i, v.data());
        if (!same(u, v)) fail("rotate", m, k, n);
      }
    }
    std::vector<int8_t> operand(size_t(m * k) + 64);
    for (int8_t& value : operand) value = static_cast<int8_t>(generator() & 0xff);
    for (const auto activations : {Activations::kPerToken, Activations::kPerTensor, Activations::kStatic}) {
      const Epilogue epilogue = static_cast<Epilogue>(generator() % 5);
      const Result a = gemm(kScalar, rows, m, w, dtype, epilogue, activations, operand);
      const Result b = gemm(kernel, rows, m, w, dtype, epilogue, activations, operand);
      if (!same_qparams(a.qparams, b.qparams, m)) fail("qparams", m, k, n);
      if (!same(a.acc, b.acc)) fail("int8_mm", m, k, n);
      if (!same(a.out, b.out) || !same(a.out16, b.out16)) fail("linear", m, k, n);
    }
  }
}

}  // namespace

int main() {
  for (const KernelTable* kernel : {&kAvx2, kAvx2.few_rows, &kAvxVnni, &kAvx512VlVnni, &kAvx512Vnni}) {
    isa = kernel->name;
    for (const int64_t m : {1, 2, 3, 4, 5, 6, 7, 13, 26}) {
      for (const int64_t n : {1, 15, 16, 17, 64, 65, 100, 131}) check(*kernel, m, 37, n, kNoRotation);
    }
    for (int64_t k = 1; k < 140; k += 3) check(*kernel, 4, k, 33, kNoRotation);
    for (const int64_t k : {1, 31, 64, 767, 773, 1541}) check(*kernel, 14, k, 70, kNoRotation);
    for (const int64_t m : {2, 5, 7, 11, 24}) check(*kernel, m, 1157, 161, kNoRotation);
    for (int block = 1; block <= 128; block *= 2) {
      for (const bool signs : {false, true}) check(*kernel, 3, block * 3, 20, {block, signs});
    }
    check(*kernel, 2, 70001, 17, kNoRotation);
  }
  std::printf("%ld comparisons, all the same bits\n", long(checks));
  return 0;
}
