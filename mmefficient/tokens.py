"""TokenMap: what every position of every row of a prompt is, and how long it lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch

from mmefficient.errors import InputError


class Role(IntEnum):
    """What a position holds. SYSTEM is the text before a row's first visual token, QUESTION all other prompt text."""

    PAD = 0
    SYSTEM = 1
    IMAGE = 2
    SEPARATOR = 3  # a learned line break between the visual tokens of one image
    QUESTION = 4


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of one image (or video) come from; all tensors int64 [T] on the CPU, in prompt order.

    Attributes:
        tile: crop of the image, or frame of the video.
        row, col: place in the grid of the image (crops share the grid they were cut from, an overview has its own).
            -1 where the token has no place, such as a CLS token.
        view: tokens of one view form one grid (0: overview or only view, 1: the assembled crops; frames count up).
        separator: 1 for a learned line break, which is no visual token and is in no budget.
        line: tokens and the separator that ends their line share a number >= 0; -1 = no separator belongs to the token.
        source: index of the patch in the vision tower's flattened output for this image (crop * patches per crop +
            patch); -1 = the token is not one tower patch.
    """

    tile: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    view: torch.Tensor
    separator: torch.Tensor
    line: torch.Tensor
    source: torch.Tensor

    def __len__(self) -> int:
        return self.tile.shape[0]

    @classmethod
    def grid(cls, rows: int, cols: int, frames: int = 1) -> Layout:
        """`frames` full grids one after the other, without separators; every token is one tower patch."""
        each = rows * cols
        index = torch.arange(frames * each)
        within, none = index % each, torch.full_like(index, -1)
        frame = index // each
        return cls(frame, within // cols, within % cols, frame, torch.zeros_like(index), none, index)


@dataclass(frozen=True)
class TokenMap:
    """Facts about a prompt of B rows and S positions; every tensor is [B, S] unless noted.

    Attributes:
        role: `Role`, int64.
        image: ordinal of the image within its row; -1 for text and padding. int64.
        tile, row, col, view, line, source: as in `Layout` (`source` counts over the whole batch); -1 for text. int64.
        frame: of a video; 0 in pictures, -1 for text. int64.
        position: rotary position ids, int64 [P, B, S]; P is 1, or 3 (time, height, width) for M-RoPE.
        size: how many original tokens a visual token stands for, float32.
        lives_until: index of the first decoder layer that no longer holds the token, int32.
        carried_by: position in the prompt of the token that carries on this one's features, were it merged into
            another; else its own position. int64.
    """

    role: torch.Tensor
    image: torch.Tensor
    tile: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    view: torch.Tensor
    line: torch.Tensor
    source: torch.Tensor
    frame: torch.Tensor
    position: torch.Tensor
    size: torch.Tensor
    lives_until: torch.Tensor
    carried_by: torch.Tensor

    def to(self, device: torch.device) -> TokenMap:
        """The same map on `device`."""
        return TokenMap(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def gather(self, columns: torch.Tensor, valid: torch.Tensor | None) -> TokenMap:
        """The positions `columns` [B, n] of every row; role PAD where `valid` [B, n] is False."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found = {name: x.gather(-1, columns.expand(*x.shape[:-1], -1)) for name, x in found.items()}
        if valid is not None:
            found["role"] = found["role"].masked_fill(~valid, int(Role.PAD))
        return TokenMap(**found)

    def replace(self, **changes: torch.Tensor) -> TokenMap:
        """A copy with some tensors exchanged."""
        return replace(self, **changes)

    @property
    def visual(self) -> torch.Tensor:
        """bool [B, S]: the visual tokens, separators excluded."""
        return self.role == Role.IMAGE

    def alive(self, layer: int) -> torch.Tensor:
        """bool [B, S]: the positions (padding excluded) that decoder layer `layer` holds."""
        return (self.lives_until > layer) & (self.role != Role.PAD)


LAYOUT_FIELDS = ("tile", "row", "col", "view", "line", "source")


