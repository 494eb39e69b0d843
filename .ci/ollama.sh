#!/usr/bin/env bash
# Builds a real Ollama from its Go module into a cache folder keyed by version, once a machine (about
# 5 minutes on 2 cores), and prints the binary's path. Go modules leave out `vendor` folders, so three
# headers come from elsewhere: two from Debian's packages, miniaudio.h from the Go module malgo.
set -euo pipefail
version=0.24.0
malgo=v0.11.24
cache="${SO8T_CI_CACHE:-$HOME/.cache/so8t-ci}/ollama-$version"
binary="$cache/ollama"

if [ ! -x "$binary" ]; then
  mkdir -p "$cache/inc/miniaudio"
  if ! { [ -e /usr/include/nlohmann/json.hpp ] && [ -e /usr/include/stb/stb_image.h ]; }; then
    apt-get update -q >&2
    apt-get install -y -q nlohmann-json3-dev libstb-dev >&2
  fi
  # A throw-away module, since `go mod download` wants one to record the checksum in.
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  (cd "$scratch" && go mod init fetch >/dev/null 2>&1 && go mod download "github.com/gen2brain/malgo@$malgo" >&2)
  install -m 644 "$(go env GOMODCACHE)/github.com/gen2brain/malgo@$malgo/miniaudio.h" "$cache/inc/miniaudio/miniaudio.h"
  GOBIN="$scratch/bin" CPATH="$cache/inc" CGO_CFLAGS="-O3 -march=native" CGO_CXXFLAGS="-O3 -march=native" \
    go install -ldflags "-X github.com/ollama/ollama/version.Version=$version" "github.com/ollama/ollama@v$version" >&2
  mv "$scratch/bin/ollama" "$binary"
fi
echo "$binary"
