#!/usr/bin/env bash
# Sets up whatever is missing, draws the data set, and runs the tests. Run it again any time.
#
#   bash tools/run_tests.sh [--stack default|official] [--python PATH] [--use-installed-torch] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/setup_env.sh
take_setup_options "$@"
setup_env
setup_tests
[ "$STACK" != default ] || (setup_detectron2) || say 'Detectron2 cannot be installed here: its tests are skipped, and say so'
[ "$STACK" != default ] || (setup_mmrotate) || say 'mmrotate cannot be installed here: its tests are skipped, and say so'
"$VENV/bin/python" tools/make_demo_dataset.py >&2
say 'Running the tests (about 11 min on 2 cores)'
cores=$(getconf _NPROCESSORS_ONLN)
exec "$VENV/bin/python" -m pytest --numprocesses $((cores < 4 ? cores : 4)) --dist loadscope --no-loadscope-reorder ${REST[@]+"${REST[@]}"}
