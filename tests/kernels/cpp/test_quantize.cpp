// The drivers on rows of x and of a weight against plain loops, on every instruction set and Parallel.
#include "cpu/quantize.h"

#include <doctest/doctest.h>

#include "buffers.h"
#include "cpu/isa/dispatch.h"
#include "isas.h"
#include "reference.h"
#include "threads.h"

namespace kernel_tests {
namespace {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

// Rows of normal values in a dtype, in guarded memory, with a gap behind each; values: as decoded.
struct Input {
  dynquant::Rows rows;
  Guarded<uint8_t> memory;
  Floats values;
};

Input make_input(int64_t m, int64_t k, Dtype dtype, Rotation rotation, uint32_t seed, bool special) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.3f, 2.0f);
  Floats values(index(m * k));
  for (float& value : values) value = normal(generator);
  if (special) {  // in rows 1, 2, 3
    const float extremes[] = {NAN, -INFINITY, 0x1p-140f};
    for (int64_t i = 1; i < m && i <= 3; ++i) values[index(i * k + k - 1)] = extremes[i - 1];
  }
  const std::vector<uint8_t> encoded = encode(values, dtype);
  const int64_t size = dynquant::element_size(dtype), gap = 5;
  Guarded<uint8_t> memory(((k + gap) * (m - 1) + k) * size);
  for (int64_t i = 0; i < m; ++i) {
    std::memcpy(memory.data() + i * (k + gap) * size, &encoded[index(i * k * size)], index(k * size));
  }
  for (int64_t i = 0; i < m * k; ++i) values[index(i)] = decode(encoded.data(), i, dtype);
  const dynquant::Rows rows{memory.data(), dtype, m, k, k + gap, rotation};
  return Input{rows, std::move(memory), std::move(values)};
}

// Calls check(threads) on every instruction set; one Parallel is enough for a call that stays on one thread.
template <typename Check>
void everywhere(bool threaded, const Check& check) {
  const std::string before = dynquant::cpu::isa();
  for (const std::string& isa : runnable_kernels()) {
    INFO(isa);
    dynquant::cpu::set_isa(isa);
    for (const auto& threads : all_threads()) {
      if (!threaded && threads != all_threads().front()) continue;
      INFO(threads->name());
      check(*threads);
    }
  }
  dynquant::cpu::set_isa(before);
}

struct Size {
  int64_t m, k;
  bool threaded;  // enough work for several threads
};
constexpr Size kSizes[] = {{1, 1, false}, {4, 15, false}, {4, 64, false}, {5, 133, false}, {37, 9000, true}};

}  // namespace

