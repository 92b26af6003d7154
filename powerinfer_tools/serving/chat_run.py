"""A chat request on its way: prompt, jobs, and the parts of its answers as they come.

The endpoints for the different API dialects are built on this module.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from powerinfer_tools.serving.faults import RequestFault
from powerinfer_tools.serving.formatting import call_grammar, grammar_of, is_forced, offered
from powerinfer_tools.serving.jobs import Ended, Job, Token
from powerinfer_tools.serving.prompting import prompt_ids
from powerinfer_tools.serving.schemas import ChatRequest
from powerinfer_tools.serving.served_model import ServedModel
from powerinfer_tools.serving.streams import merged
from powerinfer_tools.serving.tickets import Ticket
from powerinfer_tools.serving.translation import biases, copies, generation_options
from powerinfer_tools.text.answer_parts import Part, PartsParser, parts_parser
from powerinfer_tools.text.thoughts import thought_formats
from powerinfer_tools.text.tool_formats import format_of


@dataclass(frozen=True)
class Step:
    """The additions of one token, or of the end of the text, to answer ``index``."""

    index: int
    parts: Sequence[Part]
    token: Token | None
    ended: Ended | None


class ChatRun:
    """One request. Its construction renders and tokenises, which takes a while: not for the event loop."""

    def __init__(self, request: ChatRequest, model: ServedModel, client: str) -> None:
        self.request, self.model = request, model
        tools = offered(request)
        forced = is_forced(request)
        form = format_of(model.template_source)
        ids = prompt_ids(request.messages, model, tools, request.chat_template_kwargs)
        limit = request.max_completion_tokens
        limit = request.max_tokens if limit is None else limit
        grammar = grammar_of(request, model.tokenizer)
        if forced:
            if grammar is not None:
                raise RequestFault("choose one of a response format and a tool_choice that forces a call")
            grammar = call_grammar(tools, form, model.tokenizer)
        marked = (bool(tools) and _is_control(form.opener, model)) or any(
            _is_control(one.opener, model) for one in thought_formats(model.template_source)
        )
        job = Job(
            prompt=ids,
            options=generation_options(request, limit, model.template.stops, show_special=marked),
            client=client,
            bias=biases(request, model.tokenizer),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            grammar=grammar,
            reuse=request.cache_prompt is not False,
        )
        self.jobs = copies(job, request.n or 1)
        self._tail = model.tokenizer.decode(ids[-8:], show_special=True)
        self._tools, self._forced, self._formed = (form if tools else None), forced, grammar is not None
        self.parsers = [self._parser() for _ in self.jobs]

    def _parser(self) -> PartsParser:
        source = self.model.template_source
        return parts_parser(source, self._tail, self._tools, formed=self._formed, forced=self._forced)

    async def steps(self, tickets: Sequence[Ticket]) -> AsyncIterator[Step]:
        """The steps as they come, until all answers have ended."""
        async for index, event in merged(tickets):
            parser = self.parsers[index]
            if isinstance(event, Token):
                yield Step(index, parser.push(event.text), event, None)
            elif isinstance(event, Ended):
                yield Step(index, [*parser.push(event.rest), *parser.finish()], None, event)


def _is_control(text: str, model: ServedModel) -> bool:
    """Whether ``text`` is a token that is normally not shown."""
    token = model.tokenizer.tokens.ids.get(text)
    return token is not None and token in model.tokenizer.control_ids
