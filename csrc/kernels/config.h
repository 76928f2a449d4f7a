// The scheme of a layer, decoded from the int that the ops carry. dynquant/config.py is the same table in
// Python.
#pragma once

#include <cstdint>

#include "types.h"

namespace dynquant {

// Every activation: X(its Epilogue, its function in EpilogueMath). The position is the code in files, 1
// first: add at the end, 7 fit. dynquant/patterns/activations.py is the same list.
#define DYNQUANT_ACTIVATIONS(X) \
  X(kRelu, relu) X(kGelu, gelu) X(kGeluTanh, gelu_tanh) X(kSilu, silu) X(kQuickGelu, quick_gelu)

#define DYNQUANT_ENUMERATOR(name, function) , name
enum class Epilogue : int { kNone DYNQUANT_ACTIVATIONS(DYNQUANT_ENUMERATOR) };
#undef DYNQUANT_ENUMERATOR

#define DYNQUANT_ONE_MORE(name, function) +1
constexpr int kActivationCount = 0 DYNQUANT_ACTIVATIONS(DYNQUANT_ONE_MORE);
#undef DYNQUANT_ONE_MORE
static_assert(kActivationCount <= 7, "3 bits of the code");
enum class OutDtype : int { kInput, kFloat32, kBFloat16, kFloat16, kFloat64 };

struct Config {
  bool per_tensor;         // activations: one range for all of x instead of one per row
  bool weight_per_tensor;  // weights: one scale instead of one per output channel
  Rotation rotation;
  Epilogue epilogue;
  OutDtype out_dtype;
  bool full_range;  // weights may hold -128
};

// Bit 19 of a code, float_input, is for modules: no op reads it.

constexpr int kOutDtypeShift = 9;

constexpr int kKShift = 12;
constexpr int64_t kKModulus = 16;
constexpr int kSignsShift = 17;
constexpr int kFullRangeShift = 18;
constexpr int kFloatInputShift = 19;

constexpr bool is_valid_config(int64_t code) {
  constexpr int64_t kSigns = 1 << kSignsShift;
  constexpr int64_t kKnown =
      ((1 << kKShift) - 1) | (31 << kKShift) | kSigns | (1 << kFullRangeShift) | (1 << kFloatInputShift);
  const int64_t rotation = (code >> 2) & 15;
  return code >= 0 && (code & ~kKnown) == 0 && ((code >> kKShift) & 31) <= kKModulus && rotation <= 8 &&
         (rotation > 0 || (code & kSigns) == 0) && ((code >> 6) & 7) <= kActivationCount &&
         ((code >> kOutDtypeShift) & 7) <= 4;
}

// K mod 16 of the layer, or -1 if the code does not hold it. Only the check of x uses it; it is no part of
// the scheme.
constexpr int64_t k_modulo_16(int64_t code) { return ((code >> kKShift) & 31) - 1; }

// The same code without epilogue and with fp32 output.
constexpr int64_t plain_fp32(int64_t code) {
  constexpr int64_t kEpilogueAndOutDtype = 7 << 6 | 7 << kOutDtypeShift;
  return (code & ~kEpilogueAndOutDtype) | static_cast<int64_t>(OutDtype::kFloat32) << kOutDtypeShift;
}

constexpr Config decode_config(int64_t code) {
  const Rotation rotation{static_cast<int>((1 << ((code >> 2) & 15)) >> 1), (code >> kSignsShift & 1) != 0};
  return Config{(code & 1) != 0,
                (code & 2) != 0,
                rotation,
                static_cast<Epilogue>((code >> 6) & 7),
                static_cast<OutDtype>((code >> kOutDtypeShift) & 7),
                (code >> kFullRangeShift & 1) != 0};
}

}  // namespace dynquant
