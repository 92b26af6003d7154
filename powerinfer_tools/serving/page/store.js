// Conversations and settings, kept in this browser alone.

const KEY = "powerinfer.v1";
const EMPTY = { conversations: [], current: null, settings: {}, theme: null };

/** All that is kept; what cannot be read is replaced by nothing. */
export function load() {
  try {
    const value = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    const conversations = Array.isArray(value.conversations) ? value.conversations.filter(isConversation) : [];
    return { ...EMPTY, ...value, conversations, settings: { ...value.settings } };
  } catch {
    return structuredClone(EMPTY);
  }
}

function isConversation(value) {
  return typeof value?.id === "string" && Array.isArray(value.messages)
    && value.messages.every((message) => typeof message?.content === "string" && typeof message.role === "string");
}

/** Keep it; whether there was room. */
export function save(state) {
  try {
    localStorage.setItem(KEY, JSON.stringify(state));
    return true;
  } catch {
    return false;
  }
}

export function newConversation() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", messages: [] };
}
