// The openai package on Node: a stream, and a tool that must be called.  Reads OPENAI_BASE_URL and OPENAI_API_KEY.
import OpenAI from "openai"

const client = new OpenAI()
const model = (await client.models.list()).data[0].id

const stream = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is the capital of France?" }],
  temperature: 0,
  max_tokens: 24,
  stream: true,
})
process.stdout.write("stream: ")
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "")
console.log()

const answer = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is the weather in Paris?" }],
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        parameters: {
          type: "object",
          properties: { city: { type: "string", maxLength: 20 } },
          required: ["city"],
          additionalProperties: false,
        },
      },
    },
  ],
  tool_choice: "required",
  parallel_tool_calls: false,
  temperature: 0,
  max_tokens: 100,
})
const [call] = answer.choices[0].message.tool_calls
console.log("call:", call.function.name, JSON.parse(call.function.arguments))
