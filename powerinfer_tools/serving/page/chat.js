// The chat: conversations, the messages of one, and answers as they stream in.

import { stream } from "./api.js";
import { render } from "./markdown.js";
import { newConversation, save } from "./store.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "max_tokens"];
let state;
let afterChoice;
let running = null;

/** Begin with what was kept. */
export function startChat(kept, chosen) {
  state = kept;
  afterChoice = chosen;
  if (!current()) state.current = state.conversations[0]?.id ?? create().id;
  bindSettings();
  $("new").addEventListener("click", () => choose(create().id));
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("stop").addEventListener("click", stop);
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("input").addEventListener("input", grow);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.altKey && event.key.toLowerCase() === "n") { event.preventDefault(); choose(create().id); }
  });
  draw();
}

function current() {
  return state.conversations.find((conversation) => conversation.id === state.current);
}

function create() {
  const empty = state.conversations.find((conversation) => !conversation.messages.length);
  if (empty) return empty;
  const made = newConversation();
  state.conversations.unshift(made);
  return made;
}

function choose(id) {
  stop();
  state.current = id;
  keep();
  draw();
  afterChoice();
  $("input").focus();
}

function keep() {
  if (!save(state)) say("this browser has no room left: the conversation is not kept", true);
}

function bindSettings() {
  for (const name of ["system", "key", ...NUMBERS]) {
    $(name).value = state.settings[name] ?? "";
    $(name).addEventListener("change", () => { state.settings[name] = $(name).value; keep(); });
  }
}

function options() {
  const chosen = {};
  for (const name of NUMBERS) {
    const value = state.settings[name];
    if (value !== undefined && value !== "" && Number.isFinite(Number(value))) chosen[name] = Number(value);
  }
  return chosen;
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", wrong);
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  grow();
  const conversation = current();
  conversation.messages.push({ role: "user", content: text });
  if (!conversation.title) conversation.title = text.slice(0, 60);
  answer(conversation);
}

function stop() {
  running?.abort();
}

async function answer(conversation) {
  const system = (state.settings.system ?? "").trim();
  const messages = conversation.messages.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const message = { role: "assistant", content: "", reasoning: "" };
  conversation.messages.push(message);
  running = new AbortController();
  draw();
  busy(true);
  const painter = paint(conversation, message);
  try {
    await stream({ messages, ...options() }, state.settings.key, running.signal, (chunk) => {
      const delta = chunk.choices[0]?.delta ?? {};
      message.content += delta.content ?? "";
      message.reasoning += delta.reasoning_content ?? "";
      if (chunk.timings) message.note = speed(chunk.timings);
      painter();
    });
    say("");
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else { message.note = "failed"; say(error.message, true); }
  }
  running = null;
  if (!message.content && !message.reasoning) conversation.messages.pop();
  busy(false);
  keep();
  draw();
}

function speed(timings) {
  const cached = timings.cache_n ? `, ${timings.cache_n} from the cache` : "";
  return `${timings.predicted_n} tokens, ${timings.predicted_per_second.toFixed(1)} tok/s (prompt ${timings.prompt_n}${cached})`;
}

/** Draws the growing answer at most once a frame. */
function paint(conversation, message) {
  let waiting = false;
  return () => {
    if (waiting || conversation.id !== state.current) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const node = $("messages").lastElementChild;
      if (conversation.id !== state.current || !node) return;
      const low = isLow();
      fill(node.querySelector(".body"), message);
      if (low) scrollDown();
    });
  };
}

function isLow() {
  const box = $("messages");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function scrollDown() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("messages").setAttribute("aria-busy", String(on));
}

function draw() {
  $("conversations").replaceChildren(...state.conversations.map(entry));
  $("messages").replaceChildren(...current().messages.map(view));
  scrollDown();
}

function entry(conversation) {
  const open = button(conversation.title || "New conversation", () => choose(conversation.id));
  open.className = "open";
  if (conversation.id === state.current) open.setAttribute("aria-current", "true");
  const remove = button("×", () => {
    state.conversations = state.conversations.filter((other) => other !== conversation);
    if (conversation.id === state.current) choose(state.conversations[0]?.id ?? create().id);
    else { keep(); draw(); }
  });
  remove.setAttribute("aria-label", `Delete ${conversation.title || "conversation"}`);
  const item = document.createElement("li");
  item.append(open, remove);
  return item;
}

function button(text, action) {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = text;
  node.addEventListener("click", action);
  return node;
}

function view(message, index) {
  const node = document.createElement("article");
  node.className = `message ${message.role}`;
  const body = document.createElement("div");
  body.className = "body";
  fill(body, message);
  const tools = document.createElement("div");
  tools.className = "tools";
  if (!running) tools.append(...actions(message, index, node));
  if (message.note) tools.append(message.note);
  node.append(body, tools);
  return node;
}

function fill(body, message) {
  if (message.role === "user") { body.textContent = message.content; return; }
  const nodes = render(message.content);
  if (message.reasoning) {
    const thought = document.createElement("div");
    thought.className = "reasoning";
    thought.textContent = message.reasoning;
    nodes.unshift(thought);
  }
  body.replaceChildren(...nodes);
}

function actions(message, index, node) {
  const copy = button("Copy", () => navigator.clipboard?.writeText(message.content));
  if (message.role === "user") return [button("Edit", () => edit(message, index, node)), copy];
  return [button("Regenerate", () => { cut(index); answer(current()); }), copy];
}

/** Forget the messages from `index` on. */
function cut(index) {
  current().messages.length = index;
}

function edit(message, index, node) {
  const field = document.createElement("textarea");
  field.value = message.content;
  field.rows = Math.min(10, message.content.split("\n").length + 1);
  field.setAttribute("aria-label", "Edit message");
  const finish = () => {
    cut(index);
    current().messages.push({ role: "user", content: field.value.trim() || message.content });
    answer(current());
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); finish(); }
    if (event.key === "Escape") { event.stopPropagation(); draw(); }
  });
  node.classList.add("edit");
  node.replaceChildren(field, button("Send", finish), button("Cancel", draw));
  field.focus();
}
