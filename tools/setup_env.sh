# shellcheck shell=bash
# Makes the virtual environment of one stack; sourced by quickstart.sh and run_tests.sh, from the project's root.
#
# Every step is timed and leaves a stamp in the environment that carries a hash of what it installed, so that a step is
# done once, and again only when its input changed. Nothing outside the project's folder is written but pip's cache.

STACK=default PYTHON='' USE_INSTALLED_TORCH=false
# GNU OpenMP's threads wait for each other by spinning: beside any other process, two are up to 50 times slower than one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
BUILD_FLAGS='-O2 -g0 -DNDEBUG -w' # optimised as releases are; no debug symbols and no warnings: half of the plain time

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() {
  printf '\033[31merror:\033[0m %s\n' "$*" >&2
  exit 1
}
hash_of() { cksum | cut -d' ' -f1; }

# take_setup_options ARGS...: takes --stack, --python and --use-installed-torch; leaves the others in REST.
take_setup_options() {
  REST=()
  while [ $# -gt 0 ]; do
    case $1 in
      --stack | --python)
        [ $# -gt 1 ] || die "$1 needs a value"
        if [ "$1" = --stack ]; then STACK=$2; else PYTHON=$2; fi
        shift 2
        ;;
      --use-installed-torch) USE_INSTALLED_TORCH=true && shift ;;
      *) REST+=("$1") && shift ;;
    esac
  done
  case $STACK in
    default) # maintained
      VENV=.venv
      MMCV=onedl-mmcv==2.3.6
      STACK_PACKAGES=(onedl-mmengine==0.10.12 onedl-mmdetection==3.5.1)
      BUILD_TOOLS=('setuptools>=77' wheel ninja) # mmcv states its licence in the newer way
      ;;
    official) # frozen since 2024: its build needs setuptools < 80, and mmengine imports pkg_resources at run time
      VENV=.venv-official
      MMCV=mmcv==2.1.0
      STACK_PACKAGES=(mmengine==0.10.7 mmdet==3.3.0)
      BUILD_TOOLS=('setuptools<80' wheel ninja)
      ;;
    *) die "unknown stack '$STACK'; there are 'default' (onedl-mmdetection 3.5.1) and 'official' (mmdet 3.3.0)" ;;
  esac
}

# step NAME EXPECTED HASHED COMMAND...: runs a command once for each value of HASHED, its output in setup.log.
step() {
  local name=$1 expected=$2 stamp start
  stamp=$VENV/.stamps/${1// /_}-$(printf '%s' "$3" | hash_of)
  shift 3
  if [ -e "$stamp" ]; then
    echo "  $name: done before" >&2
    return
  fi
  mkdir -p "$VENV/.stamps"
  start=$SECONDS
  printf '  %s (about %s) ... ' "$name" "$expected" >&2
  printf '\n== %s\n' "$name" >>"$VENV/setup.log"
  if ! "$@" >>"$VENV/setup.log" 2>&1; then
    echo "failed after $((SECONDS - start)) s" >&2
    tail -n 12 "$VENV/setup.log" | cut -c 1-200 >&2
    die "step '$name' failed. $(remedy) The whole output is in $VENV/setup.log; afterwards, run the same command again."
  fi
  touch "$stamp"
  echo "$((SECONDS - start)) s" >&2
}

# remedy: what the log of the failed step points to.
remedy() {
  local log
  log=$(awk '/^== / {text = ""} {text = text $0 "\n"} END {printf "%s", text}' "$VENV/setup.log")
  case $log in
    *"No space left"*) echo "The disk is full: make room and try again." ;;
    *"NewConnectionError"* | *"NameResolutionError"* | *"name resolution"* | *"timed out"* | *"Network is unreachable"*)
      echo "The package index cannot be reached: check the network, or pip's index and proxy settings." ;;
    *"No matching distribution found for torch"*)
      echo "There is no torch for this Python: pass --python with Python 3.10 to 3.13, or --use-installed-torch." ;;
    *"Python.h: No such file"*) echo "Python's headers are missing: install python3-dev (Fedora: python3-devel)." ;;
    *"No module named 'torch'"*) echo "$PYTHON has no torch to use: install it there, or leave --use-installed-torch out." ;;
    *"libGL.so"*) echo "OpenCV needs libGL: install libgl1 (Fedora: mesa-libGL)." ;;
    *"libgthread"* | *"libglib"*) echo "OpenCV needs GLib: install libglib2.0-0 (Fedora: glib2)." ;;
    *"Killed"* | *"out of memory"*) echo "The compiler ran out of memory: set MAX_JOBS=1." ;;
    *"undefined symbol"* | *"no attribute '_ext'"* | *"No module named 'mmcv._ext'"*)
      echo "mmcv does not fit the installed torch: delete $VENV and try again." ;;
    *) echo "See the lines above." ;;
  esac
}

