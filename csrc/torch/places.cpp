#include "places.h"

namespace dynquant {

bool are_in_place(const pybind11::tuple& values, const pybind11::tuple& dicts, const pybind11::tuple& names) {
  const Py_ssize_t count = PyTuple_GET_SIZE(values.ptr());
  if (PyTuple_GET_SIZE(dicts.ptr()) != count || PyTuple_GET_SIZE(names.ptr()) != count) {
    throw pybind11::value_error("are_in_place: expected tuples of one length");
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* dict = PyTuple_GET_ITEM(dicts.ptr(), i);
    if (!PyDict_Check(dict)) throw pybind11::type_error("are_in_place: expected dicts");
    PyObject* found = PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(names.ptr(), i));
    if (found == nullptr) {
      if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
      found = Py_None;
    }
    if (found != PyTuple_GET_ITEM(values.ptr(), i)) return false;
  }
  return true;
}

}  // namespace dynquant
