"""InfographicVQA (Mathew et al. 2022, arXiv 2104.12756), validation split.

Files: `infographicsVQA_val_v1.0_withQT.json` or `infographicsVQA_val_v1.0.json`, {"data": [{"questionId", "question",
"image_local_name", "answers"}]}, and the pictures in `infographicsvqa_images/`.
"""

from __future__ import annotations

from mmefficient.evaluation.tasks.docvqa import dataset

TASK = dataset(
    "infovqa",
    ("infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json"),
    "image_local_name",
    ("infographicsvqa_images", "images", "."),
)
