#!/usr/bin/env bash
# Write requirements.lock: every package of an image but torch, with hashes. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/.."
compile() {
  uv pip compile pyproject.toml --extra cluster --python-version 3.11 --python-platform x86_64-manylinux_2_28 --quiet \
    --no-annotate --no-header --constraint <(echo "torch==$(cat containers/torch.version)") "$@"
}

# What comes with torch's own build; the GUI toolkit of deepbet; what nilearn, of which only the template's files are
# read, and TemplateFlow, whose files an image takes from outside, depend on
left_out=(torch triton setuptools customtkinter darkdetect scikit-learn joblib threadpoolctl templateflow acres pybids
  sqlalchemy greenlet formulaic interface-meta narwhals num2words docopt universal-pathlib pathlib-abc bids-validator
  $(compile | grep -oE '^(nvidia|cuda)-[a-z0-9-]+'))
compile --generate-hashes "${left_out[@]/#/--no-emit-package=}" --output-file containers/requirements.lock
