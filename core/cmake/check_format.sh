#!/bin/bash
# Compares every C++ file of the repository with what clang-format makes of it, prints the difference, and exits 1
# where there is one. `check_format.sh --fix` writes it instead. Version 14 is Debian 12's; others differ in details.
set -euo pipefail
cd "$(dirname "$0")/../.."

tool=$(command -v clang-format-14 || command -v clang-format || true)
[ -n "$tool" ] || { echo "check-format: clang-format is missing: apt-get install clang-format" >&2; exit 2; }
mapfile -t files < <(git ls-files --cached --others --exclude-standard -- '*.cpp' '*.h' '*.cu' '*.cuh' '*.c')
if [ "${1:-}" = --fix ]; then
  exec "$tool" -i "${files[@]}"
fi
failed=0
for file in "${files[@]}"; do
  [ -e "$file" ] || continue
  "$tool" "$file" | diff -u --label "$file" --label "$file (clang-format)" "$file" - || failed=1
done
[ $failed = 0 ] && echo "check-format: ${#files[@]} files are as $("$tool" --version | grep -o 'version [0-9.]*') leaves them"
exit $failed
