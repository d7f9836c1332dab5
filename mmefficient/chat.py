"""`Chat`: a conversation with a `VLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mmefficient.errors import InputError
from mmefficient.images import load_image
from mmefficient.messages import Images, Message, as_list, user_message
from mmefficient.plan import Plan
from mmefficient.retention import Retained

if TYPE_CHECKING:
    from mmefficient.vlm import VLM, Answer


class Chat:
    """A conversation about one or several images.

    Every turn reads the whole conversation again, so a plan that drops visual tokens chooses anew for each question
    and nothing an earlier turn dropped is missing later. A turn that fails is not remembered.

    With `retain="cpu"` visual tokens and what methods know about them stay in host memory after the first turn, and
    later ones take them from there: the same answers without the vision tower. A new picture or another plan encodes
    anew.
    """

    def __init__(
        self,
        vlm: VLM,
        image: Images = None,
        *,
        plan: Plan | str | None = None,
        retain: Literal["cpu"] | None = None,
        **generate_kwargs: Any,
    ) -> None:
        if retain not in (None, "cpu"):
            raise InputError(f"retain={retain!r} is neither 'cpu' nor None.")
        self.retained = Retained() if retain else None
        self.vlm = vlm
        self.plan = plan
        self.generate_kwargs = generate_kwargs
        self.messages: list[Message] = []
        self._images = [load_image(one) for one in as_list(image)]

    def ask(
        self, question: str, image: Images = None, *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> Answer:
        """Ask the next question, adding `image` to the conversation if given."""
        turn = user_message([*self._images, *(load_image(one) for one in as_list(image))], question)
        options = {**self.generate_kwargs, **generate_kwargs}
        answer = self.vlm._answer(
            [[*self.messages, turn]], self.plan if plan is None else plan, options, self.retained
        )[0]
        self.messages += [turn, {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
        self._images = []
        return answer
