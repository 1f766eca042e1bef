#!/usr/bin/env bash
# curl alone: the models, one answer, and a stream cut into its pieces of text.
set -euo pipefail

model=$(curl -fsS "$OPENAI_BASE_URL/models" -H "Authorization: Bearer $OPENAI_API_KEY" | grep -o '"id":"[^"]*"' | head -1 | cut -d'"' -f4)
echo "model: $model"

curl -fsS "$OPENAI_BASE_URL/chat/completions" -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json" -d @- <<EOT
{"model": "$model", "temperature": 0, "max_tokens": 24,
 "messages": [{"role": "user", "content": "What is the capital of France?"}]}
EOT
echo

# -N shows each piece when it comes.  The stream ends with "data: [DONE]".
curl -fsSN "$OPENAI_BASE_URL/chat/completions" -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json" -d @- <<EOT
{"model": "$model", "temperature": 0, "max_tokens": 24, "stream": true,
 "messages": [{"role": "user", "content": "What is the capital of France?"}]}
EOT
