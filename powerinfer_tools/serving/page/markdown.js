// Markdown → DOM nodes. Text of a model is never HTML: nodes are made one by one and text is only ever text.

const el = (name, ...children) => {
  const node = document.createElement(name);
  node.append(...children);
  return node;
};

/** Nodes for a whole text, which may still be growing. */
export function render(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const nodes = [];
  for (let at = 0; at < lines.length;) {
    const [node, next] = block(lines, at);
    if (node) nodes.push(node);
    at = next;
  }
  return nodes;
}

function block(lines, at) {
  const line = lines[at];
  if (!line.trim()) return [null, at + 1];
  const fence = /^\s*(```+|~~~+)\s*([\w+#.-]*)/.exec(line);
  if (fence) return code(lines, at, fence[1], fence[2]);
  const heading = /^(#{1,6})\s+(.*)$/.exec(line);
  if (heading) return [el(`h${Math.min(6, heading[1].length + 1)}`, ...inline(heading[2])), at + 1];
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) return [el("hr"), at + 1];
  if (/^\s*>/.test(line)) return quote(lines, at);
  if (/^\s*([-*+]|\d+[.)])\s+/.test(line)) return list(lines, at);
  if (/\|/.test(line) && /^\s*\|?[\s:|-]+\|[\s:|-]*$/.test(lines[at + 1] ?? "")) return table(lines, at);
  return paragraph(lines, at);
}

function code(lines, at, fence, language) {
  const body = [];
  let next = at + 1;
  while (next < lines.length && !lines[next].trim().startsWith(fence)) body.push(lines[next++]);
  const text = body.join("\n");
  const inner = el("code", text);
  if (language) inner.dataset.language = language;
  const copy = el("button", "Copy");
  copy.className = "copy";
  copy.type = "button";
  copy.addEventListener("click", () => navigator.clipboard?.writeText(text).then(() => { copy.textContent = "Copied"; }));
  const box = el("div", copy, el("pre", inner));
  box.className = "code";
  return [box, next + 1];
}

function quote(lines, at) {
  const body = [];
  while (at < lines.length && /^\s*>/.test(lines[at])) body.push(lines[at++].replace(/^\s*>\s?/, ""));
  return [el("blockquote", ...render(body.join("\n"))), at];
}

function list(lines, at) {
  const ordered = /^\s*\d/.test(lines[at]);
  const node = el(ordered ? "ol" : "ul");
  if (ordered) node.start = Number.parseInt(lines[at], 10);
  const indent = /^\s*/.exec(lines[at])[0].length;
  while (at < lines.length) {
    const match = /^(\s*)([-*+]|\d+[.)])\s+(.*)$/.exec(lines[at]);
    if (!match || match[1].length < indent || /^\d/.test(match[2]) !== ordered) break;
    const item = el("li", ...inline(match[3]));
    at += 1;
    const inner = [];
    while (at < lines.length && lines[at].trim() && /^\s*/.exec(lines[at])[0].length > indent) inner.push(lines[at++]);
    if (inner.length) item.append(...render(inner.map((text) => text.replace(/^\s{1,4}/, "")).join("\n")));
    node.append(item);
    if (at < lines.length && !lines[at].trim() && /^\s*([-*+]|\d+[.)])\s+/.test(lines[at + 1] ?? "")) at += 1;
  }
  return node.childElementCount ? [node, at] : paragraph(lines, at);
}

function table(lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, name) => el("tr", ...cells(line).map((cell) => el(name, ...inline(cell))));
  const node = el("table", el("thead", row(lines[at], "th")));
  const body = el("tbody");
  at += 2;
  while (at < lines.length && lines[at].includes("|")) body.append(row(lines[at++], "td"));
  node.append(body);
  return [node, at];
}

function paragraph(lines, at) {
  const body = [lines[at++]];
  while (at < lines.length && lines[at].trim() && !/^(\s*(```|~~~|>|[-*+]\s|\d+[.)]\s)|#{1,6}\s)/.test(lines[at])) body.push(lines[at++]);
  const node = el("p");
  body.forEach((line, index) => {
    if (index) node.append(/ {2}$/.test(body[index - 1]) ? el("br") : "\n");
    node.append(...inline(line.trimEnd()));
  });
  return [node, at];
}

const SPANS = [
  [/`+/, null],
  [/\*\*(?=\S)([^*]+?)\*\*|__(?=\S)([^_]+?)__/, "strong"],
  [/\*(?=\S)([^*]+?)\*|(?<!\w)_(?=\S)([^_]+?)_(?!\w)/, "em"],
  [/~~(?=\S)([^~]+?)~~/, "del"],
  [/\[([^\]]*)\]\(([^()\s]+)\)|(https?:\/\/[^\s<>()]+)/, "a"],
];

function inline(text) {
  let first = null;
  for (const [pattern, name] of SPANS) {
    const match = pattern.exec(text);
    if (match && (first === null || match.index < first.match.index)) first = { match, name };
  }
  if (first === null) return text ? [text] : [];
  const { match, name } = first;
  const before = text.slice(0, match.index);
  if (name === null) {
    const end = text.indexOf(match[0], match.index + match[0].length);
    if (end < 0) return [before + match[0], ...inline(text.slice(match.index + match[0].length))];
    const inner = text.slice(match.index + match[0].length, end);
    return [before, el("code", inner), ...inline(text.slice(end + match[0].length))];
  }
  const rest = inline(text.slice(match.index + match[0].length));
  if (name === "a") return [before, link(match), ...rest];
  return [before, el(name, ...inline(match[1] ?? match[2])), ...rest];
}

function link(match) {
  const target = match[2] ?? match[3];
  if (!/^https?:\/\//i.test(target)) return match[0];
  const node = el("a", match[1] || target);
  node.href = target;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return node;
}
