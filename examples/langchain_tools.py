"""LangChain: a stream, a structured answer, and one turn of a tool's call, its result and the answer to it.

pip install langchain-openai.  Reads OPENAI_BASE_URL and OPENAI_API_KEY.
"""

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel, Field

model = ChatOpenAI(model=OpenAI().models.list().data[0].id, temperature=0, max_tokens=100)

print("stream:", "".join(piece.text for piece in model.stream("What is the capital of France?")))


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0)


print("structured:", repr(model.with_structured_output(City).invoke("Tell me about Paris.")))


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


question = HumanMessage("What is 2 plus 3?")
asked = model.bind_tools([add], tool_choice="any", parallel_tool_calls=False).invoke([question])
results = [ToolMessage(str(add.invoke(call["args"])), tool_call_id=call["id"]) for call in asked.tool_calls]
print("called:", [(call["name"], call["args"]) for call in asked.tool_calls])
print("answer:", model.bind_tools([add], tool_choice="none").invoke([question, asked, *results]).text)
