// Vercel's AI SDK against a server with the adapter `sql`: node ai_sdk.mjs http://127.0.0.1:8000/v1
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, streamText } from "ai";

const openai = createOpenAI({ baseURL: process.argv[2], apiKey: "none" });
const compatible = createOpenAICompatible({ name: "veneer", baseURL: process.argv[2] });
const ask = { prompt: "one two", temperature: 0, maxOutputTokens: 16, maxRetries: 0 };

const models = { responses: openai("sql"), chat: openai.chat("sql"), compatible: compatible("sql") };
const texts = new Set();
for (const [name, model] of Object.entries(models)) {
  const whole = await generateText({ model, ...ask });
  assert.notEqual(whole.text, "");
  let text = "";
  for await (const piece of streamText({ model, ...ask, onError: ({ error }) => { throw error; } }).textStream) text += piece;
  assert.equal(text, whole.text);
  texts.add(text);
  const messages = [{ role: "user", content: "one two" }, ...whole.response.messages, { role: "user", content: "three" }];
  const again = await generateText({ model, messages, temperature: 0, maxOutputTokens: 16, maxRetries: 0 });
  assert.ok(again.usage.inputTokens > whole.usage.inputTokens);
  console.log(name, again.usage.inputTokens, again.usage.outputTokens);
}
assert.equal(texts.size, 1);

for (const model of [openai.embedding("sql"), compatible.textEmbeddingModel("sql")]) {
  const { embeddings } = await embedMany({ model, values: ["one", "two three"] });
  assert.deepEqual(embeddings.map((each) => each.length), [8, 8]);
}
console.log("done");
