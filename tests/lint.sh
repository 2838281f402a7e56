#!/usr/bin/env bash
# Every check of style and types, with the tools pinned in tests/lint-requirements.txt:
#
#     tests/lint.sh          complain
#     tests/lint.sh --fix    format and repair what can be
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-$(dirname "$(command -v "${PYTHON:-python3}")")}  # where the tools are; a venv's bin folder
mapfile -t cpp < <(git ls-files 'csrc/*.h' 'csrc/*.cc' 'csrc/*.cu' 'csrc/*.cuh')

if [[ ${1:-} == --fix ]]; then
  "$BIN/ruff" check --quiet --fix .
  "$BIN/ruff" format --quiet .
  "$BIN/clang-format" -i "${cpp[@]}"
fi

failed=0
"$BIN/ruff" check . || failed=1
"$BIN/ruff" format --check --quiet . || failed=1
"$BIN/mypy" || failed=1
"$BIN/clang-format" --dry-run --Werror "${cpp[@]}" || failed=1
if ((failed)); then echo "lint: there is something to repair (see above)"; else echo "lint: all clean"; fi
exit "$failed"
