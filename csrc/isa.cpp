#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

namespace conelens {
namespace {

constexpr Isa kAll[] = {Isa::avx512, Isa::avx2, Isa::baseline};  // best first

std::string& error_text() {
  static std::string text;
  return text;
}

Isa best() {
  for (Isa isa : kAll)
    if (isa_available(isa)) return isa;
  return Isa::baseline;
}

Isa initial() {
  const char* wanted = std::getenv("CONELENS_ISA");
  if (!wanted || !*wanted) return best();
  for (Isa isa : kAll)
    if (std::strcmp(wanted, isa_name(isa)) == 0 && isa_available(isa)) return isa;
  error_text() = std::string("CONELENS_ISA is '") + wanted + "', wanted one of:";
  for (Isa isa : kAll)
    if (isa_available(isa)) error_text() += std::string(" ") + isa_name(isa);
  return best();
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

bool isa_available(Isa isa) {
#if defined(CONELENS_X86)
  __builtin_cpu_init();
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           isa_available(Isa::avx2);
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == Isa::baseline;
}

Isa active_isa() {
  return active().load(std::memory_order_relaxed);
}

bool select_isa(const char* name) {
  for (Isa isa : kAll)
    if (std::strcmp(name, isa_name(isa)) == 0 && isa_available(isa)) {
      active().store(isa, std::memory_order_relaxed);
      return true;
    }
  return false;
}

const char* isa_error() {
  active_isa();
  return error_text().empty() ? nullptr : error_text().c_str();
}

}  // namespace conelens
