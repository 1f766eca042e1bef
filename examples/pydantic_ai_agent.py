"""pydantic-ai: an agent whose answer is an object, and one that streams text.

pip install "pydantic-ai-slim[openai]".  Reads OPENAI_BASE_URL and OPENAI_API_KEY.
"""

import asyncio

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


async def main() -> None:
    name = OpenAI().models.list().data[0].id
    model = OpenAIChatModel(name, provider=OpenAIProvider(openai_client=AsyncOpenAI()))
    settings = ModelSettings(temperature=0, max_tokens=100)

    result = await Agent(model, output_type=City, model_settings=settings).run("Tell me about Paris.")
    print("object:", repr(result.output))

    async with Agent(model, model_settings=settings).run_stream("What is the capital of France?") as stream:
        print("text:", await stream.get_output(), f"({stream.usage.output_tokens} tokens)")


asyncio.run(main())
