// Found before csrc/kernels/cpu/generic/kernels.h, by each isa/*.cpp: V and Dot as functions on arrays. Inside the
// instruction set's namespace and target region, so nothing here calls an inline function from outside.

static_assert(VectorType<V>);
static_assert(DotProduct<Dot, V>);

#include "cpu/generic/gemm_tile.h"

// ---- V ----

template <F (*op)(F, F)>
void binary(const float* a, const float* b, float* out) {
  V::store(out, op(V::load(a), V::load(b)));
}

template <I (*op)(I, I)>
void int_binary(const int32_t* a, const int32_t* b, int32_t* out) {
  V::store(out, op(V::load(a), V::load(b)));
}

template <int count>
void shift_left(const int32_t* a, int32_t* out) {
  V::store(out, V::template shift_left<count>(V::load(a)));
}

template <int count>
void shift_right(const int32_t* a, int32_t* out) {
  V::store(out, V::template shift_right<count>(V::load(a)));
}

void to_bools(V::Mask mask, bool* out) {
  float lanes[W];
  V::store(lanes, V::select(mask, V::broadcast(1.0f), V::broadcast(0.0f)));
  for (int i = 0; i < W; ++i) out[i] = lanes[i] == 1.0f;
}

template <int stride>
void butterfly(const float* x, float* out) {
  V::store(out, V::template butterfly<stride>(V::load(x)));
}

void transpose(const float* rows, float* columns) {
  F x[W];
  for (int i = 0; i < W; ++i) x[i] = V::load(rows + i * W);
  V::transpose(x);
  for (int i = 0; i < W; ++i) V::store(columns + i * W, x[i]);
}

template <int count = 0>
constexpr void fill_shifts(kernel_tests::VectorOps& ops) {
  if constexpr (count < 32) {
    ops.shift_left[count] = shift_left<count>;
    ops.shift_right[count] = shift_right<count>;
    fill_shifts<count + 1>(ops);
  }
}

template <int index = 0>
constexpr void fill_butterflies(kernel_tests::VectorOps& ops) {
  if constexpr ((1 << index) < W) {
    ops.butterfly[index] = butterfly<1 << index>;
    fill_butterflies<index + 1>(ops);
  }
}

constexpr kernel_tests::VectorOps vector_ops() {
  kernel_tests::VectorOps ops{};
  ops.lanes = W;
  ops.add = binary<V::add>;
  ops.sub = binary<V::sub>;
  ops.mul = binary<V::mul>;
  ops.div = binary<V::div>;
  ops.min = binary<V::min>;
  ops.max = binary<V::max>;
  ops.fma = [](const float* a, const float* b, const float* c, float* out) {
    V::store(out, V::fma(V::load(a), V::load(b), V::load(c)));
  };
  ops.int_add = int_binary<V::add>;
  ops.int_sub = int_binary<V::sub>;
  ops.int_mul = int_binary<V::mul>;
  ops.int_max = int_binary<V::max>;
  ops.bit_and = int_binary<V::bit_and>;
  ops.bit_or = int_binary<V::bit_or>;
  ops.bit_xor = int_binary<V::bit_xor>;
  fill_shifts(ops);
  fill_butterflies(ops);
  ops.load_bfloat16 = [](const uint16_t* from, float* out) {
    V::store(out, V::load(reinterpret_cast<const BFloat16*>(from)));
  };
  ops.load_float16 = [](const uint16_t* from, float* out) {
    V::store(out, V::load(reinterpret_cast<const Float16*>(from)));
  };
  ops.store_bfloat16 = [](uint16_t* to, const float* x) {
    V::store(reinterpret_cast<BFloat16*>(to), V::load(x));
  };
  ops.store_float16 = [](uint16_t* to, const float* x) {
    V::store(reinterpret_cast<Float16*>(to), V::load(x));
  };
  ops.broadcast = [](float x, float* out) { V::store(out, V::broadcast(x)); };
  ops.int_broadcast = [](int32_t x, int32_t* out) { V::store(out, V::broadcast(x)); };
  ops.as_int = [](const float* x, int32_t* out) { V::store(out, V::as_int(V::load(x))); };
  ops.as_float = [](const int32_t* x, float* out) { V::store(out, V::as_float(V::load(x))); };
  ops.round = [](const float* x, int32_t* out) { V::store(out, V::round(V::load(x))); };
  ops.convert = [](const int32_t* x, float* out) { V::store(out, V::convert(V::load(x))); };
  ops.in_register = [](const float* x, float* out) { V::store(out, V::in_register(V::load(x))); };
  ops.less = [](const float* a, const float* b, bool* out) {
    to_bools(V::less(V::load(a), V::load(b)), out);
  };
  ops.unordered = [](const float* a, const float* b, bool* out) {
    to_bools(V::unordered(V::load(a), V::load(b)), out);
  };
  ops.select = [](const float* a, const float* b, const float* c, const float* d, const float* yes,
                  const float* no, float* out) {
    const V::Mask mask = V::either(V::less(V::load(a), V::load(b)), V::unordered(V::load(c), V::load(d)));
    V::store(out, V::select(mask, V::load(yes), V::load(no)));
    return V::any(mask);
  };
  ops.lowest_lane = [](const float* x) { return V::lowest_lane(V::load(x)); };
  ops.highest_lane = [](const float* x) { return V::highest_lane(V::load(x)); };
  ops.sum_lanes = [](const int32_t* x) { return V::sum_lanes(V::load(x)); };
  ops.transpose = transpose;
  ops.load_up_to = [](const float* from, int64_t count, float* out) {
    V::store(out, load_up_to(from, count));
  };
  ops.store_up_to = [](float* to, const float* x, int64_t count) { store_up_to(to, V::load(x), count); };
  ops.load_half_up_to = [](const uint16_t* from, int64_t count, float* out) {
    V::store(out, load_up_to(reinterpret_cast<const Float16*>(from), count));
  };
  ops.store_half_up_to = [](uint16_t* to, const float* x, int64_t count) {
    store_up_to(reinterpret_cast<Float16*>(to), V::load(x), count);
  };
  ops.store_bytes = [](int8_t* to, const int32_t* q) {
    V::store_bytes(to, V::load(q), V::load(q + W), V::load(q + 2 * W), V::load(q + 3 * W));
  };
  ops.load_bytes = [](const int8_t* from, int32_t* out) { V::store(out, V::load_bytes(from)); };
  return ops;
}

