"""A search's model served by vLLM: loaded once, blended anew at each alpha, asked all at once.

It looks like a `LiveModel` to the search. What was evaluated is what is written, weight for weight;
the forward pass is vLLM's, whose sums are not bit for bit those of transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..answers import Answer, round_confidence
from ..checkpoints.dtypes import DTYPES
from ..errors import PromptError, RecipeError, SearchError, first_line
from ..live.draft_decoding import Cost
from ..mapping import kinship
from ..mapping.plan import Plan
from ..merging.sources import download
from ..prompts import Prompt, open_image
from ..settings import (
    AnswerSettings,
    EngineSettings,
    PlacementSettings,
    Quantization,
    SearchSettings,
    changed,
)
from .vllm_worker import plan_recipe

WORKER = "lowmem_adamms.serving.vllm_worker.BlendingWorker"
_FIRST_GPU = (9, 0)
"""The compute capability from which vLLM can make answers independent of their batch."""


@dataclass(frozen=True, slots=True)
class EnginePlacement:
    """That the search's model is served by vLLM, which places it by itself.

    batch_size: prompts handed to the engine at a time. lines: the decision, for people.
    """

    settings: EngineSettings
    version: str
    batch_size: int
    lines: tuple[str, ...]

    def identity(self) -> list[Any]:
        """Plain data that differs where answers may."""
        return [self.version, asdict(self.settings)]


def place_in_engine(
    plan: Plan, settings: SearchSettings, quantize: Quantization | None
) -> EnginePlacement:
    """Check what can be checked before vLLM starts; unless told otherwise, all prompts are a batch.

    RecipeError if vLLM is missing or does not know the base, or for settings that are not its own.
    """
    given = {item.name for item in changed(settings, PlacementSettings)} - {"batch_size"}
    if quantize not in (None, "none"):
        given.add("quantize")
    if given:
        raise RecipeError(f"vLLM loads the model its own way; leave out {', '.join(sorted(given))}")
    version = _check_known(plan)
    engine = EngineSettings(
        **{item.name: getattr(settings, item.name) for item in fields(EngineSettings)}
    )
    groups = (
        ("tensor parallel", engine.tensor_parallel),
        ("pipeline parallel", engine.pipeline_parallel),
        ("data parallel", engine.data_parallel),
    )
    spread = "".join(f", {name} {count}" for name, count in groups if count > 1)
    return EnginePlacement(
        engine,
        version,
        settings.batch_size or settings.samples,
        (f"answered by vLLM {version}{spread}, which takes the memory it is given",),
    )


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """PromptError for a prompt with a sound, which is not handed on to vLLM."""
    for prompt in prompts:
        if prompt.audio:
            raise PromptError(
                f"{prompt.id}: has a sound, and vLLM is asked about texts and images only; search"
                " with the engine transformers"
            )


class VllmModel(AbstractContextManager["VllmModel"]):
    """A plan's base in a vLLM engine, at whatever alpha was applied last.

    trust_remote_code: let vLLM run Python code that comes with the base. force: load also two
    models that look unrelated. RecipeError if vLLM refuses an option, SearchError if the engine
    does not start, MappingError if base and donor look unrelated.

    Example:
        >>> with VllmModel(plan, EngineSettings(engine="vllm")) as model:
        ...     model.apply(0.3)
        ...     model.make_answerer(AnswerSettings(), batch_size=100).answer(prompts)

    """

    def __init__(
        self,
        plan: Plan,
        settings: EngineSettings,
        *,
        trust_remote_code: bool = False,
        force: bool = False,
    ) -> None:
        if not force:
            kinship.check(plan)
        download(plan)
        self.plan = plan
        plan.base.require_loadable("run")
        self._llm = _start_engine(plan, settings, trust_remote_code=trust_remote_code)
        with _named_failures():
            self._llm.collective_rpc("set_merge_plan", args=(plan_recipe(plan),))

    def apply(self, alpha: float) -> None:
        """Blend base and donor into the weights of every worker. alpha: the donor's weight."""
        with _named_failures():
            self._llm.collective_rpc("apply_alpha", args=(alpha,))
            self._llm.reset_prefix_cache()

    def make_answerer(self, settings: AnswerSettings, *, batch_size: int) -> VllmAnswerer:
        """What asks the engine. batch_size: prompts handed over at a time; vLLM batches them."""
        return VllmAnswerer(self._llm, settings, batch_size=batch_size)

    def close(self) -> None:
        """Stop the engine."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_known(plan: Plan) -> str:
    """The version of vLLM. RecipeError if it is missing or does not know the base."""
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError("vLLM is not installed; pip install vllm")
    vllm = importlib.import_module("vllm")
    version: str = vllm.__version__
    names = plan.base.config.get("architectures") or []
    if not set(names) & set(vllm.ModelRegistry.get_supported_archs()):
        raise RecipeError(
            f"{plan.base.path}: vLLM {version} does not know {' or '.join(names)}; search with the"
            " engine transformers"
        )
    return version


def _start_engine(plan: Plan, settings: EngineSettings, *, trust_remote_code: bool) -> Any:
    vllm = importlib.import_module("vllm")
    platform = importlib.import_module("vllm.platforms").current_platform
    if platform.is_cuda() and platform.has_device_capability(_FIRST_GPU):
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    options: dict[str, Any] = {
        "max_model_len": -1,  # as long as the cache allows
        "seed": 0,
        "dtype": _torch_name(plan),
        "tensor_parallel_size": settings.tensor_parallel,
        "pipeline_parallel_size": settings.pipeline_parallel,
        "data_parallel_size": settings.data_parallel,
        **({"distributed_executor_backend": "ray"} if settings.ray else {}),
        **dict(map(_parse_option, settings.vllm_option)),
    }
    try:
        return vllm.LLM(
            str(plan.base.folder),
            worker_extension_cls=WORKER,
            trust_remote_code=trust_remote_code,
            disable_log_stats=True,
            **options,
        )
    except (TypeError, ValueError) as error:  # what it says of options, before anything is loaded
        raise RecipeError(f"vLLM refuses its options: {first_line(error)}") from None
    except RuntimeError as error:
        raise SearchError(
            f"vLLM did not start: {first_line(error)}; what its workers said stands above."
            " Where memory is short, `vllm_option='max_model_len=4096'` may help, or"
            " `vllm_option='gpu_memory_utilization=0.8'`"
        ) from None


def _torch_name(plan: Plan) -> str:
    """The dtype of the output, which vLLM calls as torch does; else what the config says."""
    name = plan.options["dtype"]
    return (DTYPES[name].torch if name else None) or "auto"


def _parse_option(word: str) -> tuple[str, Any]:
    """`name=value` as vLLM takes it: numbers, True, lists and the like by Python's rules."""
    name, equals, value = word.partition("=")
    if not (name.isidentifier() and equals):
        raise RecipeError(f"vllm_option {word!r}: expected NAME=VALUE, such as max_model_len=4096")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


