// All kernels, written once over the vector type V (simd/) and the dot product Dot (dot/) of an instruction
// set. Each isa/*.cpp includes this inside its own namespace and target region. Nothing here may call an
// inline function from outside: the linker could keep the copy with instructions that other CPUs lack.

#if defined(DYNQUANT_HAS_CONCEPTS)
static_assert(VectorType<V>);
static_assert(DotProduct<Dot, V>);
#endif

#include "cpu/generic/quantize.h"
#include "cpu/generic/gemm.h"
#include "cpu/generic/norm.h"
#include "cpu/generic/linear_fp32.h"
#include "cpu/generic/rnn.h"
#include "cpu/generic/softmax.h"
#include "cpu/generic/attention.h"
#include "cpu/generic/embedding.h"

constexpr KernelTable make_kernels(const char* name, double gops, const KernelTable* few_rows = nullptr,
                                   const KernelTable* full_range = nullptr,
                                   const ThreadScope* scope = &kFloatModes) {
  // Measured. 48 rows of K = 384 fit L1 beside a panel. Tiles of 16 channels pass over the rows four times as
  // often, and repacking a weight pays from more rows on.
  constexpr int64_t kRowsAtOnce = kWidth == kBlock ? 48 : 96;
  return KernelTable{
      name,
      gops,
      few_rows,
      full_range,
      scope,
      Dot::kMaxRows,
      kRowsAtOnce,
      activation_stride,
      plan_bytes<>,
      min_max,
      rotate,
      quantize,
      quantize_per_token,
      quantize_per_tensor,
      pack_int8,
      gemm_scratch<>,
      linear,
      int8_mm,
      linear_fp32_scratch,
      linear_fp32,
      add_norm,
      multiply,
      rnn_step,
      weight_range,
      quantize_weight,
      key_block_bytes,
      pack_keys,
      attention_scratch,
      attend,
      embedding_bags,
      embedding_norm,
      kNormRows,
  };
}
