"""``python -m mmdet_softnms COMMAND``."""

import sys

from mmdet_softnms.cli.main import main

if __name__ == '__main__':
    sys.exit(main())
