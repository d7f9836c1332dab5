"""`VLM`: a model with its processor, for asking about pictures; every answer comes with its report."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from mmefficient.bench.timers import StageTimer
from mmefficient.errors import InputError
from mmefficient.graph import EngineName
from mmefficient.images import ImageSource, load_image, to_device
from mmefficient.loading import load, pixel_options
from mmefficient.matchers.words import Words
from mmefficient.plan import Plan
from mmefficient.report import Report

Images = ImageSource | Sequence[ImageSource] | None
Message = dict[str, Any]

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
    keywords to `model.generate`. Unless told otherwise, decoding is greedy and stops after 128 tokens. Calls from
    several threads are safe; they run one after the other, since a plan is attached to the model while it answers.
    """

    def __init__(self, model: Any, processor: Any, plan: Plan | str | None = None, engine: EngineName = "auto") -> None:
        self.model = model
        self.processor = processor
        self.plan = _as_plan(plan)
        self.engine: EngineName = engine
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
            PlanError: the plan cannot be read. InputError: no such device or dtype.
        """
        parsed = _as_plan(plan)  # a typo should not cost the time of loading a model
        model, processor = load(name, device=device, dtype=dtype, attn_implementation=attn_implementation)
        return cls(model, processor, parsed, engine)

    def ask(self, image: Images, question: str, *, plan: Plan | str | None = None, **generate_kwargs: Any) -> Answer:
        """Answer one question about an image, several images (a list), or none (None, for an empty plan only).

        `report.stages_ms` holds the time of preprocess, vision, prefill and decode (see `StageTimer`).

        Raises:
            InputError: an image cannot be read, does not fit the prompt, or is missing although the plan needs one.
        """
        return self.ask_batch([(image, question)], plan=plan, **generate_kwargs)[0]

    def ask_batch(
        self, rows: Sequence[tuple[Images, str]], *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> list[Answer]:
        """Answer several questions in one batch; images may differ in number and size, and some rows may have none.

        Each answer's report holds the one row that belongs to it, but FLOPs and times of the whole batch.
        """
        conversations = [[user_message(_as_list(image), question)] for image, question in rows]
        return self._answer(conversations, plan, generate_kwargs) if conversations else []

    def converse(
        self, conversations: Sequence[Sequence[Message]], *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> list[Answer]:
        """Like `ask_batch`, for the last turn of conversations in transformers' chat format."""
        return self._answer([list(one) for one in conversations], plan, generate_kwargs) if conversations else []

    def chat(self, image: Images = None, *, plan: Plan | str | None = None, **generate_kwargs: Any) -> Chat:
        """Start a conversation about `image`; the arguments are the defaults of every turn."""
        return Chat(self, image, plan=plan, **generate_kwargs)

    def stream(
        self, image: Images, question: str, *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> Iterator[str]:
        """Yield the answer in pieces while it is generated. Joined and stripped, they are the text that
        `ask` returns.

        Bad input raises here, before the first piece; what fails later is raised by the iterator. Closing the iterator
        early stops the generation.
        """
        chosen = self._plan(plan)
        inputs = self._encode([[user_message(_as_list(image), question)]], chosen)
        return self._stream(inputs, chosen, generate_kwargs)

    def _stream(self, inputs: Any, plan: Plan, generate_kwargs: dict[str, Any]) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = threading.Event()
        failures: list[BaseException] = []
        stopping = StoppingCriteriaList([*generate_kwargs.get("stopping_criteria", ()), _StopWhen(closed)])
        options = {**generate_kwargs, "streamer": streamer, "stopping_criteria": stopping}

        def work() -> None:
            try:
                with self._lock, plan.apply(self.model, tokenizer=Words(self.processor), engine=self.engine):
                    self._generate(inputs, options)
            except BaseException as error:
                failures.append(error)
            finally:
                streamer.end()

        worker = threading.Thread(target=work, name="mmefficient-stream", daemon=True)
        worker.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            closed.set()
            worker.join()
        if failures:
            raise failures[0]

    def _answer(
        self, conversations: list[list[Message]], plan: Plan | str | None, generate_kwargs: dict[str, Any]
    ) -> list[Answer]:
        chosen = self._plan(plan)
        with self._lock, StageTimer(self.model) as timer:
            with timer.preprocess():
                inputs = self._encode(conversations, chosen)
            with chosen.apply(self.model, tokenizer=Words(self.processor), engine=self.engine) as run:
                sequences = self._generate(inputs, generate_kwargs)
        generated = sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(generated, skip_special_tokens=True)
        lengths = self._lengths(generated)
        report = dataclasses.replace(run.report(), stages_ms=timer.stages_ms)
        beams = len(report.rows) // len(texts)
        return [
            Answer(text.strip(), _row_of(report, row * beams, length))
            for row, (text, length) in enumerate(zip(texts, lengths, strict=True))
        ]

    def _plan(self, plan: Plan | str | None) -> Plan:
        return self.plan if plan is None else _as_plan(plan)

    def _encode(self, conversations: list[list[Message]], plan: Plan) -> Any:
        """Read the images of the batch and return its model inputs on the model's device, padded on the left."""
        conversations = [[_with_images_read(message) for message in conversation] for conversation in conversations]
        counts = [len(_images_of(conversation)) for conversation in conversations]
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
            conversations = [[_on_device(message, pixels["device"]) for message in each] for each in conversations]
        try:
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left", "images_kwargs": pixels},
            )
        except ValueError as error:
            raise InputError(f"The model's processor refuses the input: {error}") from error
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _lengths(self, generated: torch.Tensor) -> list[int]:
        """Tokens of every row up to its end token, that one included; what follows is padding."""
        end = self.model.generation_config.eos_token_id
        ends = torch.isin(generated, torch.tensor([] if end is None else end, device=generated.device).long())
        return ((ends.cumsum(1) - ends.long()) == 0).sum(1).tolist()

    def _generate(self, inputs: Any, generate_kwargs: dict[str, Any]) -> torch.Tensor:
        if generate_kwargs.get("num_return_sequences", 1) != 1:
            raise InputError("An answer is one sequence; for several, use model.generate inside Plan.apply.")
        options = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, **generate_kwargs}
        if not options["do_sample"]:  # a checkpoint's sampling defaults would only be warned about
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        output = self.model.generate(**inputs, **options)
        return getattr(output, "sequences", output)


