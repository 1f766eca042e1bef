"""The anthropic package: a stream, a tool that must be called, and a count of tokens.

Reads ANTHROPIC_BASE_URL (without /v1), ANTHROPIC_API_KEY and MODEL.
"""

import os

from anthropic import Anthropic

client = Anthropic()
model = os.environ["MODEL"]
question = [{"role": "user", "content": "What is the weather in Paris?"}]

print("stream:", end=" ")
with client.messages.stream(
    model=model,
    system="Be brief.",
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    extra_body={"temperature": 0},
    max_tokens=24,
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    print(f" ({stream.get_final_message().stop_reason})")

weather = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
message = client.messages.create(
    model=model,
    messages=question,
    tools=[weather],
    tool_choice={"type": "tool", "name": "get_weather"},
    extra_body={"temperature": 0},
    max_tokens=100,
)
for block in message.content:
    if block.type == "tool_use":
        print("call:", block.name, block.input)

print("input tokens:", client.messages.count_tokens(model=model, messages=question).input_tokens)
