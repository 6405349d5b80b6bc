"""``python -m mmdet_softnms reproduce``, where OpenMMLab users look for it; see mmdet_softnms/cli/reproduce.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone without installing

from mmdet_softnms.cli.reproduce import main

if __name__ == '__main__':
    sys.exit(main())
