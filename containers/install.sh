#!/usr/bin/env bash
# Install dsiprep into /opt/dsiprep of a Debian system; Dockerfile, Apptainer definition and chroot.sh all do it by this.
#
#   install.sh WHEEL [cpu|cuda]
#
# requirements.lock, beside this script, names every package but torch, whose build depends on the variant; lock.sh says
# what it leaves out.
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

bash "$here/slim.sh" "$target"
# A read-only image cannot compile what it loads: that is done now, for the modules that a run loads and no others.
env --unset PYTHONDONTWRITEBYTECODE "$target/bin/python" -c "
import importlib, pkgutil, dsiprep, deepbet, cs_dmri, SimpleITK, qsiplan, matplotlib.pyplot, skimage.restoration, distributed
for module in pkgutil.walk_packages(dsiprep.__path__, 'dsiprep.'):
    if not module.name.endswith('__main__'):
        importlib.import_module(module.name)
"
