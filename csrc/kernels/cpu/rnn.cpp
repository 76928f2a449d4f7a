#include "cpu/rnn.h"

#include <algorithm>
#include <array>

#include "cpu/isa/dispatch.h"
#include "cpu/linear.h"
#include "cpu/partition.h"
#include "cpu/product_steps.h"
#include "cpu/row_pieces.h"

namespace dynquant::cpu {
namespace {

// Sequences that a thread must have to be worth reading the weight on its own.
constexpr int64_t kLeastSequences = 4;

// Time steps [step0, step1), of rows [row0, row1) of x.
struct Chunk {
  int64_t step0, step1, row0, row1;

  int64_t rows() const { return row1 - row0; }
};

// Calls body(chunk) for all time steps in their order, as many at a time as have `rows` rows together.
template <typename Body>
void for_chunks(const Rnn& args, int64_t rows, const Body& body) {
  Chunk chunk{0, 0, 0, 0};
  if (args.reverse) chunk = {args.steps, args.steps, args.x.m, args.x.m};
  for (int64_t i = 0; i < args.steps; ++i) {
    if (args.reverse) {
      chunk.row0 -= args.size_at(--chunk.step0);
    } else {
      chunk.row1 += args.size_at(chunk.step1++);
    }
    if (chunk.rows() < rows && i + 1 < args.steps) continue;
    body(chunk);
    if (args.reverse) {
      chunk.step1 = chunk.step0, chunk.row1 = chunk.row0;
    } else {
      chunk.step0 = chunk.step1, chunk.row0 = chunk.row1;
    }
  }
}

// The products of the input of a chunk, [rows][gated], over all threads.
struct InputProduct {
  const Rnn& args;
  const Parallel& parallel;
  Rows x;

  InputProduct(const Rnn& rnn, const Chunk& chunk, const Parallel& threads)
      : args(rnn), parallel(threads), x(from_row(rnn.x, chunk.row0)) {
    x.m = chunk.rows();
  }

  int64_t workspace_bytes() const {
    if (args.float_input != nullptr) return threads_of_float() * float_bytes();
    return plan_linear(CallSteps::linear_of(x, {args.input_layer, nullptr}), parallel).workspace_bytes;
  }

  void run(float* out, uint8_t* memory) const {
    if (args.float_input == nullptr) {
      const Linear product = CallSteps::linear_of(x, {args.input_layer, out});
      return linear(product, plan_linear(product, parallel), memory, parallel);
    }
    const int64_t threads = threads_of_float(), blocks = blocks_of(args.gated());
    parallel.run(*kernels().scope, threads, [&](int64_t t) {
      const auto [begin, end] = share(blocks, threads, t);
      float* scratch = reinterpret_cast<float*>(memory + t * float_bytes());
      kernels().linear_fp32(x, *args.float_input, out, scratch, begin, end);
    });
  }

 private:
  // Threads share out the channels: each reads all rows, which are narrow.
  int64_t threads_of_float() const {
    constexpr double kSlowerThanInt8 = 4.0;
    const double operations = 2.0 * static_cast<double>(x.m) * static_cast<double>(x.k * args.gated());
    const double microseconds = kSlowerThanInt8 * operations / (kernels().gops * 1e3);
    return std::min(threads_for(microseconds, parallel), blocks_of(args.gated()));
  }

  int64_t float_bytes() const { return piece_bytes<float>(kernels().linear_fp32_scratch(x.m, x.k)); }
};

// Calls body(layer) for the layers of a time step.
template <typename Body>
void for_step_layers(const Rnn& args, const Body& body) {
  body(args.hidden_layer);
  if (args.projection != nullptr) body(*args.projection);
}

// Calls body(number of sequences) for the numbers that a part of up to `most` sequences may have in a step.
template <typename Body>
void for_row_counts(const Rnn& args, int64_t most, const Body& body) {
  const int64_t fewest = args.sizes != nullptr ? 1 : std::max<int64_t>(1, most - 1);
  for (int64_t rows = fewest; rows <= most; ++rows) body(rows);
}

// Bytes of the fp32 rows between the products of a step, in memory order.
struct BufferLayout {
  int64_t from_hidden, unprojected;

  BufferLayout(const Rnn& args, int64_t rows)
      : from_hidden(piece_bytes<float>(rows * args.hidden_layer.weight.n)),
        unprojected(args.projection == nullptr ? 0 : piece_bytes<float>(rows * args.hidden())) {}

