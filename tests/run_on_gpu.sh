#!/usr/bin/env bash
# Build, test and sanitize on a machine with an NVIDIA GPU; no network needed.
#
#   tests/run_on_gpu.sh [LOGS]
#
# Builds against the installed JAX for this machine's GPU, installs, runs the whole suite with the CUDA
# back ends and everything else, then compute-sanitizer's four tools over a set of small products
# (tests/sanitize_cuda.py). Prints one summary; fails if anything failed. Logs go to the folder LOGS.
#
#   PYTHON                 python3            with jax[cuda], flax, nanobind, scikit-build-core, pytest, hypothesis
#   JAX_TRIRUN_CUDA_ARCHS  this GPU's         architectures to build, as CMake's option of that name
#   JOBS                   3/4 of the cores   test processes at a time
#   ONLY                   all                test files, as "test_cuda.py test_matmul.py"
#   SKIP_BUILD, SKIP_TESTS, SKIP_SANITIZER    not empty: leave that part out
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
logs=${1:-$(mktemp -d)}
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
jobs=${JOBS:-$((($(nproc) * 3 + 3) / 4))}
only=${ONLY:-test_.*.py}
started=$SECONDS
summary=()
failed=0

note() { summary+=("$(printf '%-12s %-7s %s' "$1" "$2" "$3")"); }
fail() { failed=1 && note "$1" FAILED "$2"; }

finish() {
  echo
  echo "==== jax_trirun on $gpu, $((SECONDS - started)) s, logs in $logs ===="
  printf '%s\n' "${summary[@]}"
  [ "$failed" = 0 ] && echo "==== all passed ====" || echo "==== FAILED ===="
  exit "$failed"
}

# JAX takes three quarters of the GPU for itself unless told otherwise; several processes share it here.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
# Plain dots need not be the fastest here, and trying out all their algorithms takes most of the time.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0"
# The layers' tests compare with plain float32 products, which a GPU would round to TensorFloat-32.
export JAX_DEFAULT_MATMUL_PRECISION=highest

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)
if [ -z "$gpu" ]; then
  gpu="no GPU"
  fail machine "nvidia-smi finds no NVIDIA GPU"
  finish
fi

# ---- Build ----------------------------------------------------------------------------------------
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '.')
[ "$capability" = 90 ] && capability=90a
archs=${JAX_TRIRUN_CUDA_ARCHS:-$capability}
if [ -z "${SKIP_BUILD:-}" ]; then
  began=$SECONDS
  if "$python" -m pip install --no-build-isolation --no-deps --no-index --force-reinstall . -v \
    -C "cmake.define.JAX_TRIRUN_CUDA=ON" -C "cmake.define.JAX_TRIRUN_CUDA_ARCHS=$archs" >"$logs/build.log" 2>&1; then
    note build passed "sm_$archs, $((SECONDS - began)) s"
  else
    tail -40 "$logs/build.log"
    fail build "sm_$archs, see build.log"
    finish
  fi
fi

# Away from the checkout, so that the installed package is what gets tested.
tests=$PWD/tests
config=$PWD/pyproject.toml
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
cd "$away"
backends=$("$python" -c 'from jax_trirun import _ffi; print(*_ffi.usable_backends())' 2>"$logs/import.log")
if [[ " $backends " == *" cuda "* && " $backends " == *" cuda-portable "* ]]; then
  note "back ends" passed "$backends"
else
  cat "$logs/import.log"
  fail "back ends" "wanted cuda and cuda-portable among '$backends'"
  finish
fi

# ---- Tests ----------------------------------------------------------------------------------------
# Many processes at a time: XLA's compiler, not the GPU, takes the time. Each gets a file and the keywords of
# its part of it.
test_part() {
  number=$1 file=$2 keywords=$3
  name=$(basename "$file" .py)-$number
  "$python" -m pytest -q -rsfE --rootdir "$(dirname "$tests")" -c "$config" -p no:cacheprovider -k "$keywords" "$file" >"$logs/$name.log" 2>&1
  code=$?
  [ "$code" = 5 ] && code=0 # nothing in the file has these keywords
  echo "$code $name $(tail -1 "$logs/$name.log")" >>"$logs/tests.txt"
}
export -f test_part
export python logs tests config

