// Asks for the weather with a tool until the model says something else: one client each.
//
//     play("openai_chat" | "openai_responses" | "vercel_openai" | ... (CLIENTS), "create" | "stream")
//
// The clients are as they are by default: the base URLs and keys come from the environment.
const CITY = "Tokyo";
const ABOUT = "The weather of a city.";
const PARAMETERS = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const FUNCTION = { name: "get_weather", description: ABOUT, parameters: PARAMETERS };
const QUESTION = { role: "user", content: `${CITY}?` };

const getWeather = ({ city }) => `sunny in ${city}`;

async function openaiChat(stream) {
  const { default: OpenAI } = await import("openai");
  const client = new OpenAI();
  const messages = [QUESTION];
  for (;;) {
    const options = { model: "policy", messages, tools: [{ type: "function", function: FUNCTION }] };
    const completion = stream
      ? await client.chat.completions.stream(options).finalChatCompletion()
      : await client.chat.completions.create(options);
    const { message } = completion.choices[0];
    if (!message.tool_calls?.length) return message.content;
    messages.push(message);
    for (const call of message.tool_calls) {
      const content = getWeather(JSON.parse(call.function.arguments));
      messages.push({ role: "tool", tool_call_id: call.id, content });
    }
  }
}

async function openaiResponses(stream, { refers = false } = {}) {
  const { default: OpenAI } = await import("openai");
  const client = new OpenAI();
  let input = [QUESTION];
  let previous;
  for (;;) {
    const options = {
      model: "policy",
      input,
      instructions: "Be short.",
      tools: [{ type: "function", strict: false, ...FUNCTION }],
      previous_response_id: previous,
    };
    const response = stream
      ? await client.responses.stream(options).finalResponse()
      : await client.responses.create(options);
    const calls = response.output.filter((item) => item.type === "function_call");
    if (!calls.length) return response.output_text;
    const outputs = calls.map((call) => ({
      type: "function_call_output",
      call_id: call.call_id,
      output: getWeather(JSON.parse(call.arguments)),
    }));
    if (refers) [input, previous] = [outputs, response.id];
    else input.push(...response.output, ...outputs);
  }
}

async function anthropic(stream) {
  const { default: Anthropic } = await import("@anthropic-ai/sdk");
  const client = new Anthropic();
  const messages = [QUESTION];
  const tools = [{ name: "get_weather", description: ABOUT, input_schema: PARAMETERS }];
  for (;;) {
    const options = { model: "policy", max_tokens: 256, messages, tools, system: "Be short." };
    const message = stream
      ? await client.messages.stream(options).finalMessage()
      : await client.messages.create(options);
    if (message.stop_reason !== "tool_use") {
      return message.content.map((block) => (block.type === "text" ? block.text : "")).join("");
    }
    const results = message.content
      .filter((block) => block.type === "tool_use")
      .map((block) => ({ type: "tool_result", tool_use_id: block.id, content: getWeather(block.input) }));
    messages.push({ role: "assistant", content: message.content }, { role: "user", content: results });
  }
}

async function vercel(stream, model) {
  const { generateText, isStepCount, jsonSchema, streamText, tool } = await import("ai");
  const options = {
    model,
    prompt: `${CITY}?`,
    tools: { get_weather: tool({ description: ABOUT, inputSchema: jsonSchema(PARAMETERS), execute: getWeather }) },
    stopWhen: isStepCount(5),
  };
  return stream ? await streamText(options).text : (await generateText(options)).text;
}

async function vercelOpenai(stream, api) {
  const { openai } = await import("@ai-sdk/openai");
  return vercel(stream, api === "chat" ? openai.chat("policy") : openai("policy"));
}

async function vercelAnthropic(stream) {
  const { anthropic } = await import("@ai-sdk/anthropic");
  return vercel(stream, anthropic("policy"));
}

const CLIENTS = {
  openai_chat: openaiChat,
  openai_responses: openaiResponses,
  openai_previous: (stream) => openaiResponses(stream, { refers: true }),
  anthropic,
  vercel_openai: vercelOpenai,
  vercel_openai_chat: (stream) => vercelOpenai(stream, "chat"),
  vercel_anthropic: vercelAnthropic,
};

export default (client, mode) => CLIENTS[client](mode === "stream");
