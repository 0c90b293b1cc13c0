#!/usr/bin/env bash
# Install dsiprep into /opt/dsiprep of a Debian system; Dockerfile, Apptainer definition and chroot.sh all do it by this.
#
#   install.sh WHEEL [cpu|cuda]
#
# requirements.lock, beside this script, names every package but torch, whose build depends on the variant, and without
# the GUI toolkit that deepbet asks for: dsiprep uses its network only.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wheel=$1 variant=${2:-cpu}
torch=$(cat "$here/torch.version")
target=/opt/dsiprep

python3 -m venv "$target"
pip() { "$target/bin/python" -m pip --no-cache-dir --quiet "$@"; }
# A local copy of torch's CPU build, if there is one; otherwise uv knows where PyTorch keeps its builds.
if [ "$variant" = cpu ] && compgen -G "${PIP_FIND_LINKS:-/nonexistent}/torch-$torch+cpu-*.whl" >/dev/null; then
  pip install "torch==$torch+cpu"
else
  pip install uv
  "$target/bin/uv" pip install --quiet --no-cache --python "$target/bin/python" \
    --torch-backend "$([ "$variant" = cpu ] && echo cpu || echo "${CUDA:-cu130}")" "torch==$torch"
  pip uninstall --yes uv
fi
pip install --no-deps --require-hashes --requirement "$here/requirements.lock"
pip install --no-deps "$wheel"
pip uninstall --yes pip setuptools 2>/dev/null || true

# What only builds and tests of other packages need
site=$(echo "$target"/lib/python3*/site-packages)
rm -rf "$site"/torch/{include,test} "$site"/torch/lib/*.a "$site"/pyarrow/{include,tests} "$site"/pyarrow/*.a
find "$site" \( -name tests -o -name test \) -type d -path '*/site-packages/*' \
  ! -path '*/torch/*' ! -path '*/numpy/*' ! -path '*/numba/*' -prune -exec rm -rf {} +
find "$target" -name '__pycache__' -type d -prune -exec rm -rf {} +
"$target/bin/python" -m compileall -q -j 0 "$target/lib" || true # a read-only image cannot compile later
