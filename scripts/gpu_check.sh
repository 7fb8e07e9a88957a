#!/usr/bin/env bash
# Checks the CUDA kernels on a machine with a GPU: builds kernels, tests and benchmark with nvcc and g++ alone (no CMake, none
# of the other libraries), runs the tests, compute-sanitizer and the benchmark. On a device of compute capability 9.0 tests and
# benchmark cover both instruction families, mma.sync and wgmma: if all pass and bench-wgmma.log is faster where experts have
# rank 256 and more, CudaFamily::kAuto (kernels/types.h) can take wgmma there. No run has decided this yet.
# Needs nvcc 13, g++ 12 or newer, GoogleTest's sources and fmt's headers:
#   GTEST_SOURCE=/usr/src/googletest   (Debian package googletest; copy the folder along if the machine has none)
#   FMT_INCLUDE=/usr/include           (default: the copy inside python3's torch)
#   OUT=folder for the build and the logs (default build-gpu)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build-gpu}
gtest=${GTEST_SOURCE:-/usr/src/googletest}
mkdir -p "$out/obj"
rm -f "$out"/obj/*.o

fail() { echo "gpu_check: $1" >&2; exit 2; }
command -v nvcc > /dev/null || fail "nvcc is not on the PATH: install the CUDA 13 toolkit"
[[ -f $gtest/googletest/src/gtest-all.cc ]] || fail "no GoogleTest sources in $gtest: set GTEST_SOURCE"
if [[ -z ${FMT_INCLUDE:-} ]]; then
  if [[ -d /usr/include/fmt ]]; then FMT_INCLUDE=/usr/include
  else FMT_INCLUDE=$(python3 -c 'import torch, os; print(os.path.join(os.path.dirname(torch.__file__), "include"))') ||
    fail "no fmt headers: set FMT_INCLUDE"; fi
fi
cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || fail "nvidia-smi finds no GPU: run this on a machine that has one"

common=(-O2 -I. -idirafter "$FMT_INCLUDE" -DFMT_HEADER_ONLY)
gtest_include=(-isystem "$gtest/googletest/include" -isystem "$gtest/googlemock/include")
cxx=(g++ -std=c++20 -fopenmp -ffp-contract=off "${common[@]}")
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512dq"
pids=()
compile() { # object command...
  local object=$out/obj/$1; shift
  "$@" -o "$object" & pids+=($!)
}
finish() { for pid in "${pids[@]}"; do wait "$pid" || fail "a compilation failed"; done; pids=(); }

arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
families=(mma) defines=()
if [[ $arch == 90 ]]; then arch=90a families=(mma wgmma) defines=(-DMORAINE_CUDA_WGMMA=1); fi
nv=(nvcc -std=c++17 -O2 -lineinfo -I. -DFMT_HEADER_ONLY -Xcompiler "-idirafter,$FMT_INCLUDE" "-gencode=arch=compute_$arch,code=sm_$arch")
compile cuda_backend.o "${nv[@]}" "${defines[@]}" -Xptxas -v -c kernels/cuda_backend.cu 2> "$out/ptxas.log"
compile bench.o "${nv[@]}" -c bench/ragged_experts_gpu.cu
for name in arena backend checks cpu_features cpu_scalar ffn_expert materialise ragged_delta rankwise route tasks; do
  compile "$name.o" "${cxx[@]}" -c "kernels/$name.cpp"
done
# shellcheck disable=SC2086
{
  compile cpu_avx2.o "${cxx[@]}" -O3 -mavx2 -mfma -mf16c -c kernels/cpu_avx2.cpp
  compile cpu_avx512.o "${cxx[@]}" -O3 -mavx2 -mfma -mf16c $avx512 -c kernels/cpu_avx512.cpp
  compile cpu_avx512_bf16.o "${cxx[@]}" -O3 -mavx2 -mfma -mf16c $avx512 -mavx512bf16 -c kernels/cpu_avx512_bf16.cpp
}
compile error.o "${cxx[@]}" -c core/error.cpp
compile dtype.o "${cxx[@]}" -c core/dtype.cpp
for name in contract_test delta_test ffn_test rankwise_test wgmma_test harness oracle; do
  compile "t_$name.o" "${cxx[@]}" "${gtest_include[@]}" -isystem "$cuda/include" '-DMORAINE_TEST_CUDA=<cuda_runtime.h>' -c "tests/kernels/$name.cpp"
done
compile t_gtest.o "${cxx[@]}" "${gtest_include[@]}" -I "$gtest/googletest" -c "$gtest/googletest/src/gtest-all.cc"
compile t_gmock.o "${cxx[@]}" "${gtest_include[@]}" -I "$gtest/googlemock" -c "$gtest/googlemock/src/gmock-all.cc"
compile t_main.o "${cxx[@]}" "${gtest_include[@]}" -c "$gtest/googletest/src/gtest_main.cc"
finish

objects=("$out"/obj/*.o)
link() { # program, objects: everything but the other program's
  local program=$1; shift
  g++ -fopenmp -o "$out/$program" "$@" -L"$cuda/lib64" -lcudart_static -ldl -lrt -lpthread
}
library=(); tests=()
for object in "${objects[@]}"; do
  case $(basename "$object") in
    t_*) tests+=("$object") ;;
    bench.o) ;;
    *) library+=("$object") ;;
  esac
done
link kernels_tests "${tests[@]}" "${library[@]}"
link bench "$out/obj/bench.o" "${library[@]}"

grep -E "spill (stores|loads)" "$out/ptxas.log" | grep -v " 0 bytes spill stores, 0 bytes spill loads" && fail "registers spill: see $out/ptxas.log"
status=0
"$out/kernels_tests" --gtest_brief=1 2>&1 | tee "$out/tests.log" || status=1
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$out/kernels_tests" --gtest_brief=1 \
      --gtest_filter='*RaggedShapes/cuda*:*ForwardAndBackwardEqualTheOracle/cuda*:*MasksAndGate*/cuda*:*Wgmma.Classes*' 2>&1 | tee "$out/$tool.log" || status=1
  done
else
  echo "gpu_check: compute-sanitizer is not on the PATH: skipped"
fi
for family in "${families[@]}"; do
  "$out/bench" 790 "$family" 2>&1 | tee "$out/bench-$family.log" || status=1
done
exit $status
