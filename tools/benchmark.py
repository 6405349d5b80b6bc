"""``python -m mmdet_softnms benchmark``, where OpenMMLab users look for it; the benchmarks are in benchmarks/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone without installing

from mmdet_softnms.cli.benchmark import main

if __name__ == '__main__':
    main()
