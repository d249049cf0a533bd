// The stream of server-sent events. By fetch, since an EventSource cannot carry a key in a header.

const STORED = "conserve-key";
const FIRST_RETRY_S = 1;
const LONGEST_RETRY_S = 10;
const SILENCE_S = 15; // a stream that says nothing for so long is taken for dead

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => sessionStorage.setItem(STORED, value),
  forget: () => sessionStorage.removeItem(STORED),
};

export const authorization = () => (key.get() ? { authorization: `Bearer ${key.get()}` } : {});

/** What the feed said and the page cannot take: the two are of different versions. */
class UnreadableError extends Error {}

/**
 * Follow the feed for as long as the page lives.
 * on: { event(name, data), open(), lost(retryInSeconds), unreadable(), key(wasWrong) -> Promise }
 */
export async function follow(url, on) {
  let retry_s = FIRST_RETRY_S;
  for (;;) {
    const had = Boolean(key.get());
    try {
      const answer = await listen(url, on, () => { retry_s = FIRST_RETRY_S; });
      if (answer === 401) {
        key.forget();
        await on.key(had);
        continue;
      }
    } catch (error) {
      if (error instanceof UnreadableError) on.unreadable();
      // A TypeError is what fetch throws where there is no answer.
      if (!(error instanceof TypeError || error.name === "AbortError")) throw error;
    }
    on.lost(retry_s);
    await new Promise((resolve) => setTimeout(resolve, 1000 * retry_s));
    retry_s = Math.min(LONGEST_RETRY_S, 2 * retry_s);
  }
}

/** One connection, to its end. Resolves to the status of its answer. */
async function listen(url, on, heard) {
  const abort = new AbortController();
  let silence = setTimeout(() => abort.abort(), 1000 * SILENCE_S);
  try {
    const response = await fetch(url, { headers: authorization(), signal: abort.signal, cache: "no-store" });
    if (!response.ok) return response.status;
    on.open();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return response.status;
      clearTimeout(silence);
      silence = setTimeout(() => abort.abort(), 1000 * SILENCE_S);
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const text of events) {
        take(text, on);
        heard();
      }
    }
  } finally {
    clearTimeout(silence);
    abort.abort();
  }
}

function take(text, on) {
  try {
    const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(text);
    on.event(name, JSON.parse(data));
  } catch (cause) {
    throw new UnreadableError(`cannot take what the feed says: ${cause}`, { cause });
  }
}
