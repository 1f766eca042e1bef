// Vercel's AI SDK: a stream, an object of a schema, and a tool that is called and answered.
// Reads OPENAI_BASE_URL and OPENAI_API_KEY.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible"
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai"
import { z } from "zod"

const { OPENAI_BASE_URL: baseURL, OPENAI_API_KEY: apiKey } = process.env
const headers = { Authorization: `Bearer ${apiKey}` }
const { data } = await (await fetch(`${baseURL}/models`, { headers })).json()
const provider = createOpenAICompatible({
  name: "trimaran",
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
})
const model = provider(data[0].id)

const { textStream, usage } = streamText({
  model,
  prompt: "What is the capital of France?",
  temperature: 0,
  maxOutputTokens: 24,
})
process.stdout.write("stream: ")
for await (const piece of textStream) process.stdout.write(piece)
console.log(` (${(await usage).outputTokens} tokens)`)

const { object } = await generateObject({
  model,
  schema: z.object({ name: z.string().max(20), isCapital: z.boolean() }),
  prompt: "Tell me about Paris.",
  temperature: 0,
  maxOutputTokens: 100,
})
console.log("object:", JSON.stringify(object))

const weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.string().max(20) }),
  execute: ({ city }) => `sunny in ${city}`,
})
const { steps } = await generateText({
  model,
  tools: { weather },
  toolChoice: { type: "tool", toolName: "weather" },
  stopWhen: stepCountIs(1),
  prompt: "What is the weather in Paris?",
  temperature: 0,
  maxOutputTokens: 100,
})
console.log("tool:", JSON.stringify(steps[0].toolResults.map(({ input, output }) => ({ input, output }))))
