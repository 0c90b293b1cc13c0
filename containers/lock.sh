#!/usr/bin/env bash
# Write requirements.lock: every package of an image but torch, with hashes. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/.."
compile() {
  uv pip compile pyproject.toml --extra cluster --python-version 3.11 --python-platform x86_64-manylinux_2_28 --quiet \
    --no-annotate --no-header --constraint <(echo "torch==$(cat containers/torch.version)") "$@"
}

# What comes with torch's own build, and the GUI toolkit of deepbet
left_out=(torch triton setuptools customtkinter darkdetect $(compile | grep -oE '^(nvidia|cuda)-[a-z0-9-]+'))
compile --generate-hashes "${left_out[@]/#/--no-emit-package=}" --output-file containers/requirements.lock
