// dynquant._C: loading it registers the ops; its functions name and choose the instruction set, and do what
// calls have no time for in Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "autograd.h"
#include "cpu/isa/dispatch.h"
#include "places.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("available_isas", &dynquant::cpu::available_isas,
             "Instruction sets this CPU can run, lowest first.");
  module.def("isa", &dynquant::cpu::isa, "The instruction set in use.");
  module.def("set_isa", &dynquant::cpu::set_isa, pybind11::arg("name"), "Forces one of the available ones.");
  module.def("run_below_autograd", &dynquant::run_below_autograd, pybind11::arg("name"),
             pybind11::arg("refuses_gradients"), "Registers an op as one without gradient.");
  module.def("are_in_place", &dynquant::are_in_place, pybind11::arg("values"), pybind11::arg("dicts"),
             pybind11::arg("names"), "Whether dicts[i].get(names[i]) is values[i] for all i.");
}
