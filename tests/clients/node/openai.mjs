// OpenAI's client for Node against a server with the adapter `sql`: node openai.mjs http://127.0.0.1:8000/v1
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "one two" }];

const chat = await client.chat.completions.create({ model: "sql", messages, temperature: 0, max_tokens: 8 });
let text = "";
const chunks = await client.chat.completions.create({ model: "sql", messages, temperature: 0, max_tokens: 8, stream: true });
for await (const chunk of chunks) text += chunk.choices[0]?.delta?.content ?? "";
assert.equal(text, chat.choices[0].message.content);
assert.notEqual(text, "");
console.log("chat", chat.usage);

const first = await client.responses.create({ model: "sql", input: "one two", temperature: 0 });
const stream = client.responses.stream({ model: "sql", input: "one two", temperature: 0 });
const kinds = new Set();
for await (const event of stream) kinds.add(event.type);
assert.equal((await stream.finalResponse()).output_text, first.output_text);
assert.ok(kinds.has("response.completed"));
const second = await client.responses.create({ model: "sql", input: "three", previous_response_id: first.id });
assert.ok(second.usage.input_tokens > first.usage.input_tokens);
const items = await client.responses.inputItems.list(second.id, { order: "asc" });
assert.deepEqual(items.data.map((item) => item.role), ["user", "assistant", "user"]);
await client.responses.delete(first.id);
await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
console.log("responses", [...kinds]);

const vectors = await client.embeddings.create({ model: "sql", input: ["one", "two three"] });
assert.deepEqual(vectors.data.map((each) => each.embedding.length), [8, 8]);
const plain = await client.embeddings.create({ model: "sql", input: "one", encoding_format: "float" });
plain.data[0].embedding.forEach((value, i) => assert.ok(Math.abs(value - vectors.data[0].embedding[i]) < 1e-6));
console.log("embeddings", vectors.usage);

await assert.rejects(client.chat.completions.create({ model: "nobody", messages }), OpenAI.NotFoundError);
console.log("done");
