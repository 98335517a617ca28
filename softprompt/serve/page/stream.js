// The client of the API: a request {path, body}, its answer as it comes, and the same request as code for others.

export const CHAT = "v1/chat/completions";
export const PLAIN = "v1/completions";

export class Refused extends Error {
  constructor(message, status, seconds) {
    super(message);
    this.status = status; // undefined where the answer had begun
    this.seconds = seconds; // when to come again, where the server says so
  }
}

// An address of this server, also where the page lies behind a proxy's path.
export const address = (path) => new URL(path, document.baseURI);

export async function get(path, key) {
  const answer = await fetch(address(path), { headers: authorization(key) });
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

// Pieces of an answer: {text}, {thought}, {finish}, {usage}. Throws Refused, or what fetch throws.
export async function* ask(request, key, signal) {
  const answer = await fetch(address(request.path), {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization(key) },
    body: JSON.stringify({ ...request.body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!answer.ok) throw await refusal(answer);
  for await (const chunk of events(answer.body)) {
    if (chunk.error) throw new Refused(chunk.error.message);
    if (chunk.usage) yield { usage: chunk.usage };
    for (const { delta, text = delta?.content, finish_reason: finish } of chunk.choices ?? []) {
      if (delta?.reasoning_content) yield { thought: delta.reasoning_content };
      if (text) yield { text };
      if (finish) yield { finish };
    }
  }
}

// The values of a stream's data lines, up to [DONE]. Throws Refused without a message where it ends before.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader(); // not every browser iterates over streams
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Refused("");
    });
    if (done) throw new Refused("");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const data of lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim())) {
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function refusal(answer) {
  const said = await answer.json().catch(() => ({}));
  return new Refused(said.error?.message ?? `HTTP ${answer.status}`, answer.status, answer.headers.get("Retry-After"));
}

const authorization = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

// ---- as code ----------------------------------------------------------------------------------------------------------

export function asCurl({ path, body }, key) {
  const lines = [`curl ${quoted(String(address(path)))}`, `-H 'Content-Type: application/json'`];
  if (key) lines.push(`-H "Authorization: Bearer $API_KEY"`);
  return [...lines, `-d ${quoted(JSON.stringify(body))}`].join(" \\\n  ");
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function asPython({ path, body }, key) {
  const values = Object.entries(body).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`).join("");
  const [imports, known] = key ? ["import os\n\n", 'os.environ["API_KEY"]'] : ["", '"none"'];
  const [method, said] = path === CHAT ? ["chat.completions", "message.content"] : ["completions", "text"];
  return (
    `${imports}from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(String(address("v1")))}, api_key=${known})\n` +
    `answer = client.${method}.create(\n${values})\nprint(answer.choices[0].${said})\n`
  );
}