class Chat:
    """A conversation about one or several images.

    Every turn encodes the whole conversation again, so a plan that drops visual tokens chooses anew for each question
    and nothing an earlier turn dropped is missing later. A turn that fails is not remembered.
    """

    def __init__(
        self, vlm: VLM, image: Images = None, *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> None:
        self.vlm = vlm
        self.plan = plan
        self.generate_kwargs = generate_kwargs
        self.messages: list[Message] = []
        self._images = [load_image(one) for one in _as_list(image)]

    def ask(
        self, question: str, image: Images = None, *, plan: Plan | str | None = None, **generate_kwargs: Any
    ) -> Answer:
        """Ask the next question, adding `image` to the conversation if given."""
        turn = user_message([*self._images, *(load_image(one) for one in _as_list(image))], question)
        options = {**self.generate_kwargs, **generate_kwargs}
        answer = self.vlm._answer([[*self.messages, turn]], self.plan if plan is None else plan, options)[0]
        self.messages += [turn, {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
        self._images = []
        return answer


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def user_message(images: Sequence[Any], question: str) -> Message:
    """One user turn in transformers' chat format: the images, then the question."""
    parts: list[Message] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


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


def _as_list(image: Images) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def _with_images_read(message: Message) -> Message:
    return _with_images(message, load_image)


def _on_device(message: Message, device: torch.device) -> Message:
    return _with_images(message, lambda image: to_device(image, device))


def _with_images(message: Message, change: Callable[[Any], Any]) -> Message:
    parts = [{**p, "image": change(p["image"])} if p["type"] == "image" else p for p in message["content"]]
    return {**message, "content": parts}


def _images_of(conversation: list[Message]) -> list[Any]:
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]
