"""LlamaIndex: a small index over /v1/embeddings, and an answer from what it finds.

pip install llama-index-llms-openai-like llama-index-embeddings-openai-like.  Reads OPENAI_BASE_URL and OPENAI_API_KEY.
The server needs SERVE_EMBEDDING_MODEL; /v1/models lists its chat model first, then that for embeddings.
"""

import os

from llama_index.core import Document, VectorStoreIndex
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from openai import OpenAI

chat, embedding = [model.id for model in OpenAI().models.list()][:2]
server = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}

llm = OpenAILike(model=chat, is_chat_model=True, context_window=4096, max_tokens=48, temperature=0, **server)
index = VectorStoreIndex.from_documents(
    [
        Document(text="The harbour master of Trim is called Ada Quill."),
        Document(text="Outriggers keep a narrow hull upright in waves."),
        Document(text="The ferry to the lighthouse leaves at nine in the morning."),
    ],
    embed_model=OpenAILikeEmbedding(model_name=embedding, **server),
)

question = "When does the boat to the lighthouse depart?"
answer = index.as_query_engine(llm=llm, similarity_top_k=1).query(question)
print("found:", answer.source_nodes[0].text)
print("answer:", answer)
