"""What a re-evaluation gives."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mmdet_softnms.reevaluation.candidates.images import ImageReader
from mmdet_softnms.reevaluation.candidates.store import Candidates
from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import Row


@dataclass
class Session:
    """What a run has in memory, for what is computed on top of the table: choice of settings, pictures."""

    candidates: Candidates
    truth: GroundTruth
    image_paths: list[str]
    reader: ImageReader | None = None  # where images are read by a storage backend of the pipeline

    def read_image(self, number: int) -> bytes:
        """The bytes of an image file; whatever the backend raises where there is none."""
        return self.reader.read(number) if self.reader else Path(self.image_paths[number]).read_bytes()


@dataclass
class Reevaluation:
    """The result of one forward pass under several settings."""

    dataset: str
    num_images: int
    num_candidates: int
    masks_left_out: bool
    store: str  # folder of the candidates
    store_bytes: int
    forward_images: int  # that went through the network in this run; 0 where a store was found
    forward_seconds: float
    rows: list[Row]
    notes: list[str]
    session: Session = field(repr=False)
    checkpoint_sha256: str = ''
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the compared rows, by report.why.errors_of

    @property
    def settings(self) -> list[Setting]:
        """What the rows are of."""
        return [row.setting for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """As ``reevaluation.json`` holds it."""
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name != 'session'}
        return named | dict(rows=[row.to_dict() for row in self.rows])


def no_candidates(store: str) -> str:
    """What to say where the network found nothing at all."""
    return (
        f'{store} holds not one candidate above the smallest score_thr; is this the checkpoint of this config, and did '
        'its training diverge?'
    )
