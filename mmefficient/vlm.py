"""`VLM`: a model with its processor, for asking about pictures; every answer comes with its report."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from mmefficient.bench.timers import StageTimer
from mmefficient.chat import Chat
from mmefficient.errors import InputError, PlanError
from mmefficient.graph import EngineName, named
from mmefficient.loading import load, pixel_options
from mmefficient.matchers.words import Words
from mmefficient.messages import Images, Message, as_list, images_of, on_device, user_message, with_images_read
from mmefficient.plan import Plan
from mmefficient.report import Report
from mmefficient.retention import Retained
from mmefficient.reuse import Encoded, encode
from mmefficient.streaming import pieces

MAX_NEW_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Answer:
    """The generated text and the report of the call that made it."""

    text: str
    report: Report


class VLM:
    """A vision-language model, its processor and a default plan.

        vlm = VLM.from_pretrained("reference", plan="fastv(layer=2,keep=0.25)")
        vlm.ask("kitchen.png", "How many cups are there?").text

    Every method takes `plan`, which replaces the default for that call (``"none"`` switches it off), and passes further
    keywords to `model.generate`. Unless these say otherwise, a `generation_config` among them, decoding is greedy and
    stops after 128 tokens. Calls from several threads are safe; they run one after the other, since a plan is attached
    to the model while it answers.
    """

    def __init__(self, model: Any, processor: Any, plan: Plan | str | None = None, engine: EngineName = "auto") -> None:
        self.model = model
        self.processor = processor
        self.plan = _as_plan(plan)
        self.engine = named(engine)
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        plan: Plan | str | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        engine: EngineName = "auto",
    ) -> VLM:
        """Load a folder in Hugging Face format, a hub id, or ``"reference"``, the embedded model.

        Args:
            device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:N``.
            dtype: ``auto`` (the checkpoint's; float32 on the CPU), or a floating dtype or its name.
            attn_implementation: what transformers should use where no plan is active; None is its default.
            engine: what runs `generate`, see `Plan.apply`.

        Raises:
            ModelError: not a vision-language model, damaged, or not reachable.
            PlanError: the plan cannot be read, or no such engine. InputError: no such device or dtype.
        """
        parsed, engine = _as_plan(plan), named(engine)  # a typo should not cost the time of loading a model
        model, processor = load(name, device=device, dtype=dtype, attn_implementation=attn_implementation)
        return cls(model, processor, parsed, engine)

    def encode(self, image: Images, *, plan: Plan | str | None = None) -> Encoded:
        """Read an image (or several, a list) once; `ask` and `ask_batch` take the result in its place, again and again.

        Its answers are those of asking with the image, under the same plan. It holds the keys and values of the image.

        Raises:
            PlanError: under this plan visual rows depend on the question (`Plan.reusable`).
            InputError: an image cannot be read, or there is none.
        """
        if not as_list(image):
            raise InputError("There is no image to encode; give one.")
        chosen, conversations = self._plan(plan), [[user_message(as_list(image), "")]]
        with self._lock, StageTimer(self.model) as timer:
            with timer.preprocess():
                inputs = self._encode(conversations, chosen)
                (prompt,) = self.processor.apply_chat_template(conversations, add_generation_prompt=True)
            found = encode(self.model, self.processor, inputs, prompt, chosen, Words(self.processor))
        return dataclasses.replace(found, report=dataclasses.replace(found.report, stages_ms=timer.stages_ms))

    def ask(
        self, image: Images | Encoded, question: str, *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> Answer:
        """Answer one question about an image, several images (a list), or none (None, for an empty plan only).

        `report.stages_ms` holds the time of preprocess, vision, prefill and decode (see `StageTimer`).

        Raises:
            InputError: an image cannot be read, does not fit the prompt, or is missing although the plan needs one.
        """
        return self.ask_batch([(image, question)], plan=plan, **generate_kwargs)[0]

    def ask_batch(
        self, rows: Iterable[tuple[Images | Encoded, str]], *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> list[Answer]:
        """Answer several questions in one batch; images may differ in number and size, and some rows may have none.

        Each answer's report holds the one row that belongs to it, but FLOPs and times of the whole batch. Questions
        about one encoded image make a batch; other images are no part of it.
        """
        rows = list(rows)
        turns: dict[int, list[Message]] = {}
        kept: dict[Encoded, list[int]] = {}
        for number, (image, question) in enumerate(rows):
            if isinstance(image, Encoded):
                kept.setdefault(image, []).append(number)
            else:
                turns[number] = [user_message(as_list(image), question)]
        found = dict(zip(turns, self.converse(list(turns.values()), plan=plan, **generate_kwargs), strict=True))
        for encoded, numbers in kept.items():
            answers = self._about(encoded, [rows[n][1] for n in numbers], plan, generate_kwargs)
            found |= dict(zip(numbers, answers, strict=True))
        return [found[number] for number in range(len(rows))]

    def converse(
        self, conversations: Sequence[Sequence[Message]], *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> list[Answer]:
        """Like `ask_batch`, for the last turn of conversations in transformers' chat format."""
        return self._answer([list(one) for one in conversations], plan, generate_kwargs) if conversations else []

    def chat(
        self,
        image: Images = None,
        *,
        plan: Plan | str | None = None,
        retain: Literal["cpu"] | None = None,
        **generate_kwargs: Any,
    ) -> Chat:
        """Start a conversation about `image`; plan and further arguments are the defaults of every turn.

        Args:
            retain: "cpu" keeps all visual tokens on the host from turn to turn, instead of encoding pictures again.
        """
        return Chat(self, image, plan=plan, retain=retain, **generate_kwargs)

    def stream(
        self, image: Images, question: str, *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> Iterator[str]:
        """Yield the answer in pieces while it is generated. Joined and stripped, they are the text that
        `ask` returns.

        Bad input raises here, before the first piece; what fails later is raised by the iterator. Closing the iterator
        early stops the generation.
        """
        if generate_kwargs.get("streamer") is not None:
            raise InputError("stream has a streamer of its own; pass yours to ask.")
        chosen = self._plan(plan)
        inputs = self._encode([[user_message(as_list(image), question)]], chosen)

        def generate(options: dict[str, Any]) -> None:
            with self._lock, chosen.apply(self.model, tokenizer=Words(self.processor), engine=self.engine):
                self._generate(inputs, options)

        return pieces(generate, self.processor.tokenizer, generate_kwargs)

    def _answer(
        self,
        conversations: list[list[Message]],
        plan: Plan | str | None,
        generate_kwargs: dict[str, Any],
        retained: Retained | None = None,
    ) -> list[Answer]:
        chosen = self._plan(plan)
        pictures = [image for conversation in conversations for image in images_of(conversation)]
        around = nullcontext() if retained is None else retained.turn(str(chosen), pictures)
        return self._run(chosen, lambda: self._encode(conversations, chosen), generate_kwargs, around)

    def _about(
        self, encoded: Encoded, questions: list[str], plan: Plan | str | None, generate_kwargs: dict[str, Any]
    ) -> list[Answer]:
        """Answers about a picture that was read before; in one batch if its keys can be shared."""
        if encoded.model is not self.model or (plan is not None and _as_plan(plan) != encoded.plan):
            raise PlanError(f"the picture was read by one model under {encoded.plan}; ask the same, or encode anew.")
        if generate_kwargs.get("num_beams", 1) != 1:
            raise InputError("questions about an encoded picture are answered without beams; ask with the picture.")
        if encoded.alone and len(questions) > 1:
            return [self._about(encoded, [each], plan, generate_kwargs)[0] for each in questions]
        turns = [[user_message([None] * encoded.images, each)] for each in questions]

        def prepare() -> dict[str, Any]:
            prompts = self.processor.apply_chat_template(turns, add_generation_prompt=True)
            return encoded.asked(self.processor, prompts)

        return self._run(encoded.plan, prepare, generate_kwargs, nullcontext(), encoded)

    def _run(
        self,
        plan: Plan,
        prepare: Callable[[], Any],
        generate_kwargs: dict[str, Any],
        around: AbstractContextManager[Any],
        encoded: Encoded | None = None,
    ) -> list[Answer]:
        """Make inputs, generate under the plan inside `around`, and report."""
        with self._lock, StageTimer(self.model) as timer:
            with timer.preprocess():
                inputs = prepare()
            with around, plan.apply(self.model, tokenizer=Words(self.processor), engine=self.engine) as run:
                sequences = self._generate(inputs, generate_kwargs)
        length = inputs["input_ids"].shape[1]
        generated = sequences[:, length:]
        texts = self.processor.batch_decode(generated, skip_special_tokens=True)
        lengths = self._lengths(generated, generate_kwargs)
        report = run.report()
        if encoded is not None:
            asked = (inputs["attention_mask"].sum(1) - encoded.ids.shape[1]).tolist()
            report = encoded.reported(report, asked, run.config)
        report = dataclasses.replace(report, stages_ms=timer.stages_ms)
        beams = len(report.rows) // len(texts)
        return [
            Answer(text.strip(), _row_of(report, row * beams, length))
            for row, (text, length) in enumerate(zip(texts, lengths, strict=True))
        ]

    def _plan(self, plan: Plan | str | None) -> Plan:
        return self.plan if plan is None else _as_plan(plan)

    def _encode(self, conversations: list[list[Message]], plan: Plan) -> Any:
        """Read the images of the batch and return its model inputs on the model's device, padded on the left."""
        conversations = [[with_images_read(message) for message in conversation] for conversation in conversations]
        counts = [len(images_of(conversation)) for conversation in conversations]
        if plan and not any(counts):
            raise InputError(f"The plan {str(plan)!r} acts on visual tokens, but the prompt has no image; give one.")
        prompts = self.processor.apply_chat_template(conversations, add_generation_prompt=True)
        placeholder = self.processor.image_token
        for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            if (found := prompt.count(placeholder)) != count:
                raise InputError(
                    f"Row {row} has {count} image(s) but {found} placeholder(s) {placeholder!r} in its prompt; "
                    "leave the placeholder out of the question, one is added for every image."
                )
        pixels = pixel_options(self.processor, self.model.device)
        if pixels:
            conversations = [[on_device(message, pixels["device"]) for message in each] for each in conversations]
        padding = len(conversations) > 1  # some tokenizers have nothing to pad with
        try:
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": padding, "padding_side": "left", "images_kwargs": pixels},
            )
        except ValueError as error:
            raise InputError(f"The model's processor refuses the input: {error}") from error
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _lengths(self, generated: torch.Tensor, generate_kwargs: dict[str, Any]) -> list[int]:
        """Tokens of every row up to its end token, that one included; what follows is padding."""
        configs = (generate_kwargs.get("generation_config"), self.model.generation_config)
        said = [generate_kwargs.get("eos_token_id"), *(each.eos_token_id for each in configs if each is not None)]
        end: Any = next((each for each in said if each is not None), [])
        ends = torch.isin(generated, torch.as_tensor(end, device=generated.device).long())
        return ((ends.cumsum(1) - ends.long()) == 0).sum(1).tolist()

    def _generate(self, inputs: Any, generate_kwargs: dict[str, Any]) -> torch.Tensor:
        if generate_kwargs.get("num_return_sequences", 1) != 1:
            raise InputError("An answer is one sequence; for several, use model.generate inside Plan.apply.")
        options = generate_kwargs
        if generate_kwargs.get("generation_config") is None:
            limit = {} if "max_length" in generate_kwargs else {"max_new_tokens": MAX_NEW_TOKENS}
            options = {"do_sample": False, **limit, **generate_kwargs}
            if not options["do_sample"]:  # a checkpoint's sampling defaults would only be warned about
                options = {"temperature": None, "top_p": None, "top_k": None, **options}
        output = self.model.generate(**inputs, **options)
        return getattr(output, "sequences", output)


def _row_of(report: Report, row: int, generated_tokens: int) -> Report:
    return dataclasses.replace(
        report,
        rows=[report.rows[row]],
        lives_until=(report.lives_until[row],),
        merged_into=(report.merged_into[row],),
        places=(report.places[row],),
        generated_tokens=generated_tokens,
    )


def _as_plan(plan: Plan | str | None) -> Plan:
    return plan if isinstance(plan, Plan) else Plan(plan or "")
