// The interface of the CUDA kernels: raw pointers of the current device, a stream to launch on, cudaError_t
// back. Neither compiling nor calling them takes a torch header. Each function is asynchronous, allocates
// nothing and can be captured in a CUDA graph. The arithmetic is that of dynquant/reference/, bit for bit.
// Any m, n, k >= 0; tensors are contiguous and aligned to their element size only, weights and workspaces to
// 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "config.h"
#include "gemm_plan.h"
#include "types.h"

namespace dynquant::cuda {

// Whether a kernel can start before its predecessor on the stream has ended. It then waits by an instruction
// that only code for 9.0 and newer has; older code would read results before they are written.
constexpr bool kernels_overlap(const Device& device) { return device.code >= 90; }

cudaError_t current_device(Device* device);

// ---- single steps ----

// lo = min(min(x), 0) and hi = max(max(x), 0) of each row, [m] each; both NaN where the row holds a NaN.
cudaError_t min_max_rows(const Rows& x, float* lo, float* hi, cudaStream_t stream);

// The same for all of x, [1] each. The result does not depend on the order in which blocks run.
constexpr size_t kRangeWorkspace = 1024 * 2 * sizeof(float);
cudaError_t min_max_tensor(const Rows& x, float* lo, float* hi, void* workspace, cudaStream_t stream);

// scale and zero_point of `count` ranges; NaN and 0 for a range that is not finite.
cudaError_t choose_qparams(const float* lo, const float* hi, int64_t count, float* scale, int32_t* zero_point,
                           cudaStream_t stream);

// q = clamp(round(x / scale) + zero_point, -128, 127), [m, k]; 0 where that is NaN. One pair of qparams, or
// one for each row.
cudaError_t quantize(const Rows& x, const float* scale, const int32_t* zero_point, bool per_row, int8_t* q,
                     cudaStream_t stream);

// x after x.rotation, whose block divides k, [m, k].
cudaError_t rotate(const Rows& x, float* out, cudaStream_t stream);

// ---- products ----

// out[m, n] = sum over k of q[m, k] * weight[n, k]; int32, wrapping beyond it.
struct Int8Mm {
  const int8_t* q;
  const int8_t* weight;  // [n, padded_k(k)], zeros beyond k
  int64_t m;
  int64_t n;
  int64_t k;
  int32_t* out;
};

// The kernel of a call and the size of its workspace: planned once, then passed to int8_mm.
struct Int8MmPlan {
  GemmPlan gemm;
  bool copies_q;  // rows of q do not start at multiples of 16 bytes
  size_t workspace_bytes;
};

Int8MmPlan plan_int8_mm(const Int8Mm& args, const Device& device);
cudaError_t int8_mm(const Int8Mm& args, const Int8MmPlan& plan, const Device& device, void* workspace,
                    cudaStream_t stream);

// A whole forward pass: quantize x, multiply, dequantize.
struct Linear {
  Rows x;
  int64_t n;
  const int8_t* weight;       // [n, padded_k(x.k)], zeros beyond k
  const int32_t* weight_sum;  // [n]
  const float* weight_scale;  // [n]
  const void* bias;           // [n] of bias_dtype, or null
  const float* scale;         // [1] for static qparams, null to choose them from x
  const int32_t* zero_point;  // [1], with scale
  Config config;              // its rotation (x has it) and out_dtype are not read
  void* out;                  // [x.m, n]
  Dtype out_dtype;
  Dtype bias_dtype;
};

// Launches: 1 if the GEMM's blocks quantize x themselves (fused), else 2, or 3 with config.per_tensor.
struct LinearPlan {
  GemmPlan gemm;
  bool fused;
  size_t workspace_bytes;  // may be 0
};

LinearPlan plan_linear(const Linear& args, const Device& device);
cudaError_t linear(const Linear& args, const LinearPlan& plan, const Device& device, void* workspace,
                   cudaStream_t stream);

}  // namespace dynquant::cuda
