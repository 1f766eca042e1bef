"""The openai package: a stream, JSON of a pydantic model, a tool that must be called, and the Responses API.

Reads OPENAI_BASE_URL and OPENAI_API_KEY.
"""

import json

from openai import OpenAI
from pydantic import BaseModel

client = OpenAI()
model = client.models.list().data[0].id

print("stream:", end=" ")
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    max_tokens=24,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f" ({chunk.usage.completion_tokens} tokens)")


class City(BaseModel):
    name: str
    is_capital: bool


# The server compiles the schema to a grammar: whatever the model says is a City.
parsed = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "Tell me about Paris."}],
    response_format=City,
    temperature=0,
    max_tokens=200,
)
print("parsed:", repr(parsed.choices[0].message.parsed))

weather = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    tools=[weather],
    tool_choice="required",
    parallel_tool_calls=False,
    temperature=0,
    max_tokens=100,
)
call = answer.choices[0].message.tool_calls[0].function
print("call:", call.name, json.loads(call.arguments))

response = client.responses.create(model=model, input="Say hello.", temperature=0, max_output_tokens=16)
print("response:", response.status, response.output_text)
