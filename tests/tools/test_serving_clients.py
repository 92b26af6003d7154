"""OpenAI's own client, and the dialects beside chat completions, against a real server on a tiny model."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from served_models import Served
from tiny_models import TinySpec, make_tiny_model

USER: list[Any] = [{"role": "user", "content": "was there a boat?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tiny = make_tiny_model(tmp_path_factory.mktemp("tiny"), TinySpec(context=1024))
    with Served(tiny.path) as served:
        yield served.ready()


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="no model is called"):
        client.models.retrieve("other")


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": USER, "temperature": 0, "max_tokens": 6}
    whole = client.chat.completions.create(**asked)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_chat_asynchronously(server: Served) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked = [
                client.chat.completions.create(
                    model="tiny", messages=USER, max_tokens=4, seed=seed, temperature=1
                )
                for seed in (1, 2, 1)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    first, _, third = asyncio.run(ask())
    assert first == third


def test_structured_answers(client: openai.OpenAI) -> None:
    class Boats(pydantic.BaseModel):
        seen: bool
        where: str = pydantic.Field(max_length=8)

    answer = client.chat.completions.parse(model="tiny", messages=USER, response_format=Boats, seed=1)
    assert isinstance(answer.choices[0].message.parsed, Boats)


def test_tools(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    with client.chat.completions.stream(
        model="tiny", messages=USER, tools=[tool], tool_choice="required", temperature=0
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = client.chat.completions.create(
        model="tiny", messages=[*USER, message, result], tools=[tool], max_tokens=4
    )
    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="the road", max_tokens=4, echo=True, logprobs=2)
    assert answer.choices[0].text.startswith("the road")
    assert answer.choices[0].logprobs is not None


def test_faults_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x " * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_responses(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "boat?", "temperature": 0, "max_output_tokens": 16}
    whole = client.responses.create(**asked, instructions="be brief")
    assert whole.status == "incomplete"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 16
    with client.responses.stream(**asked, instructions="be brief") as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert "response.output_text.done" in kinds


def test_responses_call_functions(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    answer = client.responses.create(model="tiny", input=USER, tools=[tool], tool_choice="required")
    (call,) = answer.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    again = client.responses.create(
        model="tiny", input=[*USER, call.model_dump(), output], tools=[tool], max_output_tokens=16
    )
    assert again.output


def test_messages(server: Served) -> None:
    body = {"model": "tiny", "max_tokens": 5, "system": "be brief", "messages": USER, "temperature": 0}
    whole = server.post("/v1/messages", **body)
    assert whole["stop_reason"] == "max_tokens"
    assert whole["usage"]["output_tokens"] == 5
    events = [json.loads(event) for event in server.events("/v1/messages", **body)]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"]
    counted = server.post("/v1/messages/count_tokens", **body)["input_tokens"]
    usage = whole["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_messages_use_tools(server: Served) -> None:
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    body = {"model": "tiny", "max_tokens": 60, "tools": tools}
    first = server.post("/v1/messages", **body, messages=USER, tool_choice={"type": "any"})
    (use,) = first["content"]
    assert (first["stop_reason"], use["type"], use["name"]) == ("tool_use", "tool_use", "weather")
    assert use["input"]["city"] in ("Oslo", "Rome")
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "sunny"}]}
    turns = [*USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    assert server.post("/v1/messages", **body, messages=turns)["type"] == "message"
