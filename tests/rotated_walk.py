"""Every config of the installed mmrotate: does its detector take rules, and if not, why?

python -m tests.rotated_walk prints the numbers of docs/rules.md.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import mmdet.registry
import mmrotate
from mmengine.config import Config

from mmdet_softnms.models import dense_heads, roi_heads
from mmdet_softnms.registry import resolve

ROOT = Path(mmrotate.__file__).parent / '.mim/configs'


def configs() -> list[Path]:
    return sorted(path for path in ROOT.rglob('*.py') if not {'_base_', '__pycache__'} & set(path.parts))


def verdict(path: Path) -> tuple[str, str] | None:
    """The head of a config that suppresses, and why it cannot take rules (empty: it can); None: it has no model."""
    try:
        model = Config.fromfile(path, import_custom_modules=False).get('model')
    except FileNotFoundError:
        return path.parent.name, 'cannot be read: its base is a file that mmrotate does not bring'
    if not isinstance(model, dict) or 'type' not in model:
        return None

    def class_of(head: Any) -> Any:
        return resolve(head['type'], mmdet.registry.MODELS, 'mmrotate').cls

    if isinstance(model.get('roi_head'), dict):
        cls = class_of(model.roi_head)
        return cls.__name__, roi_heads.why_not(cls)
    heads = model.get('bbox_head_refine') or [model.get('bbox_head')]
    if heads[-1] is None:
        return path.parent.name, 'cannot be read: it is written for an older mmrotate'
    cls = class_of(heads[-1])
    return cls.__name__, dense_heads.why_not(cls)


def main() -> None:
    """Print how many configs there are of each head and verdict."""
    found = Counter(one for path in configs() if (one := verdict(path)) is not None)
    for (head, reason), count in sorted(found.items()):
        print(f'{count:4} {head}: {reason or "takes rules"}')
    print(f'{sum(found.values()):4} configs, {sum(n for (_, reason), n in found.items() if not reason)} take rules')


if __name__ == '__main__':
    from mmrotate.utils import register_all_modules

    register_all_modules()
    main()
