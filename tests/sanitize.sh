#!/usr/bin/env bash
# The CPU bodies and the emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
# usage: tests/sanitize.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
cxx=${CXX:-g++}
export XAI_FAST_SANITIZE=1
# libstdc++ comes along so that the sanitizer finds __cxa_throw before the first C++ exception.
export LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so)"
# Python and torch leak by design.
export ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
exec "$python" -m pytest tests/emulator tests/ops/test_rollout_kernels.py tests/ops/test_relevance_kernels.py \
  tests/ops/test_attention_relevance_kernels.py tests/ops/test_ihvp_kernels.py tests/ops/test_metrics_kernels.py "$@"
