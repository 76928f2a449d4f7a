// The gate functions of recurrent layers, as dynquant/reference/rnn.py defines them. Included by
// generic/kernels.h.

// Calls body(sequence, first unit, number of units up to W).
template <typename Body>
DYNQUANT_INLINE void for_unit_vectors(int64_t m, int64_t unit0, int64_t unit1, const Body& body) {
  for (int64_t i = 0; i < m; ++i) {
    int64_t u = unit0;
    for (; u + W <= unit1; u += W) body(i, u, W);
    if (u < unit1) body(i, u, unit1 - u);
  }
}

// The products of the gates of a vector of units.
struct GateProducts {
  const float *from_input, *from_hidden;  // of the first gate
  int64_t hidden, count;

  DYNQUANT_INLINE GateProducts(const RnnStep& step, int64_t i, int64_t unit, int64_t units)
      : hidden(step.hidden), count(units) {
    const int64_t at = i * gates_of(step.cell) * hidden + unit;
    from_input = step.from_input + at;
    from_hidden = step.from_hidden + at;
  }

  DYNQUANT_INLINE F of_input(int gate) const { return load_up_to(from_input + gate * hidden, count); }
  DYNQUANT_INLINE F of_hidden(int gate) const { return load_up_to(from_hidden + gate * hidden, count); }
  DYNQUANT_INLINE F sum(int gate) const { return V::add(of_input(gate), of_hidden(gate)); }
};

void rnn_step(const RnnStep& step, int64_t unit0, int64_t unit1) {
  using Math = EpilogueMath<V>;
  const auto for_units = [&](const auto& body) {
    for_unit_vectors(step.m, unit0, unit1, [&](int64_t i, int64_t u, int64_t count) DYNQUANT_INLINE_LAMBDA {
      const int64_t at = i * step.hidden + u;
      body(GateProducts(step, i, u, count), at, count);
    });
  };
  switch (step.cell) {
    case RnnCell::kLstm:  // i, f, g, o
      return for_units([&](const GateProducts& gates, int64_t at, int64_t count) DYNQUANT_INLINE_LAMBDA {
        const F added = V::mul(Math::sigmoid(gates.sum(0)), Math::tanh(gates.sum(2)));
        const F c = V::fma(Math::sigmoid(gates.sum(1)), load_up_to(step.c + at, count), added);
        store_up_to(step.c + at, c, count);
        store_up_to(step.h + at, V::mul(Math::sigmoid(gates.sum(3)), Math::tanh(c)), count);
      });
    case RnnCell::kGru:  // r, z, n
      return for_units([&](const GateProducts& gates, int64_t at, int64_t count) DYNQUANT_INLINE_LAMBDA {
        const F n = Math::tanh(V::fma(Math::sigmoid(gates.sum(0)), gates.of_hidden(2), gates.of_input(2)));
        const F change = V::sub(load_up_to(step.h + at, count), n);
        store_up_to(step.h + at, V::fma(Math::sigmoid(gates.sum(1)), change, n), count);
      });
    case RnnCell::kTanh:
      return for_units([&](const GateProducts& gates, int64_t at, int64_t count) DYNQUANT_INLINE_LAMBDA {
        store_up_to(step.h + at, Math::tanh(gates.sum(0)), count);
      });
    case RnnCell::kRelu:
      return for_units([&](const GateProducts& gates, int64_t at, int64_t count) DYNQUANT_INLINE_LAMBDA {
        store_up_to(step.h + at, Math::relu(gates.sum(0)), count);
      });
  }
}
