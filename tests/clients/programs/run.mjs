// Claims a session, runs a program of this directory in it, posts a reward and ends the session: run.py in JavaScript.
//
//     node run.mjs URL PROGRAM [ARGUMENT ...]
//
// It claims with the client of the guide (docs/guides/agents.md), which the test writes beside it.
import { claim, run } from "./areal_like.mjs";

const [url, program, ...args] = process.argv.slice(2);
const session = await claim(url, { restartS: 0 });
process.env.OPENAI_BASE_URL = session.base_url;
process.env.ANTHROPIC_BASE_URL = session.base_url.replace(/\/v1$/, "");
process.env.OPENAI_API_KEY = process.env.ANTHROPIC_API_KEY = session.api_key;
const { default: play } = await import(`./${program}.mjs`);
let answer;
await run(session, async (send) => {
  answer = await play(...args);
  await send("reward", { reward: 1.0 });
});
console.log(JSON.stringify({ group: session.group, answer }));