list_parts() {  # the longest first
  for backend in "cuda-portable" "cuda and not cuda-portable" "reference" "not cuda and not reference"; do
    for kind in "group_sizes" "test_any" "not group_sizes and not test_any"; do
      echo "$tests/test_matmul.py|($backend) and ($kind)"
    done
  done
  for mode in "cuda-portable" "not cuda-portable"; do
    for kind in "every_kernel or more_than or very_long" "rows or tile" "not (every_kernel or more_than or very_long or rows or tile)"; do
      echo "$tests/test_cuda.py|$mode and ($kind)"
    done
  done
  for mode in "portable" "not portable"; do
    for kind in "test_every" "not test_every"; do
      echo "$tests/test_cuda_gemm.py|$mode and $kind"
    done
  done
  for file in "$tests"/test_*.py; do
    case $(basename "$file") in test_matmul.py | test_cuda.py | test_cuda_gemm.py) ;; *) echo "$file|test" ;; esac
  done
}

if [ -z "${SKIP_TESTS:-}" ]; then
  began=$SECONDS
  : >"$logs/tests.txt"
  list_parts | grep -E "/(${only// /|})[|]" | awk -F'|' '{ printf "%s%c%s%c%s%c", NR, 0, $1, 0, $2, 0 }' |
    xargs -0 -n 3 -P "$jobs" bash -c 'test_part "$@"' test_part
  parts=$(grep -c . "$logs/tests.txt")
  bad=$(grep -vc '^0 ' "$logs/tests.txt")
  total=$(grep -hoE '[0-9]+ passed' "$logs"/test_*.log | awk '{ n += $1 } END { print n + 0 }')
  skipped=$(grep -hoE '[0-9]+ skipped' "$logs"/test_*.log | awk '{ n += $1 } END { print n + 0 }')
  if [ "$bad" = 0 ] && [ "$total" -gt 0 ]; then
    note tests passed "$total passed, $skipped skipped, in $parts processes, $((SECONDS - began)) s"
  else
    while read -r line; do fail tests "${line#* }"; done < <(grep -v '^0 ' "$logs/tests.txt")
    grep -hE '^(FAILED|ERROR) ' "$logs"/test_*.log | head -60
    fail tests "$total passed, $skipped skipped, $bad of $parts processes failed, $((SECONDS - began)) s"
  fi
  grep -hE '^SKIPPED' "$logs"/test_*.log | sort | uniq -c | sort -rn | head -20
fi

# ---- Sanitizer ------------------------------------------------------------------------------------
# Each array in an allocation of its own (platform), so that a step outside of one is seen.
sanitize() {
  tool=$1
  began=$SECONDS
  XLA_PYTHON_CLIENT_ALLOCATOR=platform timeout "${SANITIZER_SECONDS:-200}" \
    compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 20 \
    "$python" "$tests/sanitize_cuda.py" >"$logs/$tool.log" 2>&1
  code=$?
  case $code in
    0) echo "0 $tool $((SECONDS - began)) s, $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$logs/$tool.log" | tail -1 | sed 's/=* *//')" ;;
    124) echo "124 $tool ran out of its time, see $tool.log" ;;
    *) echo "$code $tool exit status $code, see $tool.log" ;;
  esac >>"$logs/sanitizer.txt"
}
export -f sanitize

if [ -z "${SKIP_SANITIZER:-}" ]; then
  export PATH=$PATH:/usr/local/cuda/bin
  if ! command -v compute-sanitizer >/dev/null; then
    fail sanitizer "compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)"
  else
    : >"$logs/sanitizer.txt"
    printf '%s\n' memcheck racecheck synccheck initcheck | xargs -n 1 -P 4 bash -c 'sanitize "$0"'
    while read -r code tool rest; do
      if [ "$code" = 0 ]; then
        note "$tool" passed "$rest"
      else
        grep -E '=========' "$logs/$tool.log" | head -20
        fail "$tool" "$rest"
      fi
    done < <(sort -k2 "$logs/sanitizer.txt")
  fi
fi

finish