TEST_SUITE("quantize") {
  TEST_CASE("ranges of rows and of all of x") {
    for (const auto [m, k, threaded] : kSizes) {
      for (const Dtype dtype : kDtypes) {
        for (const bool special : {false, true}) {
          const Input x = make_input(m, k, dtype, {}, 21, special);
          everywhere(threaded, [&, m = m, k = k](const Threads& threads) {
            Guarded<float> lo(m), hi(m);
            min_max_rows(x.rows, lo.data(), hi.data(), threads);
            for (int64_t i = 0; i < m; ++i) {
              const Range expected = range_of(&x.values[index(i * k)], k);
              CHECK(same_bits(lo[i], expected.lo));
              CHECK(same_bits(hi[i], expected.hi));
            }
            const dynquant::cpu::RowsPlan plan = plan_min_max(x.rows, 1, threads);
            Guarded<uint8_t> workspace(plan.workspace_bytes);
            const Range all = min_max(x.rows, plan, workspace.data(), threads);
            const Range expected = range_of(x.values.data(), m * k);
            CHECK(same_bits(all.lo, expected.lo));
            CHECK(same_bits(all.hi, expected.hi));
          });
        }
      }
    }
  }

  TEST_CASE("qparams of every kind of range") {
    const std::vector<Range> ranges = {{0.0f, 0.0f},
                                       {-1.0f, 1.0f},
                                       {0.0f, 255.0f},
                                       {-255.0f, 0.0f},
                                       {-0x1p-149f, 0x1p-149f},
                                       {0.0f, 0x1p-126f},
                                       {-3e38f, 3e38f},
                                       {-0x1p-100f, 1.0f},
                                       {-1.0f, 0x1p-100f},
                                       {0.0f, INFINITY},
                                       {-INFINITY, 0.0f},
                                       {NAN, NAN},
                                       {-0.5f, 254.5f},
                                       {-1.5f / 255.0f, 253.5f / 255.0f}};
    Guarded<float> lo(int64_t(ranges.size())), hi(lo.size()), scale(lo.size());
    Guarded<int32_t> zero_point(lo.size());
    for (int64_t i = 0; i < lo.size(); ++i) lo[i] = ranges[index(i)].lo, hi[i] = ranges[index(i)].hi;
    dynquant::cpu::choose_qparams(lo.data(), hi.data(), lo.size(), scale.data(), zero_point.data());
    for (int64_t i = 0; i < lo.size(); ++i) {
      const QParams expected = qparams_of(ranges[index(i)]);
      CHECK(same_bits(scale[i], expected.scale));
      CHECK(zero_point[i] == expected.zero_point);
    }
  }

  TEST_CASE("quantized rows, saturated, with qparams per row and for all") {
    for (const auto [m, k, threaded] : kSizes) {
      for (const Dtype dtype : kDtypes) {
        const Input x = make_input(m, k, dtype, {}, 22, true);
        Guarded<float> scale(m);
        Guarded<int32_t> zero_point(m);
        for (int64_t i = 0; i < m; ++i) {
          scale[i] = i % 5 == 4 ? NAN : 0.003f * static_cast<float>(i + 1);
          zero_point[i] = static_cast<int32_t>(i * 67 % 256) - 128;
        }
        everywhere(threaded, [&, m = m, k = k](const Threads& threads) {
          for (const bool per_row : {true, false}) {
            Guarded<int8_t> q(m * k);
            dynquant::cpu::quantize(x.rows, scale.data(), zero_point.data(), per_row, q.data(), threads);
            CHECK(q.intact());
            for (int64_t i = 0; i < m * k; ++i) {
              const int64_t row = per_row ? i / k : 0;
              const int8_t expected = quantize_value(x.values[index(i)], {scale[row], zero_point[row]});
              if (q[i] != expected)
                FAIL_CHECK("q[" << i << "] of " << x.values[index(i)] << " = " << int(q[i]) << ", expected "
                                << int(expected));
            }
          }
        });
      }
    }
  }

  TEST_CASE("rotated rows, and rows read as fp32") {
    for (int block = 1; block <= 128; block *= 2) {
      for (const Dtype dtype : kDtypes) {
        for (const int64_t blocks : {1, 3, 70}) {
          const int64_t m = blocks == 70 ? 40 : 4, k = block * blocks;
          const Rotation rotation{block, blocks != 1};
          const Input x = make_input(m, k, dtype, rotation, 23, true);
          everywhere(blocks == 70 && block == 64, [&](const Threads& threads) {
            Guarded<float> out(m * k), row(k);
            dynquant::cpu::rotate(x.rows, out.data(), threads);
            CHECK(out.intact());
            for (int64_t i = 0; i < m; ++i) {
              Floats expected(x.values.begin() + i * k, x.values.begin() + (i + 1) * k);
              dynquant::cpu::read_row(x.rows, i, row.data());
              for (int64_t j = 0; j < k; ++j) {
                if (!same_bits(row[j], expected[index(j)])) FAIL_CHECK("row " << i << ", element " << j);
              }
              rotate_row(expected.data(), k, rotation);
              for (int64_t j = 0; j < k; ++j) {
                if (!same_bits(out[i * k + j], expected[index(j)]))
                  FAIL_CHECK("block " << block << ", row " << i << ", element " << j);
              }
            }
          });
        }
      }
    }
  }

  TEST_CASE("weights, rotated or not, with a scale per channel or for all") {
    for (const auto [n, k, threaded] :
         {Size{1, 1, false}, {5, 37, false}, {7, 128, false}, {40, 8192, true}}) {
      for (const int block : {0, 1, 8, 128}) {
        if (block > 0 && k % block != 0) continue;
        for (const Dtype dtype : kDtypes) {
          const Rotation rotation{block, block > 0 && n != 7};
          const Input w = make_input(n, k, dtype, rotation, 24, false);
          Floats values = w.values;
          if (block > 0) {
            for (int64_t i = 0; i < n; ++i) rotate_row(&values[index(i * k)], k, rotation);
            for (float& value : values) value *= 1.0f / static_cast<float>(block);
          }
          Floats magnitudes(index(n));
          for (int64_t i = 0; i < n * k; ++i) {
            magnitudes[index(i / k)] = std::max(magnitudes[index(i / k)], std::fabs(values[index(i)]));
          }
          everywhere(threaded, [&, n = n, k = k](const Threads& threads) {
            for (const bool per_tensor : {false, true}) {
              Guarded<float> scale(per_tensor ? 1 : n);
              Guarded<int8_t> q(n * k);
              const dynquant::cpu::QuantizeWeight args{w.rows, per_tensor, scale.data(), q.data()};
              const dynquant::cpu::RowsPlan plan = plan_quantize_weight(args, threads);
              Guarded<uint8_t> workspace(plan.workspace_bytes);
              REQUIRE(quantize_weight(args, plan, workspace.data(), threads) == -1);
              CHECK(q.intact());
              float most = 0.0f;
              for (const float magnitude : magnitudes) most = std::max(most, magnitude);
              for (int64_t i = 0; i < n; ++i) {
                const float expected = weight_scale_of(per_tensor ? most : magnitudes[index(i)]);
                REQUIRE(same_bits(scale[per_tensor ? 0 : i], expected));
                for (int64_t j = i * k; j < (i + 1) * k; ++j) {
                  if (q[j] != quantize_weight_value(values[index(j)], expected)) {
                    FAIL_CHECK("q[" << j << "] = " << int(q[j]));
                  }
                }
              }
            }
          });
        }
      }
    }
  }

  TEST_CASE("the first row with a non-finite weight is named") {
    Input w = make_input(6, 33, Dtype::kFloat32, {}, 25, false);
    const float nan = NAN;
    std::memcpy(w.memory.data() + (4 * w.rows.stride + 32) * 4, &nan, 4);
    std::memcpy(w.memory.data() + (3 * w.rows.stride + 7) * 4, &nan, 4);
    everywhere(true, [&](const Threads& threads) {
      Guarded<float> scale(6);
      Guarded<int8_t> q(6 * 33);
      const dynquant::cpu::QuantizeWeight args{w.rows, false, scale.data(), q.data()};
      const dynquant::cpu::RowsPlan plan = plan_quantize_weight(args, threads);
      Guarded<uint8_t> workspace(plan.workspace_bytes);
      CHECK(quantize_weight(args, plan, workspace.data(), threads) == 3);
    });
  }
}

}  // namespace kernel_tests
