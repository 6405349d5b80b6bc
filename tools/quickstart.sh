#!/usr/bin/env bash
# From a fresh clone to a table: sets up an environment and re-evaluates the embedded detector. Run it again any time.
#
#   bash tools/quickstart.sh [--stack default|official] [--python PATH] [--use-installed-torch] [--setup-only]
#
# --stack official: mmdet 3.3.0 and mmcv 2.1.0, in .venv-official, instead of their maintained successors in .venv.
# --use-installed-torch: the torch (say, with CUDA) of the Python that runs this, instead of torch 2.13.0.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/setup_env.sh
take_setup_options "$@"
case ${REST[*]-} in
  '' | --setup-only) ;;
  *) die "unknown option ${REST[*]}; see the head of tools/quickstart.sh" ;;
esac
setup_env
[ -z "${REST[*]-}" ] || exit 0

start=$SECONDS
say 'Drawing the data set (about 10 s)'
"$VENV/bin/python" tools/make_demo_dataset.py
demo=configs/demo
for run in faster-rcnn_r18-w16_fpn_demo faster-rcnn_r18-w16_fpn_demo-sparse faster-rcnn_r18-w16_fpn_demo-voc \
  atss_r18-w16_fpn_demo rfcn_r18-w16_demo rfcn_r18-w16_demo-voc; do
  say "Re-evaluating the embedded detector: $run (about 20 s)"
  "$VENV/bin/python" tools/reevaluate.py "$demo/$run.py" "$demo/${run%demo*}demo.pth" --work-dir "work_dirs/$run"
done
say "Done: the main job took $((SECONDS - start)) s, everything $SECONDS s"
