"""The live model: loaded once, its language weights re-blended in place at any alpha.

The loop is the one that writes checkpoints, so that what is evaluated is what would be written, bit
for bit. Base values come from the base's own files, never from the live parameters: nothing drifts.
The weights are held in memory, or streamed: blended layer by layer as they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch

from ..checkpoints.dtypes import DTYPES
from ..errors import PlacementError
from ..mapping import kinship
from ..mapping.alphas import Alpha, resolve
from ..mapping.plan import Plan
from ..merging.sources import download
from ..prompts import Prompt
from ..settings import AnswerSettings, Device, Live, PlacementSettings, Quantization
from ..values import check_type, parse_dtype
from .answerer import Answerer
from .decoder_layers import CannotStreamError
from .free_memory import measure_memory
from .held_weights import HeldWeights
from .placement import Placement
from .placing import hold_instead, place
from .prompt_encoder import Encoder
from .streamed_weights import StreamedWeights
from .transformers_model import copy_head_inputs, find_answering_part

Question = Prompt | str | Mapping[str, Any]
"""One thing to ask: a text, a prompt, or a dict with `prompt` and `image`."""


class LiveModel(AbstractContextManager["LiveModel"]):
    """A plan's base, loaded once through transformers, at whatever alpha was applied last.

    Args:
        plan: From `make_plan`.
        device: "cpu" or "cuda". None for this, `dtype` or `quantize`: what fits best into the
            memory that is free, see `placing.place`.
        dtype: Of the parameters: "bf16", "fp16" or "fp32".
        quantize: "nf4" or "int8" (with bitsandbytes), or "none".
        live: "held", or "streamed" for a model of which two layers are in memory at a time.
        trust_remote_code: Run Python code that comes with the base, where it needs it.
        placement: Instead of device and quantize: what `place` decided for this plan.
        force: Load also two models that look unrelated.
        processor: The base's processor, if it was loaded before.

    Attributes:
        model: The transformers module.
        vision_names: Its parameters outside the decoder.
        alpha: The one applied last; None after an apply that did not end.
        notes: What the user should know of how it was loaded.

    Raises:
        PlacementError: The model does not fit into the memory there is.
        MappingError: Base and donor look unrelated, or transformers ignores merged weights.
        RecipeError: A package is missing, remote code was not allowed, or transformers converts
            tensors in a way that cannot be followed.
        FormatError: What transformers loaded is not what the files hold.

    Example:
        >>> with LiveModel(make_plan("base", "donor"), device="cpu") as live:
        ...     live.apply(0.3)
        ...     print(live.generate(["What is a donor?"]))

    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: Device | None = None,
        dtype: str | None = None,
        quantize: Quantization | None = None,
        live: Live | None = None,
        trust_remote_code: bool = False,
        placement: Placement | None = None,
        force: bool = False,
        processor: Any = None,
    ) -> None:
        check_type("plan", plan, Plan, "what make_plan returns")
        if not force:
            for pair in plan.pairs:
                kinship.check(pair)
        download(plan)
        dtype_name = parse_dtype(dtype) if dtype else plan.options["dtype"]
        if placement is None:
            settings = PlacementSettings(device=device, live_quantize=quantize, live=live)
            placement = place(plan, measure_memory(), settings, dtype=dtype_name)
        self.plan, self.placement = plan, placement
        self.alpha: Alpha | None = 0.0
        self._trust_remote_code, self._processor = trust_remote_code, processor
        self._answerer: Answerer | None = None
        self.notes: tuple[str, ...] = ()
        self._weights = self._load(dtype_name)
        self.model = self._weights.model
        copy_head_inputs(self.model)
        kinds = plan.base_layout.kinds
        self.vision_names = frozenset(
            target
            for group in self._weights.groups
            if group.names[0] in kinds
            for target in group.targets
        )

    def _load(self, dtype_name: str | None) -> HeldWeights | StreamedWeights:
        """The base as transformers loads it; dtype_name None: with the config's dtype."""
        base, placement = self.plan.base, self.placement
        folder = base.require_loadable("run")
        if placement.device == "cuda" and not torch.cuda.is_available():
            # --vram may plan for any card; to load on it, torch must see one
            raise PlacementError(
                "the model was placed on a CUDA card, but torch sees none; `vram=0` does without,"
                " or install a torch build for CUDA and its driver"
            )
        dtype = (DTYPES[dtype_name].torch if dtype_name else None) or "auto"
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": self._trust_remote_code}
        if placement.live == "streamed":
            try:
                return StreamedWeights(self.plan, folder, placement, **options)
            except CannotStreamError as error:
                memory = measure_memory(vram=None if placement.device == "cuda" else 0)
                self.placement = hold_instead(self.plan, placement, memory, str(error))
                self.notes = (self.placement.lines[0],)
        return HeldWeights(self.plan, folder, self.placement, **options)

    def apply(self, alpha: Alpha, progress: Callable[[int], None] | None = None) -> None:
        """Blend base and donor into the loaded parameters.

        Args:
            alpha: Weight of the donor, 0 to 1, or one per layer or role (`Alphas`); of several
                donors a tuple of them.
            progress: Called with the bytes that were blended since the last call.

        Raises:
            RecipeError: The alpha is out of range; the model stays as it is.
            RuntimeError: The model was closed.

        """
        self._check_open()
        alpha = resolve(alpha, self.plan)
        self.alpha = None
        self._weights.apply(alpha, progress)
        self.alpha = alpha

    def generate(
        self,
        prompts: Question | Sequence[Question],
        settings: AnswerSettings | None = None,
        *,
        batch_size: int | None = None,
    ) -> list[str]:
        """Answer prompts greedily at the alpha applied last.

        Args:
            prompts: Texts, `Prompt`s, or dicts such as `{"prompt": "Is it?", "image": image}`
                with a path or a Pillow image. One text alone is one prompt.
            settings: How long answers may be, and what is remembered from call to call; None: as in
                the last call, at first the defaults.
            batch_size: Prompts answered at a time; None: as in the last call, at first that of the
                placement.

        Returns:
            One answer for each prompt, in their order.

        Raises:
            PromptError: The base does not take a prompt, such as an image if it is text-only.
            RuntimeError: The model was closed.

        Example:
            >>> live.apply(0.3)
            >>> live.generate(["Is it a cat?"], AnswerSettings(max_new_tokens=8))
            ['Yes']

        """
        self._check_open()
        if isinstance(prompts, Prompt | str | Mapping):
            prompts = [prompts]
        check_type("prompts", prompts, Iterable, "a text, or several")
        last = self._answerer
        settings = settings or (last.settings if last else AnswerSettings())
        batch_size = batch_size or (last.batch_size if last else self.placement.batch_size)
        if last is None or (settings, batch_size) != (last.settings, last.batch_size):
            self._answerer = self.make_answerer(settings, batch_size=batch_size)
        assert self._answerer is not None
        return [answer.text for answer in self._answerer.answer(prompts)]

    def make_answerer(self, settings: AnswerSettings, *, batch_size: int) -> Answerer:
        """An answerer of its own for this model, which remembers nothing yet."""
        return Answerer(
            find_answering_part(self.model),
            self._encoder,
            settings,
            batch_size=batch_size,
            vision_names=self.vision_names,
            notes=self.notes,
            run_batches=self._weights.run_batches,
        )

    @cached_property
    def _encoder(self) -> Encoder:
        """One for the model's lifetime, as it remembers what it encoded."""
        return Encoder(
            find_answering_part(self.model),
            self.plan.base.path,
            processor=self._processor,
            trust_remote_code=self._trust_remote_code,
        )

    def _check_open(self) -> None:
        if self.model is None:
            raise RuntimeError("this LiveModel was closed; make another")

    def close(self) -> None:
        """Unmap the files and drop the model."""
        self._weights.close()
        self.model = self._answerer = None
        self.__dict__.pop("_encoder", None)

    def __exit__(self, *_: object) -> None:
        self.close()
