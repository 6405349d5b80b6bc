"""Draw the embedded data set: small scenes with crowding, as real JPEG files with COCO json and VOC XML beside them.

    python tools/make_demo_dataset.py [--out data/demo] [--train 1200] [--crowded 240] [--sparse 120]

Deterministic: the same arguments and library versions give the same bytes. Splits: ``train`` and ``crowded`` come from
one distribution, in which objects of a class often stand close; in ``sparse`` hardly anything overlaps, so soft
suppression should change little there. Boxes cover the full extent of an object, hidden parts included, as annotators
of VOC do for visible ones; objects of which less than 35 % is visible are ``difficult`` in the XML and ``iscrowd`` in
the json, as mmdet's own VOC converter maps them.

A folder that is already complete is left alone; a new one is built beside it and renamed when it is whole.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageDraw

VERSION = 1  # of the drawing: raise it when the picture changes
SIZE = 192  # side of an image in pixels
DIFFICULT_BELOW = 0.35  # visible share of an object

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, both corners drawn
Colour = tuple[int, int, int]


@dataclass
class Shape:
    """One drawn object."""

    label: int
    box: Box
    visible: float = 1.0

    @property
    def difficult(self) -> bool:
        """Whether too little is visible to hold a detector to it."""
        return self.visible < DIFFICULT_BELOW


def _person(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, dark: Colour) -> None:
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    draw.ellipse((x1 + w * 0.28, y1, x2 - w * 0.28, y1 + h * 0.26), fill=(235, 190, 160), outline=dark)
    draw.rectangle((x1 + w * 0.2, y1 + h * 0.26, x2 - w * 0.2, y1 + h * 0.62), fill=colour, outline=dark)
    draw.rectangle((x1, y1 + h * 0.28, x1 + w * 0.18, y1 + h * 0.58), fill=colour, outline=dark)
    draw.rectangle((x2 - w * 0.18, y1 + h * 0.28, x2, y1 + h * 0.58), fill=colour, outline=dark)
    draw.rectangle((x1 + w * 0.22, y1 + h * 0.62, x1 + w * 0.45, y2), fill=dark)
    draw.rectangle((x2 - w * 0.45, y1 + h * 0.62, x2 - w * 0.22, y2), fill=dark)


def _car(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, dark: Colour) -> None:
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    draw.polygon(
        [(x1 + w * 0.2, y1 + h * 0.45), (x1 + w * 0.32, y1), (x1 + w * 0.7, y1), (x1 + w * 0.85, y1 + h * 0.45)],
        fill=(190, 220, 240),
        outline=dark,
    )
    draw.rectangle((x1, y1 + h * 0.42, x2, y1 + h * 0.8), fill=colour, outline=dark)
    for centre in (0.25, 0.75):
        draw.ellipse((x1 + w * (centre - 0.14), y1 + h * 0.6, x1 + w * (centre + 0.14), y2), fill=dark)


def _cup(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, dark: Colour) -> None:
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    draw.arc((x1 + w * 0.5, y1 + h * 0.2, x2, y1 + h * 0.7), 270, 90, fill=dark, width=max(2, w // 10))
    draw.polygon([(x1, y1), (x1 + w * 0.75, y1), (x1 + w * 0.65, y2), (x1 + w * 0.1, y2)], fill=colour, outline=dark)
    draw.ellipse((x1, y1, x1 + w * 0.75, y1 + h * 0.18), fill=dark)


def _tree(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, dark: Colour) -> None:
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    draw.rectangle((x1 + w * 0.4, y1 + h * 0.6, x1 + w * 0.6, y2), fill=dark)
    for top, bottom, inset in ((0.0, 0.4, 0.2), (0.2, 0.6, 0.1), (0.4, 0.8, 0.0)):
        draw.polygon(
            [(x1 + w * 0.5, y1 + h * top), (x1 + w * inset, y1 + h * bottom), (x2 - w * inset, y1 + h * bottom)],
            fill=colour,
            outline=dark,
        )


def _fish(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, dark: Colour) -> None:
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    draw.polygon([(x1 + w * 0.62, y1 + h * 0.5), (x2, y1), (x2, y2)], fill=dark)
    draw.ellipse((x1, y1 + h * 0.05, x1 + w * 0.75, y2 - h * 0.05), fill=colour, outline=dark)
    draw.ellipse((x1 + w * 0.12, y1 + h * 0.3, x1 + w * 0.22, y1 + h * 0.48), fill=dark)


def _star(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, dark: Colour) -> None:
    x1, y1, x2, y2 = box
    points = []
    for corner in range(10):
        radius = 1.0 if corner % 2 == 0 else 0.45
        points.append((radius * np.sin(corner * np.pi / 5), -radius * np.cos(corner * np.pi / 5)))
    xs, ys = zip(*points, strict=True)
    scaled = [
        (x1 + (x - min(xs)) / (max(xs) - min(xs)) * (x2 - x1), y1 + (y - min(ys)) / (max(ys) - min(ys)) * (y2 - y1))
        for x, y in points
    ]
    draw.polygon(scaled, fill=colour, outline=dark)


#: Class name to (how it is drawn, width over height).
CLASSES: dict[str, tuple[Callable[[ImageDraw.ImageDraw, Box, Colour, Colour], None], float]] = {
    'person': (_person, 0.45),
    'car': (_car, 1.8),
    'cup': (_cup, 1.0),
    'tree': (_tree, 0.7),
    'fish': (_fish, 1.6),
    'star': (_star, 1.0),
}


def iou_matrix(boxes: np.ndarray) -> np.ndarray:
    """(N, N) IoU of (N, 4) ``xyxy`` boxes in pixels."""
    top_left = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    sides = (np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - top_left).clip(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return intersection / (areas[:, None] + areas[None, :] - intersection)


def overlap_shares(scenes: list[list[Shape]], thresholds: tuple[float, ...] = (0.3, 0.5, 0.7)) -> dict[str, float]:
    """Share, in [0, 1], of objects whose IoU with another of their class in their image exceeds each threshold."""
    highest: list[float] = []
    for scene in scenes:
        boxes = np.array([shape.box for shape in scene], float).reshape(-1, 4)
        labels = np.array([shape.label for shape in scene])
        overlaps = iou_matrix(boxes) * (labels[:, None] == labels[None, :])
        np.fill_diagonal(overlaps, 0)
        highest += overlaps.max(axis=1, initial=0).tolist()
    return {f'{threshold}': float(np.mean(np.array(highest) > threshold)) for threshold in thresholds}


def compose(random: np.random.Generator, crowded: bool) -> list[Shape]:
    """Choose objects and their places, back to front."""
    shapes: list[Shape] = []
    wanted = int(random.integers(3, 8)) if crowded else int(random.integers(2, 6))
    for _ in range(60):
        if len(shapes) >= wanted:
            break
        label = int(random.integers(len(CLASSES)))
        aspect = list(CLASSES.values())[label][1] * random.uniform(0.85, 1.2)
        area = random.uniform(26, 66) ** 2
        w, h = int(np.sqrt(area * aspect)), int(np.sqrt(area / aspect))
        x, y = int(random.integers(2, max(3, SIZE - w - 2))), int(random.integers(2, max(3, SIZE - h - 2)))
        if not _fits(shapes, label, (x, y, x + w, y + h), limit=0.15 if crowded else 0.02):
            continue
        shapes.append(Shape(label, (x, y, x + w, y + h)))
        if crowded and random.random() < 0.125:  # a second one of its kind, close by
            angle, distance = random.uniform(0, 2 * np.pi), random.uniform(0.2, 0.8)
            scale = random.uniform(0.9, 1.1)
            w, h = int(w * scale), int(h * scale)
            x2, y2 = x + int(np.cos(angle) * distance * w), y + int(np.sin(angle) * distance * h)
            box = (x2, y2, x2 + w, y2 + h)
            if _fits(shapes[:-1], label, box, limit=0.15) and iou_matrix(np.array([shapes[-1].box, box]))[0, 1] < 0.75:
                shapes.append(Shape(label, box))
    return [shapes[i] for i in random.permutation(len(shapes))]


def _fits(shapes: list[Shape], label: int, box: Box, limit: float) -> bool:
    if box[0] < 0 or box[1] < 0 or box[2] >= SIZE or box[3] >= SIZE:
        return False
    overlaps = iou_matrix(np.array([box] + [shape.box for shape in shapes]))[0, 1:]
    return bool((overlaps <= limit).all())


def render(random: np.random.Generator, shapes: list[Shape]) -> Image.Image:
    """Draw a scene, back to front, and note how much of each object stays visible."""
    top, bottom = random.integers(90, 230, 3), random.integers(60, 220, 3)
    ramp = np.linspace(0, 1, SIZE)[:, None, None]
    ground = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (SIZE, SIZE, 3)).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(ground))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(4, 12))):  # clutter of no class
        x, y, w, h = (int(value) for value in random.integers(0, SIZE, 4) // (1, 1, 4, 4))
        colour = _colour(random, 40, 240)
        kind = random.integers(3)
        if kind == 0:
            draw.line((x, y, x + w, y + h), fill=colour, width=int(random.integers(1, 5)))
        elif kind == 1:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
        else:
            draw.ellipse((x, y, x + w, y + h), outline=colour, width=2)
    masks = []
    for shape in shapes:
        paint = list(CLASSES.values())[shape.label][0]
        colour, dark = _colour(random, 30, 255), _colour(random, 0, 70)
        paint(draw, shape.box, colour, dark)
        mask = Image.new('RGB', (SIZE, SIZE))
        paint(ImageDraw.Draw(mask), shape.box, (255, 255, 255), (255, 255, 255))
        masks.append(np.asarray(mask)[..., 0] > 0)
    covered = np.zeros((SIZE, SIZE), bool)
    for shape, drawn in zip(reversed(shapes), reversed(masks), strict=True):
        shape.visible = float((drawn & ~covered).sum() / drawn.sum())
        covered |= drawn
    noise = random.normal(0, 9, (SIZE, SIZE, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _colour(random: np.random.Generator, low: int, high: int) -> Colour:
    red, green, blue = (int(value) for value in random.integers(low, high, 3))
    return red, green, blue


def make(folder: Path, counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """Draw every split into an empty folder.

    Args:
        folder: gets ``VOC2007/{JPEGImages,Annotations,ImageSets/Main}`` and ``annotations/SPLIT.json``.
        counts: images of each split.

    Returns:
        For each split the numbers of images and objects and the overlap shares.
    """
    voc = folder / 'VOC2007'
    for part in (voc / 'JPEGImages', voc / 'Annotations', voc / 'ImageSets' / 'Main', folder / 'annotations'):
        part.mkdir(parents=True)
    statistics: dict[str, dict[str, float]] = {}
    number = 0
    for order, (split, count) in enumerate(counts.items()):
        scenes, names = [], []
        for index in range(count):
            random = np.random.default_rng([VERSION, order, index])
            shapes = compose(random, crowded=split != 'sparse')
            image = render(random, shapes)
            number += 1
            names.append(f'{number:06d}')
            image.save(voc / 'JPEGImages' / f'{names[-1]}.jpg', quality=88)
            (voc / 'Annotations' / f'{names[-1]}.xml').write_text(_to_xml(names[-1], shapes))
            scenes.append(shapes)
        (voc / 'ImageSets' / 'Main' / f'{split}.txt').write_text(''.join(f'{name}\n' for name in names))
        (folder / 'annotations' / f'{split}.json').write_text(json.dumps(_to_coco(names, scenes)))
        objects = [shape for scene in scenes for shape in scene]
        statistics[split] = {
            'images': count,
            'objects': len(objects),
            'difficult': sum(shape.difficult for shape in objects),
            **overlap_shares(scenes),
        }
    return statistics


def _to_xml(name: str, shapes: list[Shape]) -> str:
    objects = ''.join(
        f'<object><name>{escape(list(CLASSES)[shape.label])}</name><difficult>{int(shape.difficult)}</difficult><bndbox>'
        # VOC counts pixels from 1.
        f'<xmin>{shape.box[0] + 1}</xmin><ymin>{shape.box[1] + 1}</ymin>'
        f'<xmax>{shape.box[2] + 1}</xmax><ymax>{shape.box[3] + 1}</ymax></bndbox></object>'
        for shape in shapes
    )
    size = f'<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>'
    return f'<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>\n'


def _to_coco(names: list[str], scenes: list[list[Shape]]) -> dict[str, list[dict[str, object]]]:
    annotations: list[dict[str, object]] = []
    for name, shapes in zip(names, scenes, strict=True):
        for shape in shapes:
            x1, y1, x2, y2 = shape.box
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=int(name),
                    category_id=shape.label,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=int(shape.difficult),
                )
            )
    return dict(
        images=[dict(id=int(name), file_name=f'{name}.jpg', height=SIZE, width=SIZE) for name in names],
        annotations=annotations,
        categories=[dict(id=label, name=name) for label, name in enumerate(CLASSES)],
    )


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('data/demo'))
    for split, count in (('train', 1200), ('crowded', 240), ('sparse', 120)):
        parser.add_argument(f'--{split}', type=int, default=count, help='images (%(default)s)')
    args = parser.parse_args()
    if min(args.train, args.crowded, args.sparse) < 1:
        parser.error('every split needs at least one image')
    return args


def main() -> None:
    """Draw what is missing and print the statistics."""
    args = parse_args()
    counts = {split: getattr(args, split) for split in ('train', 'crowded', 'sparse')}
    stamp = args.out / 'demo.json'
    wanted = {'version': VERSION, 'counts': counts}
    if stamp.is_file() and (found := json.loads(stamp.read_text())) and {**found, **wanted} == found:
        print(f'{args.out} is complete, nothing to draw')
        statistics = found['statistics']
    elif args.out.exists() and not stamp.is_file() and any(args.out.iterdir()):
        sys.exit(f'error: {args.out} exists and was not made by this script; choose another --out')
    else:
        start = time.perf_counter()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=args.out.parent, prefix=f'.{args.out.name}-'))
        try:
            statistics = make(folder, counts)
            (folder / stamp.name).write_text(json.dumps({**wanted, 'statistics': statistics}, indent=1))
            folder.chmod(0o755)
            if args.out.exists():
                shutil.rmtree(args.out)
            folder.rename(args.out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        print(f'drew {args.out} in {time.perf_counter() - start:.1f} s')
    print('objects whose IoU with another of their class exceeds 0.3 / 0.5 / 0.7:')
    for split, numbers in statistics.items():
        shares = ' / '.join(f'{100 * numbers[key]:.1f}' for key in ('0.3', '0.5', '0.7'))
        print(
            f'  {split:8}{numbers["images"]:5} images {numbers["objects"]:6} objects '
            f'{numbers["difficult"]:4} difficult   {shares} %'
        )


if __name__ == '__main__':
    main()
