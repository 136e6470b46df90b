"""`LLM`: a model that is opened once and asked many times, from one thread or many.

This file turns what callers pass (text, token ids, messages, options) into requests, and their results into outputs.
Steps and threads are scheduler.py's, text is reply.py's, files are open.py's.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from .common.errors import ContextLengthError, PyllamaError
from .cuda import choose_device
from .draft_model import open_drafter
from .native import load_native
from .open import OpenedModel, open_model
from .outputs import Piece, RequestOutput
from .placement import Placement, check_placement
from .prefix_cache import default_cache_tok
from .reply import Reply
from .sampling import SamplingParams, build_params
from .scheduler import Request, Scheduler
from .speculative import Drafter, LookupDrafter, row_costs

if TYPE_CHECKING:
    from os import PathLike
    from types import TracebackType

    from .plan import Plan

Message = Mapping[str, Any]
Prompt = str | Sequence[int]


class LLM:
    """A LLaMA model, ready to run.

    `path`: a model folder, a foreign checkpoint (GGUF file, Hugging Face folder, folder of Meta's: converted once
    into the cache), or "demo". `n_ctx`: tokens of prompt and reply together, by default all that the model was
    made for. `threads`: by default one per physical core that this process may use. `mmap=False` reads the weights
    instead of mapping them (a mapped file must not shrink while it is used). `format`: what a foreign checkpoint is
    converted to. `kv_dtype`: what keys and values are kept in, "f16", or "q8" for about half the memory
    at a small loss of precision.

    `device`: "cpu", "cuda", "cuda:1", or "auto": the CPU, until models have been proven on a GPU, then CUDA where
    there is a device that works; the attribute `device` says which. `gpu_layers`: the last so many layers run on the
    CUDA device, with the head, the others on the CPU; "auto" is as many as fit with a context of `n_ctx` tokens
    (`plan()` has the sum), "all" all or an error that says what would fit. On the CPU it must be "auto" or 0. `threads`
    and `isa` are those of the CPU's layers.

    `speculative="lookup"` guesses tokens from earlier places of the same text, `draft` (another path) names a smaller
    model with the same vocabulary that guesses; either way several guesses are verified per step: the same replies to
    the last bit, in fewer steps where guesses come true. The draft model's keys and values take at most four contexts.

    `enable_prefix_caching`: a prompt that begins like an earlier one, or like one beside it, is computed only from
    where they part; results are the same. For that, keys and values of up to `prefix_cache_tokens` tokens stay in
    memory after their request, in pages of 64, those used least recently go first; by default as many as the context
    holds, in at most a quarter of the memory that is free when the model is opened. 0 is the same as
    `enable_prefix_caching=False`: every prompt is computed whole.

    Raises FileNotFoundError, ModelFormatError, DeviceError, QuantizeError; ValueError for bad arguments. One LLM may
    be used from many threads: their requests share the model's steps, and do not change each other's results.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        device: str = "auto",
        n_ctx: int | None = None,
        threads: int | None = None,
        mmap: bool = True,
        format: str | None = None,
        enable_prefix_caching: bool = True,
        prefix_cache_tokens: int | None = None,
        speculative: str | None = None,
        draft: str | PathLike[str] | None = None,
        kv_dtype: str = "f16",
        gpu_layers: str | int = "auto",
    ) -> None:
        check_placement(device, gpu_layers)
        _check_speculative(speculative, draft)
        _check_kv_dtype(kv_dtype)
        _check_count("n_ctx", n_ctx)
        _check_count("threads", threads)
        cache = _cache_tok(enable_prefix_caching, prefix_cache_tokens)
        load_native()
        if device.startswith("cuda"):
            choose_device(device)  # an error before anything is read or converted
        opened = open_model(path, mmap=mmap, format=format)
        guide = open_model(draft, mmap=mmap) if draft is not None else None
        self._start(opened, n_ctx, threads, cache, speculative, guide, device, gpu_layers, kv_dtype=kv_dtype)

    @classmethod
    def _from_opened(
        cls,
        opened: OpenedModel,
        n_ctx: int | None = None,
        threads: int | None = None,
        cache_tok: int | None = None,
        speculative: str | None = None,
        draft: OpenedModel | None = None,
        device: str = "cpu",
        gpu_layers: str | int = "auto",
        **options: Any,
    ) -> LLM:
        """For tests: a model that lies in memory. `cache_tok` 0: no prefix cache. `options` go to `_C.Model`."""
        llm = cls.__new__(cls)
        llm._start(opened, n_ctx, threads, cache_tok, speculative, draft, device, gpu_layers, **options)
        return llm

    def _start(
        self,
        opened: OpenedModel,
        n_ctx: int | None,
        threads: int | None,
        cache_tok: int | None,
        speculative: str | None,
        draft: OpenedModel | None,
        device: str,
        gpu_layers: str | int,
        **options: Any,
    ) -> None:
        longest = int(opened.config["max_seq_len"])
        if n_ctx is not None and n_ctx > longest:
            raise ValueError(f"n_ctx={n_ctx}: this model was made for at most {longest} tokens")
        self.n_ctx = n_ctx or longest
        self.config = opened.config
        self.path = opened.path
        self.tokenizer = opened.tokenizer
        self._chat_template = opened.chat_template
        self._generation_config = opened.generation_config
        placement = Placement(opened, self.n_ctx, options.get("kv_dtype", "f16"), device, gpu_layers)
        self._placement = placement
        self.device = placement.device
        self.gpu_layers = placement.gpu_layers
        self._model = load_native().Model(
            opened.native_config(self.n_ctx), opened.weights, threads=threads or 0, **placement.options, **options
        )
        self.threads = int(self._model.threads)
        self.isa = str(self._model.isa)
        if cache_tok is None:
            cache_tok = default_cache_tok(self._model, self.n_ctx, placement.rooms())
        drafter: Drafter | None = None
        if speculative == "lookup":
            drafter = LookupDrafter(row_costs(opened.step_bytes, placement.device_share))
        if draft is not None:
            drafter = open_drafter(
                draft,
                opened,
                self.n_ctx,
                self.threads,
                cache_tok,
                device=placement.device_for_draft(draft),
                device_share=placement.device_share,
            )
        self._scheduler = Scheduler(self._model, cache_tok=cache_tok, drafter=drafter)
        self._sessions: WeakSet[Session] = WeakSet()
        self._end_ids = frozenset(opened.end_ids)
        self._closed = False

    # -------------------------------------------------------------------------------- text from a prompt

    @overload
    def generate(self, prompts: Prompt, params: SamplingParams | None = None, **options: Any) -> RequestOutput: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[RequestOutput]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Continues a prompt (text or token ids) to a RequestOutput, or a list of prompts, together, to a list of them.

        `options` are fields of SamplingParams, laid over `params`; a list of prompts may have a list of params. Text
        gets the model's beginning-of-text token, token ids are taken as they are. Raises ContextLengthError when a
        prompt leaves no room for a token, ValueError for bad arguments.
        """
        if _is_one_prompt(prompts):
            return self._run([self._reply(prompts, _single(params), options)])[0]
        choices = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(choices) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(choices)} sampling parameters")
        return self._run([self._reply(p, c, options) for p, c in zip(prompts, choices, strict=True)])

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Generator[Piece, None, None]:
        """Like `generate` for one prompt, token by token: the pieces' texts joined are its text.

        Arguments are checked at once; the model starts with the first piece asked for. Leaving the loop ends the
        request.
        """
        return self._pieces(self._reply(prompt, params, options))

    # -------------------------------------------------------------------------------- conversations

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any) -> RequestOutput:
        """The model's answer to a conversation: [{"role": "user" | "assistant" | "system", "content": text}, …].

        Raises PyllamaError for a model without a chat template; otherwise as `generate`.
        """
        return self._run([self._reply(self.encode_chat(messages), params, options)])[0]

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any
    ) -> Generator[Piece, None, None]:
        """Like `chat`, token by token."""
        return self._pieces(self._reply(self.encode_chat(messages), params, options))

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the text that the model reads, by the model's own chat template."""
        return str(self._template(messages).render(list(messages), add_generation_prompt=add_generation_prompt))

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The conversation as the token ids that the model reads."""
        from .chat_template import encode_chat

        template = self._template(messages)
        return list(encode_chat(self.tokenizer, template, list(messages), add_generation_prompt=add_generation_prompt))

    def session(self) -> Session:
        """A conversation that keeps its cache: a longer prompt with the same beginning costs only what is new."""
        return Session(self)

    def _template(self, messages: Sequence[Message]) -> Any:
        from .chat_template import check_messages

        check_messages(messages)
        if self._chat_template is None:
            raise PyllamaError(
                f"{self.path}: the model has no chat template; use generate() with a prompt of your own, or if it was"
                " tuned for conversations, put its template there as chat_template.jinja"
            )
        return self._chat_template

    # -------------------------------------------------------------------------------- numbers

    def plan(self) -> Plan:
        """What the model takes of memory and where: layers, cache and buffers, on the device and on the CPU.

        What was free is as of before it was loaded. For a model that is not opened: `pyllama plan`.
        """
        return self._placement.plan

    @property
    def runs_on(self) -> str:
        """What computes, for people: "2 threads · avx2", or the CUDA device, or both with their shares."""
        return self._placement.describe(self.threads, self.isa)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The model's logits after each token of a text: float32 [len(token_ids), vocab_size]."""
        prompt = self._prompt_ids(token_ids)
        if len(prompt) > self.n_ctx:
            raise ContextLengthError(f"{len(prompt)} tokens, but the context holds {self.n_ctx}{self._advice()}")
        request = Request(prompt)
        self._finish([request], lambda: request.done or request.error is not None)
        if request.error is not None:
            raise request.error
        return np.concatenate([result.logits for result in request.results])

    # -------------------------------------------------------------------------------- life and death

    def close(self) -> None:
        """Frees the model. Requests of other threads end with an error. Closing twice does nothing."""
        try:
            self._shut()
        except KeyboardInterrupt:  # wherever it struck: not half closed
            self._shut()
            raise

    def _shut(self) -> None:
        """Every part of it may be done again."""
        self._closed = True
        for session in list(self._sessions):
            session.close()
        self._scheduler.close()
        self._model = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.runs_on}, n_ctx={self.n_ctx}"
        return f"LLM({str(self.path)!r}, {state})"

    # -------------------------------------------------------------------------------- from calls to requests

    def _reply(
        self, prompt: Any, params: SamplingParams | None, options: Mapping[str, Any], session: Session | None = None
    ) -> Reply:
        self._check_open()
        settled = build_params(params, options).resolve(self._generation_config)
        self._check_ids_in_vocabulary("logit_bias", settled.logit_bias or ())
        ids = self._prompt_ids(prompt)
        room = self.n_ctx - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, but the context holds {self.n_ctx} and the reply needs at least one"
                + self._advice()
            )
        end_ids = frozenset(settled.stop_token_ids or ()) | (frozenset() if settled.ignore_eos else self._end_ids)
        request = Request(
            ids,
            sampler=load_native().Sampler(**settled.native_arguments(), end_ids=list(end_ids)),
            limit=min(room, settled.max_tokens or room),
            end_ids=end_ids,
            sequence=session and session.sequence,
            keep_sequence=session is not None,
        )
        return Reply(
            request,
            self.tokenizer,
            stop=tuple(settled.stop or ()),
            logprobs=settled.logprobs is not None,
            seed=settled.seed or 0,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this LLM is closed")

    def _advice(self) -> str:
        longest = self.config["max_seq_len"]
        return f"; shorten it, or raise n_ctx (up to {longest})" if self.n_ctx < longest else "; shorten it"

    def _prompt_ids(self, prompt: Any) -> NDArray[np.int32]:
        if isinstance(prompt, str):
            ids = np.asarray(self.tokenizer.encode(prompt), np.int64)
        else:
            ids = _as_ids(prompt)
            self._check_ids_in_vocabulary("prompt", ids)
        if not len(ids):
            raise ValueError("the prompt is empty; a model needs at least one token to start from")
        return ids.astype(np.int32)

    def _check_ids_in_vocabulary(self, what: str, ids: Any) -> None:
        size = self.config["vocab_size"]
        for token in ids:
            if not 0 <= token < size:
                raise ValueError(f"{what}: token id {token} is outside the vocabulary of {size}")

    # -------------------------------------------------------------------------------- running requests

    def _finish(self, requests: list[Request], has_news: Any) -> None:
        try:
            self._scheduler.submit(requests)
            self._scheduler.advance(has_news)
        finally:
            try:
                self._scheduler.release(requests)
            except KeyboardInterrupt:  # also before its first line: what stayed would run on in the steps of others
                self._scheduler.release(requests)
                raise

    def _run(self, replies: list[Reply]) -> list[RequestOutput]:
        def all_through() -> bool:
            for reply in waiting[:]:
                if reply.is_through():
                    waiting.remove(reply)
            return not waiting

        for reply in replies:
            reply.request.watched = reply.has_stops
        waiting = list(replies)
        self._finish([reply.request for reply in replies], all_through)
        return [reply.output() for reply in replies]

    def _pieces(self, reply: Reply) -> Generator[Piece, None, None]:
        requests = [reply.request]
        try:
            self._scheduler.submit(requests)
            while reply.finish_reason is None:
                self._scheduler.advance(reply.has_news)
                yield from reply.take()
        finally:
            try:
                self._scheduler.release(requests)
            except KeyboardInterrupt:  # as in _finish
                self._scheduler.release(requests)
                raise


class Session:
    """One conversation with a cache of its own, which no other request makes room in. For one thread at a time; several
    sessions may run side by side.
    """

    def __init__(self, llm: LLM) -> None:
        llm._check_open()
        self._llm = llm
        self._closed = False
        self.reply: Reply | None = None  # the last one; finished once its stream is through
        llm._sessions.add(self)

    @property
    def sequence(self) -> Any:
        """The cache; None before the first step."""
        return self.reply and self.reply.request.sequence

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Generator[Piece, None, None]:
        """Like `LLM.stream`; what the prompt has in common with what was computed before is not computed again.

        An older stream of this session that is not through raises PyllamaError when it is asked for more.
        """
        if self._closed:
            raise ValueError("this session is closed")
        reply = self._llm._reply(prompt, params, options, self)
        self._end_last("this stream was replaced by a newer one of the same session")
        self.reply = reply
        return self._llm._pieces(reply)

    def close(self) -> None:
        """Gives the cache back. Closing twice does nothing."""
        self._closed = True
        self._end_last("the session of this stream was closed")
        if self.sequence is not None:
            self._llm._scheduler.run_alone(self.sequence.close)

    def _end_last(self, why: str) -> None:
        """The last stream, should it be unfinished, gets no more tokens, and says so if it is read on."""
        if self.reply is not None and self.reply.finish_reason is None:
            if self.reply.request.error is None:
                self.reply.request.error = PyllamaError(why)
            self._llm._scheduler.release([self.reply.request])


# -------------------------------------------------------------------------------- checks of arguments


def _check_speculative(speculative: str | None, draft: str | PathLike[str] | None) -> None:
    if speculative not in (None, "lookup"):
        raise ValueError(f'speculative={speculative!r}: expected "lookup" or None')
    if speculative is not None and draft is not None:
        raise ValueError(f"speculative={speculative!r} and draft={str(draft)!r}: give one of them, both guess tokens")


def _check_kv_dtype(kv_dtype: str) -> None:
    if kv_dtype not in ("f16", "q8"):
        raise ValueError(f'kv_dtype={kv_dtype!r}: expected "f16" or "q8"')


def _check_count(name: str, value: int | None, least: int = 1) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}, or None")


