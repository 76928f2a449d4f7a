// Whether Python objects are where they were.
#pragma once

#include <pybind11/pybind11.h>

namespace dynquant {

// Whether dicts[i].get(names[i]) is values[i] for all i. A fused block asks this of its parts at every call:
// in Python the look-ups, most of them misses of the cache after a layer's weights, take longer than a norm.
bool are_in_place(const pybind11::tuple& values, const pybind11::tuple& dicts, const pybind11::tuple& names);

}  // namespace dynquant