@contextmanager
def _named_failures() -> Iterator[None]:
    """SearchError for an engine that dies or refuses a call. Its own traceback is in its output."""
    dead = importlib.import_module("vllm.v1.engine.exceptions").EngineDeadError
    failures: tuple[type[Exception], ...] = (RuntimeError, OSError, dead)
    try:
        yield
    except failures as error:
        raise SearchError(
            f"vLLM failed: {first_line(error)}; what its workers said stands above. Answers that"
            " were finished are kept; start the same command again"
        ) from None


class VllmAnswerer:
    """Greedy answers of a vLLM engine, in the words of the base's chat template.

    `cost` is what the last call took; `notes` are what the user should know of the answers.
    """

    def __init__(self, llm: Any, settings: AnswerSettings, *, batch_size: int) -> None:
        self._llm, self._batch_size = llm, batch_size
        self._sampling = importlib.import_module("vllm").SamplingParams(
            temperature=0.0,
            max_tokens=settings.max_new_tokens,
            logprobs=0,  # of the chosen token alone
        )
        self.cost = Cost()
        self.notes: list[str] = []

    def answer(
        self,
        prompts: Sequence[Prompt],
        known: Mapping[int, Answer] | None = None,
        answered: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """One answer for each prompt, in their order; see `Answerer.answer`."""
        start, self.cost = time.perf_counter(), Cost()
        answers = dict(known or {})
        places = [place for place in range(len(prompts)) if place not in answers]
        for first in range(0, len(places), self._batch_size):
            batch = places[first : first + self._batch_size]
            for place, answer in self._ask(batch, prompts):
                answers[place] = answer
                self.cost.answer_tokens += len(answer.tokens)
                if answered:
                    answered(place, answer)
        self.cost.forward_tokens = self.cost.plain_tokens = self.cost.answer_tokens
        self.cost.seconds = time.perf_counter() - start
        return [answers[place] for place in range(len(prompts))]

    def set_drafts(self, prompts: Sequence[Prompt], answers: Mapping[int, Answer]) -> None:
        """Drafts are of no use here: the engine batches what they would save."""

    def _ask(
        self, places: Sequence[int], prompts: Sequence[Prompt]
    ) -> Iterator[tuple[int, Answer]]:
        """Each answer as soon as it is finished."""
        engine = self._llm.llm_engine
        with _named_failures():
            ids = self._llm.enqueue_chat(
                [_message(prompts[place]) for place in places], self._sampling, use_tqdm=False
            )
            # An output is called by the number before the dash of what its request is called
            numbers = [request_id.partition("-")[0] for request_id in ids]
            place_of = dict(zip(numbers, places, strict=True))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        yield place_of[output.request_id], _as_answer(output.outputs[0])


def _as_answer(completion: Any) -> Answer:
    """What vLLM has answered. It tells nothing from which an entropy could be found."""
    tokens = tuple(completion.token_ids)
    mean = completion.cumulative_logprob / max(len(tokens), 1)
    return Answer(completion.text.strip(), tokens, round_confidence(mean))


def _message(prompt: Prompt) -> list[dict[str, Any]]:
    images = [{"type": "image_pil", "image_pil": open_image(image)} for image in prompt.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": prompt.text}]}]