def _cache_tok(enabled: bool, n_tok: int | None) -> int | None:
    """The prefix cache's size: 0 for none, None for the default."""
    _check_count("prefix_cache_tokens", n_tok, least=0)
    if not enabled and n_tok:
        raise ValueError(f"prefix_cache_tokens={n_tok} and enable_prefix_caching=False: give one of them")
    return n_tok if enabled else 0


def _is_one_prompt(prompts: Any) -> bool:
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray) and prompts.ndim:
        return prompts.ndim == 1
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ValueError(f"prompts: expected text, token ids, or a list of those, found {type(prompts).__name__}")
    return bool(prompts) and isinstance(prompts[0], (int, np.integer))


def _single(params: SamplingParams | Sequence[SamplingParams] | None) -> SamplingParams | None:
    if isinstance(params, Sequence):
        raise ValueError("a list of sampling parameters needs a list of prompts")
    return params


def _as_ids(prompt: Any) -> NDArray[np.int64]:
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"prompt: expected one row of integers, found {prompt.dtype} {list(prompt.shape)}")
        return prompt.astype(np.int64)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ValueError(f"prompt: expected text or a list of token ids, found {type(prompt).__name__}")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < 2**31:
            raise ValueError(f"prompt: {token!r} is not a token id")
    return np.asarray(prompt, np.int64)
