#!/usr/bin/env bash
# make gpu: build for this machine's GPU, test, check memory accesses, then measure what matters most first.
# Under nine minutes, no network. Results: $OUT (or benchmarks/results)/gpu*.jsonl, a line per measurement as it is made.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${OUT:-benchmarks/results}
budget=${GPU_SECONDS:-530}
mkdir -p "$results"
left() { echo $((budget - SECONDS)); }

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || {
  echo "make gpu needs a CUDA device that $python's torch can use; none was found" >&2
  exit 2
}
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
CONELENS_CUDA=ON CONELENS_CUDA_ARCHITECTURES=$arch \
  "$python" -m pip install --quiet --no-build-isolation --no-deps . || {
  echo "the build failed; it needs nvcc, a C++ compiler, scikit-build-core and pybind11 in $python" >&2
  exit 1
}
echo "== built for sm_$arch after ${SECONDS} s"

status=0
timeout 200 "$python" -m pytest -q -p no:cacheprovider -m "gpu and not slow" tests/gpu 2>&1 | tee "$results/gpu_tests.log" | tail -25
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
echo "== tests done after ${SECONDS} s (status $status)"

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  timeout 60 "$sanitizer" --tool memcheck --error-exitcode 9 "$python" -m benchmarks.gpu_small 2>&1 | tail -5
  case ${PIPESTATUS[0]} in
    0) echo "== compute-sanitizer: no error" ;;
    124) echo "== compute-sanitizer: not finished in 60 s" ;;
    *) echo "== compute-sanitizer: failed" && status=1 ;;
  esac
else
  echo "== compute-sanitizer is not installed: memory accesses were not checked"
fi

"$python" -m benchmarks.gpu_occlusion --out "$results/gpu_occlusion.jsonl" --seconds "$(($(left) / 2))" || status=1
echo "== occlusion sweeps done after ${SECONDS} s"
timeout 90 "$python" -m benchmarks.graph_fit --count 2000 --out "$results/gpu_graph_fit.jsonl" || status=1
echo "== explanatory graph of 2,000 images done after ${SECONDS} s"
"$python" -m benchmarks.gpu_table --out "$results/gpu.jsonl" --seconds "$(left)" || status=1
timeout "$(($(left) > 5 ? $(left) : 5))" "$python" -m pytest -q -p no:cacheprovider -m "gpu and slow" tests/gpu 2>&1 | tail -3
echo "== finished after ${SECONDS} s (status $status)"
exit $status
