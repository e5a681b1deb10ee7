// What the page asks the daemon for: the device, lists of ranges as they arrive, and events.

/** The token that `vmemctl ui` put into the address. It stays in this tab. */
const token = (() => {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  try {
    if (given) {
      sessionStorage.setItem("token", given);
      history.replaceState(null, "", location.pathname);
    }
    return given ?? sessionStorage.getItem("token");
  } catch {
    // Storage may be switched off: then the address has to be opened again after a reload.
    return given;
  }
})();

/** Sends a GET; an answer that is an error is thrown as one, in words of the daemon. */
async function get(resource, signal) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const answer = await fetch(resource, { headers, signal, cache: "no-store", credentials: "omit" });
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  const error = new Error(problem.detail ?? `The answer to ${resource} is ${answer.status}.`);
  error.status = answer.status;
  throw error;
}

/** The pieces of an answer's body as text. */
async function* textOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Reads lists of ranges: `begin(name)` for each list, then `take(range)` for each range of it. The
 * text of a range is dropped with it: a region may have more ranges than fit into memory.
 */
async function readRanges(resource, signal, begin, take) {
  const item = /"(\w+)"\s*:\s*\[|\{("[^{}]*)\}/g;
  let rest = "";
  for await (const text of textOf(await get(resource, signal))) {
    rest += text;
    let end = 0;
    for (const match of rest.matchAll(item)) {
      if (match[1]) begin(match[1]);
      else take(JSON.parse(match[0]));
      end = match.index + match[0].length;
    }
    rest = rest.slice(end);
  }
}

/** Server-sent events without end: `{name, data}`. `EventSource` cannot send the token. */
async function* events(signal) {
  let rest = "";
  for await (const text of textOf(await get("/v1/events", signal))) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { name: "message", data: "" };
      for (const line of block.split("\n")) {
        if (line.startsWith("event:")) event.name = line.slice(6).trim();
        if (line.startsWith("data:")) event.data += line.slice(5);
      }
      if (event.data) yield { name: event.name, data: JSON.parse(event.data) };
    }
  }
}
