"""instructor: objects from text, by a tool's call and by a JSON schema.

pip install instructor.  Reads OPENAI_BASE_URL and OPENAI_API_KEY.
"""

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """Somebody who is named in a text."""

    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=150)


model = OpenAI().models.list().data[0].id
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(), mode=mode)
    person = client.chat.completions.create(
        model=model,
        response_model=Person,
        messages=[{"role": "user", "content": "Extract: John Smith is 42 years old."}],
        temperature=0,
        max_tokens=100,
    )
    print(f"{mode.name}: {person!r}")