// ---- Dot ----

constexpr int64_t kMostGroups = 512, kMostRowBytes = (kMostGroups + 2 * W) * Dot::kGroupBytes;

// The rows of a tile as the quantizers pack them: whole chunks, zeros behind k.
struct PackedRows {
  alignas(64) uint8_t bytes[Dot::kMaxRows * kMostRowBytes];

  PackedRows(const int8_t* q, int rows, int64_t k) {
    for (int m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < k; i += kChunk) {
        int8_t chunk[kChunk] = {};
        __builtin_memcpy(chunk, q + m * k + i, least(kChunk, k - i));
        Dot::store_activations(bytes + m * kMostRowBytes + i / 4 * Dot::kGroupBytes, V::load_bytes(chunk),
                               V::load_bytes(chunk + W), V::load_bytes(chunk + 2 * W),
                               V::load_bytes(chunk + 3 * W));
      }
    }
  }
};

// One panel, as wide as the tile.
template <int kVectors>
struct OnePanel {
  static constexpr bool kBiased = false;
  static constexpr int64_t group_stride = kVectors * W * 4;

  const int8_t* b;

  DYNQUANT_INLINE I load(const int8_t* group, int j) const {
    return V::load(reinterpret_cast<const int32_t*>(group) + j * W);
  }
  template <int kRows>
  DYNQUANT_INLINE void fetch_ahead(const int8_t*) const {}
};

struct NoFetch {
  void over(int64_t) {}
  void step() {}
};

template <int kRows, bool kPlanned, typename D = Dot>
int32_t multiply_rows(PackedRows& a, int64_t k, const int8_t* packed, int32_t* out) {
  constexpr int kVectors = Dot::kVectors<kRows>;
  const int64_t groups = (k + 3) / 4;
  OnePanel<kVectors> panel{packed};
  if constexpr (kPlanned) {
    alignas(64) uint8_t memory[16384];
    if (D::plan_bytes(k) > static_cast<int64_t>(sizeof(memory))) __builtin_trap();
    typename D::Plan& plan = *reinterpret_cast<typename D::Plan*>(memory);
    D::make_plan(a.bytes, kMostRowBytes, kRows, k, plan);
    Accumulators<kRows, kVectors> acc(plan.start);
    for (int64_t g = 0; g < groups; g += plan.groups_of_k_block) {
      D::add(plan, g, acc, a.bytes + g * D::kGroupBytes, kMostRowBytes, panel, NoFetch());
      panel.b += plan.groups_of_k_block * panel.group_stride;
    }
    acc.store(out, kVectors * W);
    return plan.offset;
  } else {
    Accumulators<kRows, kVectors> acc;
    acc.add(a.bytes, kMostRowBytes, panel, panel.b, groups);
    acc.store(out, kVectors * W);
    return Dot::kOffset;
  }
}

template <bool kPlanned, int kRows = Dot::kMaxRows>
int32_t multiply(const int8_t* q, int rows, int64_t k, const int8_t* packed, int32_t* acc) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply<kPlanned, kRows - 1>(q, rows, k, packed, acc);
  }
  if ((k + 3) / 4 > kMostGroups) __builtin_trap();
  PackedRows packed_rows(q, rows, k);
  return multiply_rows<kRows, kPlanned>(packed_rows, k, packed, acc);
}

template <int kRows = Dot::kMaxRows>
int channels(int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return channels<kRows - 1>(rows);
  }
  return Dot::kVectors<kRows> * W;
}

template <typename D = Dot>
constexpr kernel_tests::DotOps dot_ops() {
  kernel_tests::DotOps ops{};
  ops.max_rows = D::kMaxRows;
  ops.offset = D::kOffset;
  ops.plans = D::kPlans;
  ops.channels = channels<>;
  ops.multiply = multiply<false>;
  if constexpr (D::kPlans) ops.multiply_planned = multiply<true>;
  using Compensation = typename D::ZeroPointCompensation;
  ops.max_k = Compensation::kMaxK;
  ops.subtract = [](const int32_t* acc, int32_t offset, const int32_t* sum, int32_t* out) {
    V::store(out, Compensation::subtract(V::load(acc), Compensation::prepare_offset(offset),
                                         Compensation::prepare_sums(V::load(sum))));
  };
  return ops;
}

constexpr KernelTable make_kernels(const char* name, double, const KernelTable* few_rows = nullptr,
                                   const KernelTable* = nullptr, const ThreadScope* = nullptr) {
  return KernelTable{name, few_rows, vector_ops(), dot_ops()};
}