def images_of_rows(placeholders: Sequence[int], lengths: Sequence[int], kind: str, repeats: int = 1) -> list[list[int]]:
    """Which images belong to which row, told by the token counts alone.

    Args:
        placeholders: placeholder tokens in each row of the batch.
        lengths: feature tokens of each image, in the order the images were given.
        kind: "image" or "video", for messages.
        repeats: how often `generate` repeated every row (beams) after the images had been encoded.

    Returns:
        for each row the indices of its images; repeated rows share theirs.

    Raises:
        InputError: the images do not fill the placeholders of a row; names the row.
    """
    advice = f"give every row as many {kind}s as its prompt has placeholders."
    if len(lengths) > 1 and sum(placeholders) == sum(lengths) * repeats:
        advice = (
            f"give the {kind}s in the order of the prompts (with beams and several per prompt: transformers >= 5.19)."
        )
    rows, taken = [], 0
    for row in range(0, len(placeholders), repeats):
        wanted, first, found = placeholders[row], taken, 0
        while found < wanted and taken < len(lengths):
            found += lengths[taken]
            taken += 1
        if found != wanted:
            says = f"{wanted} {kind} placeholder tokens but the {kind}s given for it make {found}"
            raise InputError(f"row {row // repeats} has {says}; {advice}")
        rows += [list(range(first, taken))] * repeats
    if taken < len(lengths):
        raise InputError(
            f"{len(lengths) - taken} {kind}(s) are left over after row {len(placeholders) // repeats - 1}; {advice}"
        )
    return rows


def build(
    kinds: Mapping[str, torch.Tensor],
    layouts: Mapping[str, Sequence[Layout]],
    mask: torch.Tensor | None,
    position: torch.Tensor,
    layers: int,
    strides: Mapping[str, Sequence[int]],
    repeats: Mapping[str, int],
) -> TokenMap:
    """Build the map of one prompt, on the CPU.

    Args:
        kinds: for "image" and "video", bool [B, S]: the placeholders of that kind.
        layouts: for each kind, the layout of every image, in the order given; a kind without is only counted.
        mask: 2-D attention mask [B, S], 0 = padding; None = no padding.
        position: int64 [P, B, S].
        layers: number of decoder layers.
        strides: for each kind, by image: tower patches that lie before it in the tower's flattened output.
        repeats: for each kind, see `images_of_rows`.

    Raises:
        InputError: see `images_of_rows`.
    """
    batch, length = position.shape[1:]
    columns = {name: torch.full((batch, length), -1, dtype=torch.long) for name in (*LAYOUT_FIELDS, "frame", "image")}
    visual = torch.stack(list(kinds.values())).any(0)
    before = visual.long().cumsum(1) == 0
    role = torch.where(before & visual.any(1, keepdim=True), int(Role.SYSTEM), int(Role.QUESTION))
    if mask is not None:
        role[mask == 0] = int(Role.PAD)
    placed = [0] * batch
    for kind, where in kinds.items():
        if kind not in layouts:  # known to be visual, and no more
            role[where], columns["image"][where], columns["frame"][where] = int(Role.IMAGE), 0, 0
            continue
        given = layouts[kind]
        rows = images_of_rows(where.sum(1).tolist(), [len(layout) for layout in given], kind, repeats.get(kind, 1))
        for row, images in enumerate(rows):
            if not images:
                continue
            at = where[row].nonzero()[:, 0]
            chosen = [given[image] for image in images]
            for name in LAYOUT_FIELDS:
                columns[name][row, at] = torch.cat([getattr(layout, name) for layout in chosen])
            columns["frame"][row, at] = columns["tile"][row, at] if kind == "video" else 0
            shift = torch.cat([torch.full((len(given[image]),), strides[kind][image]) for image in images])
            source = columns["source"][row, at]
            columns["source"][row, at] = torch.where(source >= 0, source + shift, source)
            ordinal = torch.arange(len(images)).repeat_interleave(torch.tensor([len(layout) for layout in chosen]))
            columns["image"][row, at] = ordinal + placed[row]
            placed[row] += len(images)
            separator = torch.cat([layout.separator for layout in chosen]).bool()
            role[row, at] = torch.where(separator, int(Role.SEPARATOR), int(Role.IMAGE))
    return TokenMap(
        role=role,
        position=position,
        size=torch.ones(batch, length),
        lives_until=torch.full((batch, length), layers, dtype=torch.int32),
        carried_by=torch.arange(length).repeat(batch, 1),
        **columns,
    )