# version_of PYTHON: major.minor of an interpreter that starts; version managers leave names that do not.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
old() { case $1 in [012].* | 3.[0-9]) return 0 ;; *) return 1 ;; esac }

# find_python: leaves in PYTHON the interpreter that was asked for, that made the environment, or the first that serves.
find_python() {
  local version candidate
  if $USE_INSTALLED_TORCH && ! [ -e "$VENV/constraints.txt" ]; then
    rm -rf "$VENV" # made with a torch of its own
  fi
  if [ -n "$PYTHON" ]; then
    version=$(version_of "$PYTHON") || die "$PYTHON does not start; --python takes the path of a Python interpreter"
    ! old "$version" || die "$PYTHON is Python $version; 3.10 or newer is needed"
    # Another interpreter than the environment's: made anew.
    local identity='import sys; print(sys.version_info, sys.base_prefix)'
    if [ -x "$VENV/bin/python" ] && [ "$("$PYTHON" -c "$identity")" != "$("$VENV/bin/python" -c "$identity")" ]; then
      rm -rf "$VENV"
    fi
  elif version=$(version_of "$VENV/bin/python"); then
    PYTHON=$VENV/bin/python
  else
    rm -rf "$VENV" # nothing, or what is left of an environment whose interpreter is gone
    local candidates='python3.11 python3.12 python3.10 python3.13 python3 python' tried=''
    ! $USE_INSTALLED_TORCH || candidates='python3 python'
    for candidate in $candidates; do
      version=$(version_of "$candidate") || continue
      if ! old "$version"; then
        PYTHON=$candidate
        break
      fi
      tried+="; $candidate is $version"
    done
    [ -n "$PYTHON" ] || die "no Python 3.10 or newer was found$tried; install one, or pass --python PATH"
  fi
  [ "$version" = 3.11 ] || echo "  note: this set-up was tried with Python 3.11, not with $version" >&2
}

