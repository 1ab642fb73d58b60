// conelens._core: the CPU kernels for Python. One register_<op> line per operation.
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "channel_peaks/bind.h"
#include "collapse_parents/bind.h"
#include "conelens.h"
#include "deconv2d/bind.h"
#include "edge_scores/bind.h"
#include "gather_windows/bind.h"
#include "graph_e_step/bind.h"
#include "isa.h"
#include "max_pool2d_with_switches/bind.h"
#include "max_unpool2d/bind.h"
#include "relu_change/bind.h"

namespace conelens {
namespace {

// Ask for huge pages under fresh memory: on large outputs page faults cost more than the kernel.
void advise_huge_pages([[maybe_unused]] std::uintptr_t address, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t page = std::uintptr_t{2} << 20;
  const std::uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (end > begin)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice may be refused
#endif
}

py::dict isa_report() {
  py::list available;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (isa_available(isa)) available.append(isa_name(isa));
  py::dict report;
  report["active"] = isa_name(active_isa());
  report["available"] = available;
  return report;
}

}  // namespace
}  // namespace conelens

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace conelens;
  m.doc() = "CPU kernels of conelens. Tensors are DLPack arrays; `context` is the number of threads.";
  if (const char* error = isa_error()) throw py::import_error(error);
  m.def("isa", &isa_report, "Instruction sets: the active one and those available.");
  m.def(
      "select_isa",
      [](const std::string& name) {
        if (!select_isa(name.c_str()))
          throw py::value_error("instruction set '" + name + "' is not available here");
      },
      py::arg("name"), "Choose the instruction set for this process.");
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  m.attr("openmp") = bool(CONELENS_OPENMP);

  register_channel_peaks<Cpu>(m, conelens_channel_peaks_cpu);
  register_collapse_parents<Cpu>(m, conelens_collapse_parents_cpu);
  register_deconv2d<Cpu>(m, conelens_deconv2d_cpu);
  register_edge_scores<Cpu>(m, conelens_edge_scores_cpu);
  register_gather_windows<Cpu>(m, conelens_gather_windows_cpu);
  register_graph_e_step<Cpu>(m, conelens_graph_e_step_cpu);
  register_max_pool2d_with_switches<Cpu>(m, conelens_max_pool2d_with_switches_cpu);
  register_max_unpool2d<Cpu>(m, conelens_max_unpool2d_cpu, conelens_max_unpool2d_backward_cpu);
  register_relu_change<Cpu>(m, conelens_relu_change_cpu);
}
