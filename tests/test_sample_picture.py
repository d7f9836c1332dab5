from __future__ import annotations

import numpy as np

from mmefficient.images import load_image
from mmefficient.models import reference
from mmefficient.models.reference.scenes.splits import picture, scene_at


def test_the_bundled_picture_is_the_scene_it_says() -> None:
    bundled = load_image(reference.sample_picture())
    assert np.array_equal(np.asarray(bundled), np.asarray(picture(scene_at("sample", 9))))