# check_machine: what must be there before anything is installed.
check_machine() {
  local free
  "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || die "$PYTHON has no venv module: install python3-venv"
  command -v "${CXX:-c++}" >/dev/null ||
    die "no C++ compiler (${CXX:-c++}), and mmcv has to be compiled: install g++, or set CXX to the one you have"
  [ -e "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    die "Python's headers (Python.h) are missing for $PYTHON: install python3-dev (Fedora: python3-devel)"
  free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free" -ge 4 ] || die "only $free GB are free on this disk, and 4 GB are needed: make room"
}

make_venv() { "$PYTHON" -m venv "$VENV"; }

# pip_install ARGS...: with the tested versions; next to a torch of yours, only with torch and numpy as they are.
pip_install() {
  local constraints=tools/constraints.txt
  ! $USE_INSTALLED_TORCH || constraints=$VENV/constraints.txt
  "$VENV/bin/python" -m pip install --disable-pip-version-check --constraint "$constraints" "$@"
}

install_torch() {
  # Never a range or a plain "torch": that would take the newest build.
  if $USE_INSTALLED_TORCH; then
    # A path file rather than --system-site-packages: it also finds the torch of conda or of another environment.
    "$PYTHON" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' >"$VENV/torch.pth" &&
      mv "$VENV/torch.pth" "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" &&
      "$VENV/bin/python" -c 'from importlib.metadata import version
import torch, numpy # torch.__version__ says +cu130 also where the package index calls it otherwise
for package in "torch", "numpy": print(package + "==" + version(package))' >"$VENV/constraints.txt" &&
      pip_install "${BUILD_TOOLS[@]}"
  else
    pip_install torch==2.13.0 numpy "${BUILD_TOOLS[@]}"
  fi
}

build_mmcv() (
  # Without build isolation, or mmcv is built without torch and its ops are left out in silence; not from pip's cache,
  # where a build of just that kind may lie.
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  export PATH=$PWD/$VENV/bin:$PATH PCH_DIR=$scratch/pch REAL_CXX=${CXX:-c++}
  export CXX=$PWD/tools/cxx_with_pch.sh CFLAGS=$BUILD_FLAGS MMCV_WITH_OPS=1
  export MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
  "$VENV/bin/python" -m pip install --verbose --disable-pip-version-check --no-cache-dir --no-build-isolation \
    --force-reinstall --no-deps "$MMCV"
)

install_packages() {
  pip_install "${STACK_PACKAGES[@]}" "$MMCV" "${BUILD_TOOLS[@]}" --editable '.[reevaluate,bench]' || return
  # mmcv asks for the OpenCV with windows, which needs libGL; a server without it gets the one without windows instead.
  "$VENV/bin/python" -c 'import cv2' ||
    pip_install --force-reinstall --no-deps opencv-python-headless
}

# setup_tests: what only the tests need, onnxruntime and Triton's interpreter among it (1 GB on disk).
setup_tests() {
  step 'test packages' '30 s, plus the download' "$(cat tools/constraints.txt pyproject.toml | hash_of) $PWD" \
    pip_install "${BUILD_TOOLS[@]}" "$MMCV" --editable '.[test,lint]'
}

# setup_detectron2: Detectron2 for tests/test_detectron2.py, in a folder that no other test looks into.
setup_detectron2() {
  step detectron2 '15 s, plus the download' "$(declare -f install_detectron2 stub_cuda)" install_detectron2
}

# Detectron2 has no wheels. Its Python files serve without a build: the compiled part is for deformable convolution and
# rotated boxes. No versions of $VENV change: everything goes into the folder, without dependencies.
install_detectron2() (
  place=$PWD/$VENV/detectron2
  rm -rf "$place" && mkdir -p "$place/stubs"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps --target "$place" torchvision==0.28.0 \
    yacs==0.1.8 fvcore==0.1.5.post20221221 iopath==0.1.9 omegaconf==2.3.0 hydra-core==1.3.8 \
    antlr4-python3-runtime==4.9.3 tabulate==0.10.0 portalocker==4.4.2 setuptools==79.0.1 && # with pkg_resources
    "$VENV/bin/python" -m pip download --disable-pip-version-check --no-deps --no-build-isolation --dest "$scratch" \
      pb1-detectron2==0.6 &&
    tar -xzf "$scratch"/pb1-detectron2-0.6.tar.gz -C "$scratch" &&
    mv "$scratch/pb1-detectron2-0.6/detectron2" "$place" || exit
  ! "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || stub_cuda "$place"
)

# setup_mmrotate: mmrotate for tests/test_mmrotate.py, in a folder that no other test looks into; after Detectron2, whose
# torchvision its models import.
setup_mmrotate() {
  step mmrotate '5 s, plus the download' "$(declare -f install_mmrotate)" install_mmrotate
}

install_mmrotate() {
  rm -rf "$VENV/mmrotate"
  "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps --target "$VENV/mmrotate" onedl-mmrotate==1.2.1
}

# stub_cuda FOLDER: the index has torchvision for CUDA only. Beside a torch for the CPU, its CPU operators work once the
# symbols of the CUDA libraries exist; nothing calls them. Left in FOLDER/stubs, for tests/detectron2_for_tests.py.
stub_cuda() (
  cd "$1/stubs" || exit
  nm -D --undefined-only ../torchvision/_C.so | awk '/cuda/ {print $NF}' >symbols
  cudart=$(grep -o 'libcudart.so.[0-9]*' symbols | head -n 1)
  echo "$cudart { global: *; };" >versions
  stub() { # NAME OPTIONS...: a library of functions that return 0, its symbols from the standard input
    awk -F@ '{print "long " $1 "(void) { return 0; }"}' | "${CC:-cc}" -w -shared -fPIC -x c -Wl,-soname,"$1" -o "$@" -
  }
  grep @ symbols | stub "$cudart" -Wl,--version-script=versions &&
    grep -v @ symbols | stub libc10_cuda.so &&
    stub libtorch_cuda.so </dev/null
)

# The ops are called, not only imported: built against another torch, they fail here and not in the middle of a job.
check_install() {
  "$VENV/bin/python" -c '
import mmdet, mmdet_softnms.registry, torch
from mmcv.ops import nms
assert nms(torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]]), torch.tensor([0.9, 0.8]), 0.5)[1].tolist() == [0]'
}

# setup_env: everything, once.
setup_env() {
  local start=$SECONDS tested packages
  say "Setting up $VENV ($STACK stack)"
  find_python
  [ ! -e "$VENV/constraints.txt" ] || USE_INSTALLED_TORCH=true # as this environment was made
  # The versions that count for each step; the project's own path, since its editable install holds it.
  tested="$(grep -E '^(torch|numpy)==' tools/constraints.txt) ${BUILD_TOOLS[*]} $USE_INSTALLED_TORCH"
  packages="$tested ${STACK_PACKAGES[*]} $(cat tools/constraints.txt pyproject.toml | hash_of) $PWD"
  [ -e "$VENV/.stamps/environment-$(printf '%s' "$USE_INSTALLED_TORCH" | hash_of)" ] || check_machine
  step environment '5 s' "$USE_INSTALLED_TORCH" make_venv
  if ! $USE_INSTALLED_TORCH && [ "$(uname)" = Linux ] && ! compgen -G "$VENV/.stamps/torch-*" >/dev/null; then
    echo '  torch: pip takes the CPU build where PIP_FIND_LINKS or its index offers it, else one with CUDA, of several GB' >&2
  fi
  step torch '30 s, plus the download' "$tested" install_torch
  step "mmcv's ops" '2 min on 2 cores' "$MMCV $tested $BUILD_FLAGS" build_mmcv
  step packages '1 min, plus the download' "$packages" install_packages
  step check '15 s' "$packages $MMCV" check_install
  echo "  environment ready after $((SECONDS - start)) s" >&2
}
