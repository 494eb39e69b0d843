#!/usr/bin/env bash
# Installs a reader of the transformers 4.4x kind into a cache folder keyed by version, once a machine (20
# seconds), and prints the folder. It must never enter the project's environment, which lends it torch and the
# rest. The test of baked folders finds it through SO8T_TRANSFORMERS4.
set -euo pipefail
version=4.46.3
root=$(cd "$(dirname "$0")/.." && pwd)
python=${SO8T_PYTHON:-$root/.venv/bin/python}
cache="${SO8T_CI_CACHE:-$HOME/.cache/so8t-ci}/transformers-$version"

if [ ! -d "$cache" ]; then
  mkdir -p "$(dirname "$cache")"
  rm -rf "$cache.tmp"
  "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$cache.tmp" \
    "transformers==$version" tokenizers==0.20.3 huggingface-hub==0.26.5 >&2
  mv "$cache.tmp" "$cache"
fi
echo "$cache"
