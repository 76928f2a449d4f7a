// The requirements on a dot product Dot over a vector type V, checked where a kernel file is compiled as
// C++20.
#pragma once

#include <cstdint>

#include "cpu/simd/concept.h"

#if defined(DYNQUANT_HAS_CONCEPTS)
namespace dynquant::cpu {

// A step of the products of a group, see generic/prelude.h: exact for every activation and weight, or, in a
// plan, for the activations of the groups that the plan lists.
template <typename Step, typename V>
concept ProductStep = requires(typename V::I x) {
  requires Step::kActivationsAt >= 0;
  { Step::weight(x) } -> Same<typename V::I>;
  { Step::multiply_add(x, x, x) } -> Same<typename V::I>;
};

template <typename Products, typename V>
constexpr bool kAreProducts = false;
template <template <typename...> class Products, typename V, typename... Steps>
constexpr bool kAreProducts<Products<Steps...>, V> = sizeof...(Steps) > 0 && (ProductStep<Steps, V> && ...);

// How offset * sum is subtracted from an accumulator, for K up to kMaxK.
template <typename Compensation, typename V>
concept ZeroPointCompensation = requires(typename V::I x) {
  requires Compensation::kMaxK > 0;
  { Compensation::prepare_sums(x) } -> Same<typename V::I>;
  { Compensation::prepare_offset(int32_t{0}) } -> Same<typename V::I>;
  { Compensation::subtract(x, x, x) } -> Same<typename V::I>;
};

// With kPlans: a plan lists the groups of a row tile by the product that is exact for them.
template <typename Dot>
concept Plans = requires(const typename Dot::Plan& plan, typename Dot::Plan& to, uint8_t* rows) {
  { Dot::plan_bytes(int64_t{4}) } -> Same<int64_t>;
  { Dot::groups_of_k_block(int64_t{1}) } -> Same<int64_t>;
  { Dot::make_plan(rows, int64_t{64}, 1, int64_t{4}, to) } -> Same<void>;
  { Dot::takes_biased(plan) } -> Same<bool>;
  requires Same<decltype(plan.offset), int32_t>;
};

template <typename Dot, typename V>
concept DotProduct = requires(uint8_t* row, typename V::I q) {
  requires Dot::kMaxRows > 0;                          // of a tile
  requires Dot::template kVectors<Dot::kMaxRows> > 0;  // of channels, in a tile of that many rows
  requires Dot::template kVectors<1> > 0;
  requires Dot::kGroupBytes >= 4;                        // of a packed row, for 4 elements
  requires Dot::kGroupsOfKBlock >= 0;                    // 0: K is not blocked
  requires Same<decltype(Dot::kOffset), const int32_t>;  // packed value = q + kOffset
  requires kAreProducts<typename Dot::Exact, V>;
  requires ZeroPointCompensation<typename Dot::ZeroPointCompensation, V>;
  requires !Dot::kPlans || Plans<Dot>;
  { Dot::store_activations(row, q, q, q, q) } -> Same<void>;  // saturates
};

}  // namespace dynquant::cpu
#endif
