#!/usr/bin/env bash
# Remove from an installation what dsiprep never loads: headers, test programs, symbols, parts of pyarrow.
#
#   slim.sh /opt/dsiprep
set -euo pipefail
site=$(echo "$1"/lib/python3*/site-packages)

rm -rf "$site"/torch/{include,test,share} "$site"/torch/testing/_internal/*/ "$site"/pyarrow/{include,tests,src}
rm -rf "$site"/{sympy,mpmath} # torch needs them to compile models
find "$site"/torch/bin -type f ! -name torch_shm_manager -delete # torch looks for this one when it is imported
find "$site"/pyarrow -name '*flight*' -o -name '*substrait*' -o -name '*s3*' -o -name '*gcsfs*' -o -name '*azurefs*' \
  -o -name '*gandiva*' -o -name '*.pxd' | xargs rm -rf
find "$site" \( -name tests -o -name test \) -type d ! -path "$site/torch/*" -prune -exec rm -rf {} +
find "$site" \( -name '*.a' -o -name '*.h' -o -name '*.hpp' -o -name '*.c' -o -name '*.pyx' \) -type f -delete
find "$1" -name __pycache__ -type d -prune -exec rm -rf {} +
if command -v strip >/dev/null; then # wheels whose libraries were not stripped when they were built
  strip --strip-unneeded "$site"/torch/lib/libtorch_{cpu,python}.so "$site"/llvmlite/binding/*.so
  strip --strip-unneeded "$site"/{cc3d,fill_voids,kiwisolver}/*.so
  find "$site"/pyarrow -name 'lib*.so.*' -exec strip --strip-unneeded {} +
fi
