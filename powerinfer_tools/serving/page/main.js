// The page: tabs, theme, and what they hold.

import { startChat } from "./chat.js";
import { get } from "./api.js";
import { startMachine, stopMachine } from "./machine.js";
import { load, save } from "./store.js";

const $ = (id) => document.getElementById(id);
const state = load();

function setTheme(theme) {
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function show(name) {
  for (const tab of ["chat", "machine"]) {
    $(tab).hidden = tab !== name;
    $(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
  }
  document.body.classList.remove("menu");
  if (name === "machine") startMachine(() => state.settings.key);
  else stopMachine();
}

setTheme(state.theme);
$("theme").addEventListener("click", () => {
  state.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(state.theme);
  save(state);
});
$("tab-chat").addEventListener("click", () => show("chat"));
$("tab-machine").addEventListener("click", () => show("machine"));
$("menu").addEventListener("click", () => {
  const open = document.body.classList.toggle("menu");
  $("menu").setAttribute("aria-expanded", String(open));
});
startChat(state, () => {
  document.body.classList.remove("menu");
  $("menu").setAttribute("aria-expanded", "false");
});

async function nameModel() {
  try {
    const { data } = await get("/v1/models", state.settings.key);
    $("model").textContent = `${data[0].id} · ${data[0].meta.mode} · ${data[0].meta.n_ctx} tokens of context`;
  } catch (error) {
    $("model").textContent = error.message;
    setTimeout(nameModel, 2000);
  }
}
nameModel();
