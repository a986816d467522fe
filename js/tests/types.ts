/** Never run: `npm run types` checks that this compiles, and that what is wrong does not. */

import { APIError, LLMasOS, RateLimitError, ToolLimitError, type ChatCompletion, type Message } from "../llmasos.js";

const client = new LLMasOS({ baseURL: new URL("http://127.0.0.1:8000/v1"), timeout: 1000, fetch: globalThis.fetch });

export async function sample(signal: AbortSignal): Promise<string> {
  const answer: ChatCompletion = await client.chat("Hello", { model: "m", max_tokens: 5, signal });
  const stream = client.streamChat([{ role: "user", content: "Hello" }], { model: "m" });
  for await (const chunk of stream) console.log(chunk.text, chunk.choices[0]?.delta.content);
  for await (const piece of client.streamChat("Hello", { model: "m" }).text) console.log(piece.trim());
  const whole: ChatCompletion = await stream.final();
  const { messages, steps } = await client.runTools({
    model: "m",
    messages: "Weather?",
    tools: [{ name: "weather", parameters: { type: "object" }, run: async ({ city }: { city: string }) => city.length }],
    onChunk: (chunk) => console.log(chunk.text),
  });
  const conversation: Message[] = messages;
  const vectors: number[][] = (await client.embed(["a"], { model: "m" })).data.map((row) => row.embedding);
  const file = await client.files.upload(new Uint8Array([1]), { filename: "a.jsonl" });
  const batch = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions" });
  if ((await client.batches.wait(batch.id)).status === "completed") console.log(batch.output_file_id);
  const job = await client.fineTuning.create({ model: "m", training_file: file.id, options: { lora: { r: 8 } } });
  for await (const event of client.fineTuning.follow(job.id)) console.log(event.message);
  console.log((await client.fineTuning.wait(job.id)).fine_tuned_model);
  for await (const job of client.native.pull("gpt2")) console.log(job.done / (job.total ?? 1));
  const response = await client.responses.create({ model: "m", input: "Hi" });
  const said = await client.apps.run<string>("notes", "/ask", { question: "Why" });
  try {
    await client.model("none");
  } catch (e) {
    if (e instanceof RateLimitError) console.log((e.retryAfter ?? 0) * 1000);
    if (e instanceof APIError) console.log(e.status, e.code, e.param, e.requestId);
    if (e instanceof ToolLimitError) console.log(e.messages.length);
  }
  return [answer.text, whole.text, response.text, said, steps, conversation.length, vectors.length].join();
}

export function wrong(): void {
  // @ts-expect-error: a model is needed
  void client.chat("Hello", {});
  // @ts-expect-error: a number is needed
  void client.chat("Hello", { model: "m", temperature: "warm" });
  // @ts-expect-error: there is no such role
  void client.chat([{ role: "robot", content: "x" }], { model: "m" });
  // @ts-expect-error: tools are run here
  void client.runTools({ model: "m", messages: "x", tools: [{ name: "a" }] });
  // @ts-expect-error: options are named
  new LLMasOS("http://127.0.0.1:8000/v1");
}
