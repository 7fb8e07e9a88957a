#!/usr/bin/env bash
# Checks the CUDA kernels on a machine with a GPU: builds kernels, tests and benchmark with nvcc and g++ alone (no CMake, none
# of the other libraries), runs the tests, compute-sanitizer and the benchmark. On a device of compute capability 9.0 tests and
# benchmark cover both instruction families, mma.sync and wgmma.
#   scripts/gpu_check.sh               both
#   ARCH=90 scripts/gpu_check.sh build on a machine without a GPU, for another: carry BUILD's programs there
#   scripts/gpu_check.sh run           what was built before
# Needs nvcc 13, g++ 12 or newer, GoogleTest's sources and fmt's headers:
#   GTEST_SOURCE=/usr/src/googletest   (Debian package googletest; copy the folder along if the machine has none)
#   FMT_INCLUDE=/usr/include           (default: the copy inside python3's torch)
#   BUILD=folder for the build (default build-gpu), OUT=folder for the logs (default BUILD)
set -euo pipefail
cd "$(dirname "$0")/.."
build=${BUILD:-build-gpu}
out=${OUT:-$build}
gtest=${GTEST_SOURCE:-/usr/src/googletest}
mode=${1:-all}

fail() { echo "gpu_check: $1" >&2; exit 2; }
[[ $mode == all || $mode == build || $mode == run ]] || fail "the first argument is build, run or nothing: $mode"
mkdir -p "$build/obj" "$out"
arch=${ARCH:-}
if [[ $mode != build ]]; then
  command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader ||
    fail "nvidia-smi finds no GPU: run this on a machine that has one"
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
fi
[[ -n $arch ]] || fail "for which GPU? set ARCH to its compute capability without the dot, such as 90"
families=(mma) defines=()
if [[ $arch == 90 ]]; then arch=90a families=(mma wgmma) defines=(-DMORAINE_CUDA_WGMMA=1); fi

build() {
  [[ -f $gtest/googletest/src/gtest-all.cc ]] || fail "no GoogleTest sources in $gtest: set GTEST_SOURCE"
  command -v nvcc > /dev/null || fail "nvcc is not on the PATH: install the CUDA 13 toolkit"
  if [[ -z ${FMT_INCLUDE:-} ]]; then
    if [[ -d /usr/include/fmt ]]; then FMT_INCLUDE=/usr/include
    else FMT_INCLUDE=$(python3 -c 'import torch, os; print(os.path.join(os.path.dirname(torch.__file__), "include"))') ||
      fail "no fmt headers: set FMT_INCLUDE"; fi
  fi
  local cuda name pids=() library=() tests=()
  cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
  local common=(-O2 -I. -idirafter "$FMT_INCLUDE" -DFMT_HEADER_ONLY)
  local gtest_include=(-isystem "$gtest/googletest/include" -isystem "$gtest/googlemock/include")
  local cxx=(g++ -std=c++20 -fopenmp -ffp-contract=off "${common[@]}")
  local avx2=(-O3 -mavx2 -mfma -mf16c)
  local avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  local nv=(nvcc -std=c++17 -O2 -lineinfo -I. -DFMT_HEADER_ONLY -Xcompiler "-idirafter,$FMT_INCLUDE" "-gencode=arch=compute_$arch,code=sm_$arch")
  rm -f "$build"/obj/*.o
  compile() { # object command...
    while (($(jobs -rp | wc -l) >= $(nproc))); do wait -n || true; done
    local object=$build/obj/$1; shift
    "$@" -o "$object" & pids+=($!)
  }
  compile cuda_backend.o "${nv[@]}" "${defines[@]}" -Xptxas -v -c kernels/cuda_backend.cu 2> "$build/ptxas.log"
  compile bench.o "${nv[@]}" -c bench/ragged_experts_gpu.cu
  for name in arena backend checks cpu_features cpu_scalar ffn_expert materialise ragged_delta rankwise route tasks; do
    compile "$name.o" "${cxx[@]}" -c "kernels/$name.cpp"
  done
  compile cpu_avx2.o "${cxx[@]}" "${avx2[@]}" -c kernels/cpu_avx2.cpp
  compile cpu_avx512.o "${cxx[@]}" "${avx512[@]}" -c kernels/cpu_avx512.cpp
  compile cpu_avx512_bf16.o "${cxx[@]}" "${avx512[@]}" -mavx512bf16 -c kernels/cpu_avx512_bf16.cpp
  for name in error dtype; do compile "$name.o" "${cxx[@]}" -c "core/$name.cpp"; done
  for name in contract_test delta_test ffn_test rankwise_test wgmma_test harness oracle; do
    compile "t_$name.o" "${cxx[@]}" "${gtest_include[@]}" -isystem "$cuda/include" '-DMORAINE_TEST_CUDA=<cuda_runtime.h>' -c "tests/kernels/$name.cpp"
  done
  compile t_gtest.o "${cxx[@]}" "${gtest_include[@]}" -I "$gtest/googletest" -c "$gtest/googletest/src/gtest-all.cc"
  compile t_gmock.o "${cxx[@]}" "${gtest_include[@]}" -I "$gtest/googlemock" -c "$gtest/googlemock/src/gmock-all.cc"
  compile t_main.o "${cxx[@]}" "${gtest_include[@]}" -c "$gtest/googletest/src/gtest_main.cc"
  for name in "${pids[@]}"; do wait "$name" || fail "a compilation failed"; done

  for name in "$build"/obj/*.o; do
    case $(basename "$name") in
      t_*) tests+=("$name") ;;
      bench.o) ;;
      *) library+=("$name") ;;
    esac
  done
  local libraries=(-L"$cuda/lib64" -lcudart_static -ldl -lrt -lpthread)
  g++ -fopenmp -o "$build/kernels_tests" "${tests[@]}" "${library[@]}" "${libraries[@]}"
  g++ -fopenmp -o "$build/bench" "$build/obj/bench.o" "${library[@]}" "${libraries[@]}"
  grep -E "spill (stores|loads)" "$build/ptxas.log" | grep -v " 0 bytes spill stores, 0 bytes spill loads" && fail "registers spill: see $build/ptxas.log"
  return 0
}

run() {
  local status=0 tool family peak=""
  "$build/kernels_tests" --gtest_brief=1 2>&1 | tee "$out/tests.log" || status=1
  if python3 -c 'import torch' 2> /dev/null; then
    python3 scripts/gpu_peers.py 2>&1 | tee "$out/peers.log" || status=1
    peak=$(sed -n 's/^bf16 peak \([0-9]*\) .*/\1/p' "$out/peers.log" | head -1)
  else
    echo "gpu_check: no torch in python3: no peers, and the bf16 peak is the benchmark's default"
  fi
  for family in "${families[@]}"; do
    "$build/bench" "${peak:-790}" "$family" 2>&1 | tee "$out/bench-$family.log" || status=1
  done
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/kernels_tests" --gtest_brief=1 \
        --gtest_filter='*RaggedShapes/cuda*:*ForwardAndBackwardEqualTheOracle/cuda*:*MasksAndGate*/cuda*:*Wgmma.Classes*' 2>&1 | tee "$out/$tool.log" || status=1
    done
  else
    echo "gpu_check: compute-sanitizer is not on the PATH: skipped"
  fi
  return $status
}

[[ $mode == run ]] || build
[[ $mode == build ]] || run
