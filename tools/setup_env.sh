# Makes the virtual environment of one stack; sourced by quickstart.sh and run_tests.sh, from the project's root.
#
# Every step is timed and leaves a stamp in the environment that carries a hash of what it installed, so that a step is
# done once and again only when its input changed. Nothing outside the project's folder is written (but pip's cache).

STACKS="maintained (default): onedl-mmdetection 3.5.1; official: mmdet 3.3.0"
STACK=default PYTHON=${PYTHON:-} USE_INSTALLED_TORCH=false

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() {
  printf '\033[31merror:\033[0m %s\n' "$*" >&2
  exit 1
}

# take_setup_options ARGS...: takes --stack, --python, --use-installed-torch; leaves the others in REST.
take_setup_options() {
  REST=()
  while [ $# -gt 0 ]; do
    case $1 in
      --stack) STACK=${2:-} && shift 2 || die "--stack needs a value: default or official" ;;
      --python) PYTHON=${2:-} && shift 2 || die "--python needs the path of an interpreter" ;;
      --use-installed-torch) USE_INSTALLED_TORCH=true && shift ;;
      *) REST+=("$1") && shift ;;
    esac
  done
  case $STACK in
    default)
      VENV=.venv
      MMCV=onedl-mmcv==2.3.6
      STACK_PACKAGES=(onedl-mmengine==0.10.12 onedl-mmdetection==3.5.1)
      BUILD_TOOLS=(setuptools wheel ninja)
      ;;
    official) # frozen since 2024: its build needs setuptools < 80, and mmengine imports pkg_resources at run time
      VENV=.venv-official
      MMCV=mmcv==2.1.0
      STACK_PACKAGES=(mmengine==0.10.7 mmdet==3.3.0)
      BUILD_TOOLS=('setuptools<80' wheel ninja)
      ;;
    *) die "unknown stack '$STACK'; there are: $STACKS" ;;
  esac
}

# step NAME EXPECTED HASHED COMMAND...: run a command once for each value of HASHED, its output in setup.log.
step() {
  local name=$1 expected=$2 stamp start
  stamp=$VENV/.stamps/$1-$(printf '%s' "$3" | cksum | cut -d' ' -f1)
  shift 3
  if [ -e "$stamp" ]; then
    echo "  $name: done before" >&2
    return
  fi
  mkdir -p "$VENV/.stamps"
  start=$SECONDS
  printf '  %s (about %s) ... ' "$name" "$expected" >&2
  if ! "$@" >>"$VENV/setup.log" 2>&1; then
    echo "failed after $((SECONDS - start)) s" >&2
    tail -n 15 "$VENV/setup.log" >&2
    die "step '$name' failed. $(remedy) The whole output is in $VENV/setup.log; run the same command again afterwards."
  fi
  touch "$stamp"
  echo "$((SECONDS - start)) s" >&2
}

# remedy: what the end of the log points to.
remedy() {
  local log
  log=$(tail -n 60 "$VENV/setup.log")
  case $log in
    *"No space left"*) echo "The disk is full: make room (4 GB are needed) and try again." ;;
    *"Python.h"*) echo "Python's headers are missing: install python3-dev (Debian) or python3-devel (Fedora)." ;;
    *"libGL.so"*) echo "OpenCV needs libGL: install libgl1 (Debian) or mesa-libGL (Fedora)." ;;
    *"libgthread"* | *"libglib"*) echo "OpenCV needs GLib: install libglib2.0-0 (Debian) or glib2 (Fedora)." ;;
    *"Temporary failure in name resolution"* | *"NewConnectionError"* | *"Read timed out"* | *"ConnectTimeout"*)
      echo "The package index cannot be reached: check the network or pip's proxy settings." ;;
    *"Killed"* | *"cc1plus"*"memory"*) echo "The compiler ran out of memory: set MAX_JOBS=1." ;;
    *) echo "See the lines above." ;;
  esac
}

# check_machine: what must be there before anything is installed.
check_machine() {
  local candidate free
  for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3.13 python3 python}; do
    # An interpreter must start, not just be found: version managers leave names that do not.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      PYTHON=$candidate
      break
    fi
    candidate=
  done
  [ -n "${candidate:-}" ] || die "no Python 3.10 or newer (tried: ${PYTHON:-python3.10 to python3.13}); install one or pass --python PATH"
  "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$PYTHON has no venv module: install python3-venv (Debian)"
  command -v "${CXX:-c++}" >/dev/null ||
    die "no C++ compiler (${CXX:-c++}), and mmcv has to be compiled: install g++ (Debian: build-essential) or set CXX"
  [ -e "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    die "Python's headers (Python.h) are missing for $PYTHON: install python3-dev (Debian) or python3-devel (Fedora)"
  if ! [ -e "$VENV/.stamps" ]; then
    free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free" -ge 4 ] || die "only $free GB free on this disk; 4 GB are needed"
  fi
}

pip_install() { "$VENV/bin/python" -m pip install --disable-pip-version-check --constraint tools/constraints.txt "$@"; }

make_venv() {
  if $USE_INSTALLED_TORCH; then
    "$PYTHON" -m venv --system-site-packages "$VENV"
    "$VENV/bin/python" -c 'import torch'
  else
    "$PYTHON" -m venv "$VENV"
  fi
}

install_torch() {
  # No range and no plain "torch": that would take the newest build, with gigabytes of CUDA. A torch that is visible
  # through --use-installed-torch is left alone.
  if $USE_INSTALLED_TORCH; then
    "$VENV/bin/python" -m pip install "${BUILD_TOOLS[@]}"
  else
    pip_install torch==2.13.0 numpy "${BUILD_TOOLS[@]}"
  fi
}

build_mmcv() {
  # Without build isolation, or mmcv is built without torch and its ops are left out in silence. Optimisation as in
  # release builds; no debug symbols, which nobody reads and which take half of the time.
  local scratch
  scratch=$(mktemp -d)
  PATH=$PWD/$VENV/bin:$PATH REAL_CXX=${CXX:-c++} CXX=$PWD/tools/cxx_with_pch.sh PCH_DIR=$scratch/pch \
    CFLAGS='-O2 -g0 -w' MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    "$VENV/bin/python" -m pip install --no-build-isolation --no-deps "$MMCV"
  local status=$?
  rm -rf "$scratch"
  return $status
}

install_rest() {
  if $USE_INSTALLED_TORCH; then
    "$VENV/bin/python" -m pip install "${STACK_PACKAGES[@]}" "$MMCV" --editable '.[test,bench,lint]'
  else
    pip_install "${STACK_PACKAGES[@]}" "$MMCV" torch==2.13.0 "${BUILD_TOOLS[@]}" --editable '.[test,bench,lint]'
  fi
}

check_install() { "$VENV/bin/python" -c 'import cv2, mmcv.ops, mmdet, mmdet_softnms.registry'; }

# setup_env: everything, once.
setup_env() {
  local start=$SECONDS pins
  pins=$STACK-$USE_INSTALLED_TORCH-$(cat tools/constraints.txt tools/setup_env.sh | cksum | cut -d' ' -f1)
  say "Setting up $VENV ($STACK stack)"
  check_machine
  step venv '5 s' "$USE_INSTALLED_TORCH" make_venv
  step torch '1 min' "$pins" install_torch
  step "mmcv's ops" '3 min' "$MMCV $USE_INSTALLED_TORCH" build_mmcv
  step packages '1 min' "$pins-$(cksum <pyproject.toml)" install_rest
  step check '15 s' "$pins" check_install
  echo "  environment ready after $((SECONDS - start)) s" >&2
}
