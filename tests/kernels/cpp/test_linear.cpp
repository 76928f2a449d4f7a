// linear and int8_mm on every instruction set and Parallel against three loops, the same bits: shapes around the
// tiles, blocks and panels; memory of the exact size before pages without access; poisoned outputs.
#include "cpu/linear.h"

#include <doctest/doctest.h>

#include "buffers.h"
#include "cpu/isa/dispatch.h"
#include "cpu/pack.h"
#include "isas.h"
#include "reference.h"
#include "threads.h"

namespace kernel_tests {
namespace {

using dynquant::cpu::panel_width;

struct Shape {
  int64_t m, k, n;
  const char* purpose;
};

const Shape kShapes[] = {
    {1, 1, 1, "the least of everything"},
    {1, 37, 17, "one row, rests of K and N"},
    {1, 768, 65, "one row, a panel and one channel"},
    {2, 4, 64, "one group, one panel"},
    {3, 3, 3, "less than a group"},
    {5, 130, 33, "few rows, two narrow panels"},
    {7, 1157, 161, "the most of few rows, K blocked, a rest"},
    {8, 1541, 70, "the first of many rows, several blocks of a plan"},
    {13, 64, 16, "tiles of unequal height"},
    {24, 1300, 64, "the most rows that block K"},
    {49, 100, 100, "one row more than a piece"},
    {2, 66400, 5, "K beyond int32"},
    {1, 66400, 20, "K beyond int32, one row"},
};

// Enough work for several threads: cut along rows, along channels, along both.
const Shape kThreadedShapes[] = {
    {97, 260, 320, "rows"},
    {1, 1500, 2100, "channels of one row"},
    {30, 700, 900, "channels"},
    {70, 600, 700, "rows and channels"},
};

enum class Activations { kPerToken, kPerTensor, kStatic };

struct Case {
  Shape shape;
  Dtype in, out;
  Rotation rotation;
  Activations activations;
  Epilogue epilogue;
  bool bias;
  int64_t gap;              // elements between rows of x and of the output
  bool full_range = false;  // weights with -128
};

Floats random_floats(int64_t count, std::mt19937& generator, float mean, float spread) {
  std::normal_distribution<float> normal(mean, spread);
  Floats values(index(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// With full_range every fourth weight is -128.
Bytes random_weight(int64_t count, bool full_range, std::mt19937& generator) {
  Bytes weight(index(count));
  for (int8_t& value : weight) {
    const bool lowest = full_range && generator() % 4 == 0;
    value = lowest ? int8_t{-128} : static_cast<int8_t>(static_cast<int>(generator() % 255) - 127);
  }
  return weight;
}

// Rows of x in its dtype, `gap` poisoned elements behind each but the last.
Guarded<uint8_t> with_gaps(const std::vector<uint8_t>& bytes, int64_t m, int64_t row_bytes,
                           int64_t gap_bytes) {
  Guarded<uint8_t> rows(m * row_bytes + (m - 1) * gap_bytes);
  for (int64_t i = 0; i < m; ++i) {
    std::memcpy(rows.data() + i * (row_bytes + gap_bytes), &bytes[index(i * row_bytes)], index(row_bytes));
  }
  return rows;
}

// A layer and its input in guarded memory, with the expected output.
struct Prepared {
  Forward forward;
  Floats expected;
  QParams given{0.03f, -7};
  int64_t panel;
  Guarded<uint8_t> x;
  Guarded<int8_t> packed;
  Guarded<int32_t> sums;
  Guarded<float> scale, bias;
};

Prepared prepare(const Case& c, std::mt19937& generator) {
  const auto [m, k, n, purpose] = c.shape;
  Floats x = random_floats(m * k, generator, 0.3f, 2.0f);
  if (m > 2) x[index(k + k / 2)] = generator() % 2 == 0 ? NAN : INFINITY;
  const std::vector<uint8_t> encoded = encode(x, c.in);
  for (int64_t i = 0; i < m * k; ++i) x[index(i)] = decode(encoded.data(), i, c.in);
  Bytes weight = random_weight(n * k, c.full_range, generator);
  Floats scale = random_floats(n, generator, 0.01f, 0.002f);
  Floats bias = random_floats(c.bias ? n : 0, generator, 0.0f, 1.0f);
  const int64_t panel = panel_width(n), size = dynquant::element_size(c.in);
  Prepared p{Forward{x, m, k, n, c.rotation, c.activations == Activations::kPerTensor, nullptr, weight, scale,
                     bias, c.epilogue},
             {},
             {0.03f, -7},
             panel,
             with_gaps(encoded, m, k * size, c.gap * size),
             Guarded<int8_t>::copy_of(pack(weight, n, k, panel)),
             Guarded<int32_t>::copy_of(row_sums(weight, n, k)),
             Guarded<float>::copy_of(scale),
             Guarded<float>::copy_of(bias)};
  Forward reference = p.forward;
  if (c.activations == Activations::kStatic) reference.given = &p.given;
  p.expected = forward(reference);
  return p;
}

void check_linear(const Case& c, const Prepared& p, const Threads& threads) {
  const auto [m, k, n, purpose] = c.shape;
  const int64_t stride = n + c.gap, size = dynquant::element_size(c.out);
  Guarded<uint8_t> out((m * n + (m - 1) * c.gap) * size);
  const dynquant::cpu::Linear args{
      dynquant::Rows{p.x.data(), c.in, m, k, k + c.gap, c.rotation},
      dynquant::cpu::Weight{p.packed.data(), n, k, p.panel, p.sums.data(), p.scale.data(),
                            c.bias ? p.bias.data() : nullptr, c.full_range},
      c.activations == Activations::kPerTensor, c.activations == Activations::kStatic ? &p.given : nullptr,
      dynquant::cpu::Destination{out.data(), stride, c.out, c.epilogue}};
  const dynquant::cpu::LinearPlan plan = plan_linear(args, threads);
  REQUIRE(plan.workspace_bytes % 64 == 0);
  Guarded<uint8_t> workspace(plan.workspace_bytes);
  dynquant::cpu::linear(args, plan, workspace.data(), threads);

  CHECK(out.intact());
  CHECK(workspace.intact());
  const std::vector<uint8_t> expected = encode(p.expected, c.out);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < stride; ++j) {
      if (j >= n) {
        if (i + 1 == m) break;
        for (int64_t byte = 0; byte < size; ++byte) REQUIRE(out.is_poison((i * stride + j) * size + byte));
        continue;
      }
      const float y = decode(out.data(), i * stride + j, c.out),
                  wanted = decode(expected.data(), i * n + j, c.out);
      if (!same_bits(y, wanted)) {
        FAIL_CHECK("out[" << i << ", " << j << "] = " << y << ", expected " << wanted);
        return;
      }
    }
  }
}

void check_int8_mm(const Shape& shape, bool full_range, const Threads& threads, std::mt19937& generator) {
  const auto [m, k, n, purpose] = shape;
  Bytes q(index(m * k));
  for (int8_t& value : q) value = static_cast<int8_t>(generator());
  const Bytes weight = random_weight(n * k, full_range, generator);
  const auto rows = Guarded<int8_t>::copy_of(q);
  const auto packed = Guarded<int8_t>::copy_of(pack(weight, n, k, panel_width(n)));
  const auto sums = Guarded<int32_t>::copy_of(row_sums(weight, n, k));
  Guarded<int32_t> out(m * n);
  const dynquant::cpu::Int8Mm args{
      rows.data(), m,
      dynquant::cpu::Weight{packed.data(), n, k, panel_width(n), sums.data(), nullptr, nullptr, full_range},
      out.data()};
  const dynquant::cpu::Int8MmPlan plan = plan_int8_mm(args, threads);
  Guarded<uint8_t> workspace(plan.workspace_bytes);
  dynquant::cpu::int8_mm(args, plan, workspace.data(), threads);
  CHECK(out.intact());
  const std::vector<int64_t> expected = multiply(q, weight, m, n, k);
  for (int64_t i = 0; i < m * n; ++i) {
    if (out[i] != expected[index(i)]) {
      FAIL_CHECK("out[" << i / n << ", " << i % n << "] = " << out[i] << ", expected " << expected[index(i)]);
      return;
    }
  }
}

template <typename Check>
void on_every_isa(const Check& check) {
  const std::string before = dynquant::cpu::isa();
  for (const std::string& isa : runnable_kernels()) {
    INFO(isa);
    dynquant::cpu::set_isa(isa);
    check();
  }
  dynquant::cpu::set_isa(before);
}

void check_on_every_isa(const Case& c, const std::vector<const Threads*>& callers, std::mt19937& generator) {
  const Prepared prepared = prepare(c, generator);
  on_every_isa([&] {
    for (const Threads* threads : callers) {
      INFO(threads->name());
      check_linear(c, prepared, *threads);
    }
  });
}

std::vector<const Threads*> every_caller() {
  std::vector<const Threads*> all;
  for (const auto& threads : all_threads()) all.push_back(threads.get());
  return all;
}

}  // namespace

TEST_SUITE("linear") {
  TEST_CASE("shapes by purpose, every dtype, range and epilogue in turn") {
    std::mt19937 generator(11);
    const StdThreads serial(1);
    int turn = 0;
    for (const Shape& shape : kShapes) {
      for (const Activations activations :
           {Activations::kPerToken, Activations::kPerTensor, Activations::kStatic}) {
        if (shape.k > 60000 && activations == Activations::kPerTensor) continue;
        const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
        const Case c{shape,
                     dtypes[turn % 3],
                     dtypes[(turn / 2) % 3],
                     {},
                     activations,
                     static_cast<Epilogue>(turn % 5),
                     turn % 4 != 3,
                     turn % 2 == 0 ? 0 : 3,
                     false};
        ++turn;
        INFO(shape.purpose);
        check_on_every_isa(c, {&serial}, generator);
        Case full = c;
        full.full_range = true;
        check_on_every_isa(full, {&serial}, generator);
      }
    }
  }

  TEST_CASE("every epilogue to every dtype, whole and partial tiles") {
    std::mt19937 generator(12);
    const StdThreads serial(1);
    for (int epilogue = 0; epilogue < 5; ++epilogue) {
      for (const Dtype out : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
        for (const int64_t m : {1, 5, 9}) {
          const Shape shape{m, 40, 75, "epilogue"};
          INFO(epilogue);
          check_on_every_isa(
              {shape, Dtype::kFloat32, out, {}, Activations::kPerToken, Epilogue(epilogue), true, 1},
              {&serial}, generator);
        }
      }
    }
  }

  TEST_CASE("rotated") {
    std::mt19937 generator(13);
    const StdThreads serial(1);
    for (int block = 1; block <= 128; block *= 2) {
      for (const Activations activations :
           {Activations::kPerToken, Activations::kPerTensor, Activations::kStatic}) {
        for (const Dtype in : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
          const Rotation rotation{block, in != Dtype::kFloat16};
          INFO(block);
          const Shape shape{block == 4 ? 9 : 2, block * 3, 20, "rotated"};
          check_on_every_isa({shape, in, Dtype::kFloat32, rotation, activations, Epilogue::kNone, true, 0},
                             {&serial}, generator);
        }
      }
    }
  }

  TEST_CASE("every Parallel gives the same bits") {
    std::mt19937 generator(14);
    for (const Shape& shape : kThreadedShapes) {
      for (const Activations activations : {Activations::kPerToken, Activations::kPerTensor}) {
        INFO(shape.purpose);
        check_on_every_isa(
            {shape, Dtype::kFloat32, Dtype::kBFloat16, Rotation{shape.k % 4 == 0 ? 4 : 0, shape.k % 4 == 0},
             activations, Epilogue::kRelu, true, 0},
            every_caller(), generator);
      }
    }
  }

  TEST_CASE("int8_mm") {
    std::mt19937 generator(15);
    on_every_isa([&] {
      for (const Shape& shape : kShapes) {
        INFO(shape.purpose);
        check_int8_mm(shape, false, StdThreads(1), generator);
        check_int8_mm(shape, true, StdThreads(1), generator);
      }
      for (const Shape& shape : kThreadedShapes) {
        INFO(shape.purpose);
        for (const auto& threads : all_threads()) {
          if (threads->threads() != 3 && threads->threads() != 4) continue;
          check_int8_mm(shape, false, *threads, generator);
        }
      }
    });
  }

  TEST_CASE("an instruction set that this CPU lacks is refused by name") {
    CHECK_THROWS_WITH_AS(dynquant::cpu::set_isa("mmx"), doctest::Contains("got 'mmx'"),
                         std::invalid_argument);
  }
}

}  // namespace kernel_tests