  int64_t bytes() const { return from_hidden + unprojected; }
};

// A time step of sequences [m0, m0 + rows), from the products of their input, to rows of `out`.
template <typename Steps>
void run_step(const Rnn& args, const Steps& steps, int64_t m0, int64_t rows, const float* from_input,
              const Destination& out, uint8_t* memory) {
  const int64_t hidden = args.hidden(), size = args.hidden_layer.weight.k;
  float* from_hidden = reinterpret_cast<float*>(memory);
  float* h = args.h + m0 * size;
  float* unprojected = h;
  if (args.projection != nullptr) {
    unprojected = reinterpret_cast<float*>(memory + BufferLayout(args, rows).from_hidden);
  }
  steps.multiply(fp32_rows(h, rows, size), std::array{Product{&args.hidden_layer, from_hidden}});
  const RnnStep step{args.cell,
                     rows,
                     hidden,
                     from_input,
                     from_hidden,
                     unprojected,
                     args.c == nullptr ? nullptr : args.c + m0 * hidden};
  constexpr double kGatesPerMicrosecond = 500.0;
  const double gates = static_cast<double>(rows) * static_cast<double>(args.hidden_layer.weight.n);
  // Shares are whole cache lines.
  const int64_t lines = divide_up(hidden, 16);
  steps.share_out(lines, gates / kGatesPerMicrosecond, [&](int64_t begin, int64_t end) {
    steps.kernels.rnn_step(step, begin * 16, std::min(end * 16, hidden));
  });
  if (args.projection != nullptr) {
    steps.multiply(fp32_rows(unprojected, rows, hidden), std::array{Product{args.projection, h}});
  }
  steps.by_rows([&] {
    steps.kernels.add_norm(h, size, nullptr, nullptr, Norm{NormKind::kNone, nullptr, nullptr, 0.0f}, rows,
                           size, out);
  });
}

// Calls body(step, its first row in the chunk) for the steps of a chunk in their order.
template <typename Body>
void for_steps(const Rnn& args, const Chunk& chunk, const Body& body) {
  int64_t row = args.reverse ? chunk.rows() : 0;
  for (int64_t i = chunk.step0; i < chunk.step1; ++i) {
    const int64_t step = args.reverse ? chunk.step1 - 1 - (i - chunk.step0) : i;
    if (args.reverse) row -= args.size_at(step);
    body(step, row);
    if (!args.reverse) row += args.size_at(step);
  }
}

// The steps of a chunk on the calling thread, for sequences [m0, m1).
void run_part(const Rnn& args, const RnnPlan& plan, const Chunk& chunk, int64_t m0, int64_t m1,
              const float* from_input, uint8_t* memory) {
  for_steps(args, chunk, [&](int64_t step, int64_t row) {
    const int64_t rows = std::min(m1, args.size_at(step)) - m0;
    if (rows <= 0) return;
    const PieceSteps steps{kernels_of_rows(rows, args.full_range()), plan.layout, memory};
    run_step(args, steps, m0, rows, from_input + (row + m0) * args.gated(),
             from_row(args.out, chunk.row0 + row + m0), memory + plan.products_bytes);
  });
}

int64_t rows_of_part(const Rnn& args, int64_t parts) { return divide_up(args.batch, parts); }

}  // namespace

RnnPlan plan_rnn(const Rnn& args, const Parallel& parallel) {
  double of_step = 0.0;
  for_step_layers(args, [&](const PackedLayer& layer) {
    of_step +=
        microseconds_to_multiply(kernels_of_rows(args.batch, args.full_range()), args.batch, layer.weight);
  });
  const bool has_one_range =
      args.hidden_layer.per_tensor || (args.projection != nullptr && args.projection->per_tensor);
  const int64_t threads = threads_for(of_step * static_cast<double>(args.steps), parallel);
  RnnPlan plan{};
  plan.parts = has_one_range ? 1 : std::clamp<int64_t>(args.batch / kLeastSequences, 1, threads);
  if (plan.parts == 1 && threads_for(of_step, parallel) > 1) plan.parts = 0;

  const int64_t rows = rows_of_part(args, std::max<int64_t>(1, plan.parts));
  for_row_counts(args, rows, [&](int64_t count) {
    for_step_layers(args, [&](const PackedLayer& layer) {
      if (plan.parts > 0) {
        plan.layout = widened(plan.layout, kernels_of_rows(count, args.full_range()), layer, count);
        return;
      }
      const Rows x = fp32_rows(nullptr, count, layer.weight.k);
      const Linear product = CallSteps::linear_of(x, {&layer, nullptr});
      plan.products_bytes = std::max(plan.products_bytes, plan_linear(product, parallel).workspace_bytes);
    });
  });
  plan.products_bytes = piece_bytes<uint8_t>(plan.parts > 0 ? plan.layout.bytes() : plan.products_bytes);

  // Enough rows for a thread to multiply the input at full speed; all of them where they have one range.
  const bool input_has_one_range = args.input_layer != nullptr && args.input_layer->per_tensor;
  plan.rows = input_has_one_range ? args.x.m : threads * kernels().rows_at_once;
  int64_t most_rows = 0, most_bytes = 0;
  for_chunks(args, plan.rows, [&](const Chunk& chunk) {
    most_rows = std::max(most_rows, chunk.rows());
    most_bytes = std::max(most_bytes, InputProduct(args, chunk, parallel).workspace_bytes());
  });
  plan.input_bytes = piece_bytes<float>(most_rows * args.gated());
  const int64_t of_part = plan.products_bytes + BufferLayout(args, rows).bytes();
  // The workspace of the input's products is free again when the steps begin.
  plan.workspace_bytes = plan.input_bytes + std::max(piece_bytes<uint8_t>(most_bytes),
                                                     std::max<int64_t>(1, plan.parts) * of_part);
  return plan;
}

void rnn(const Rnn& args, const RnnPlan& plan, void* workspace, const Parallel& parallel) {
  float* from_input = static_cast<float*>(workspace);
  uint8_t* memory = static_cast<uint8_t*>(workspace) + plan.input_bytes;
  const int64_t parts = std::max<int64_t>(1, plan.parts);
  const int64_t of_part = plan.products_bytes + BufferLayout(args, rows_of_part(args, parts)).bytes();
  for_chunks(args, plan.rows, [&](const Chunk& chunk) {
    InputProduct(args, chunk, parallel).run(from_input, memory);
    if (plan.parts > 0) {
      parallel.run(*kernels().scope, parts, [&](int64_t t) {
        const auto [m0, m1] = share(args.batch, parts, t);
        run_part(args, plan, chunk, m0, m1, from_input, memory + t * of_part);
      });
      return;
    }
    for_steps(args, chunk, [&](int64_t step, int64_t row) {
      const int64_t rows = args.size_at(step);
      const CallSteps steps{kernels_of_rows(rows, args.full_range()), parallel, memory};
      run_step(args, steps, 0, rows, from_input + row * args.gated(), from_row(args.out, chunk.row0 + row),
               memory + plan.products_bytes);
    });
  });
}

}  // namespace dynquant::cpu
