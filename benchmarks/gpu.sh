#!/usr/bin/env bash
# Every stage on the CPU and on a GPU, on a machine that has Python 3.12, PyTorch, Numba, NumPy, SciPy and h5py, and no
# network.
#
#   benchmarks/gpu.sh prepare [FOLDER]           where pip works: collect what is missing there (.gpu in the repository)
#   benchmarks/gpu.sh run OUT [FOLDER] [-- ...]  on the machine with the GPU: gpu.json and gpu.md in OUT, within 9 minutes
#
# What stands after -- goes to benchmarks/gpu.py: --devices cpu --small tries the same without a GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-500}
LIMIT_MIB=60 # of the repository and the folder together

packages=(nibabel cs_dmri deepbet connected-components-3d fill_voids fastremap pandas tqdm python-dateutil six tzdata
  packaging typing_extensions pytest pluggy iniconfig pygments)

fetch() { # FOLDER PACKAGE: its wheel for Python 3.12 on x86-64, without what it depends on
  local platforms=()
  for version in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$1" "$2"
}

prepare() {
  local folder=${1:-$root/.gpu} brain version total
  rm -rf "$folder" && mkdir -p "$folder/site"
  for package in "${packages[@]}"; do fetch "$folder" "$package"; done
  # The phantom and the template need three images of nilearn, and dsiprep its own version number.
  brain=$(mktemp -d)
  fetch "$brain" nilearn
  "$PYTHON" - "$brain"/nilearn-*.whl "$folder/site" <<'PY'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    for name in wheel.namelist():
        if name.endswith("_tal_nlin_sym_09a_converted.nii.gz") and any(f"icbm152_{part}_" in name for part in ("t1", "gm", "wm")):
            wheel.extract(name, sys.argv[2])
PY
  rm -r "$brain"
  touch "$folder/site/nilearn/__init__.py"
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
  mkdir "$folder/site/dsiprep-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: dsiprep\nVersion: %s\n' "$version" >"$folder/site/dsiprep-$version.dist-info/METADATA"
  total=$({ (cd "$root" && git ls-files -z --cached --others --exclude-standard | xargs -0 du -bc --files0-from=- 2>/dev/null || true)
    du -bs "$folder"; } | awk '/total$/ {s += $1} END {s += $1; print int(s / 1048576)}')
  echo "$folder: with the repository $total MiB"
  [ "$total" -le "$LIMIT_MIB" ] || { echo "more than $LIMIT_MIB MiB" >&2; exit 1; }
}

run() {
  local out=${1:?give a folder for the results} folder=$root/.gpu site
  shift
  if [ $# -gt 0 ] && [ "$1" != -- ]; then folder=$1 && shift; fi
  [ "${1:-}" = -- ] && shift
  site=$(mktemp -d)
  cp -r "$folder/site/." "$site"
  for wheel in "$folder"/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$site"; done
  export PYTHONPATH=$root/src:$site PYTHONUNBUFFERED=1
  timeout --kill-after=10 $((SECONDS_IN_ALL + 25)) \
    "$PYTHON" "$root/benchmarks/gpu.py" "$out" --budget "$SECONDS_IN_ALL" "$@"
}

case ${1:-} in
prepare | run) "$@" ;;
*)
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit 2
  ;;
esac
