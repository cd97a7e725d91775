"""The page's script, run by node on a page made of plain objects."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import resources

import pytest

PAGE = """
const nodes = {};
class Node {
  constructor() { this.children = []; this.listeners = {}; this.value = ""; this.textContent = ""; }
  append(...more) { this.children.push(...more); }
  replaceChildren(...more) { this.children = more; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  fire(name, event = {}) { return this.listeners[name]({ preventDefault() {}, target: this, ...event }); }
  requestSubmit() { return this.fire("submit"); }
}
globalThis.document = { getElementById: (id) => nodes[id] ??= new Node(), createElement: () => new Node() };
globalThis.location = { origin: "" };
const asked = [];
globalThis.fetch = async (path, options) => {
  if (path === "/v1/models") return { ok: true, json: async () => ({ data: [{ id: "tiny", chat: true }] }) };
  let stream;
  const body = new ReadableStream({ start(controller) { stream = controller; } });
  options.signal.addEventListener("abort", () => stream.error(options.signal.reason));
  const write = (text) => stream.enqueue(new TextEncoder().encode(text));
  asked.push({
    body: JSON.parse(options.body), signal: options.signal,
    say: (content) => write("data: " + JSON.stringify({ choices: [{ delta: { content } }] }) + "\\n\\n"),
    end: () => stream.close(),
  });
  return { ok: true, body };
};
const settled = () => new Promise((done) => setTimeout(done, 20));
const send = async (text) => {
  nodes.text.value = text;
  nodes.text.fire("keydown", { key: "Enter", ctrlKey: true });
  await settled();
};
const check = (what, got, want) => {
  if (JSON.stringify(got) !== JSON.stringify(want)) throw new Error(what + ": " + JSON.stringify(got));
};
const said = (n) => asked[n].body.messages.map((message) => message.content);
"""


def run(steps: str) -> None:
    """Load the page and take steps on it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    page = resources.files("bitdistill.serve").joinpath("page.html").read_text("utf-8")
    (script,) = re.findall(r"<script>(.*)</script>", page, re.DOTALL)
    program = f"{PAGE}{script}\nsettled().then(async () => {{{steps}}});"
    done = subprocess.run([node, "-"], input=program, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_conversation_goes_on() -> None:
    run("""
        await send("one");
        asked[0].say("1");
        asked[0].end();
        await settled();
        await send("two");
        asked[1].say("2");
        await settled();
        nodes.stop.fire("click");
        await settled();
        await send("three");
        check("turns", said(2), ["one", "1", "two", "2", "three"]);
    """)


def test_a_second_submit_waits_for_the_first() -> None:
    run("""
        await send("one");
        await send("two");
        check("requests", asked.length, 1);
        check("text", nodes.text.value, "two");
        check("turns", nodes.turns.children.length, 2);
        asked[0].say("1");
        asked[0].end();
        await settled();
        await send("two");
        check("turns", said(1), ["one", "1", "two"]);
    """)


def test_clear_ends_the_answer_and_stays_cleared() -> None:
    run("""
        await send("one");
        asked[0].say("1");
        await settled();
        nodes.clear.fire("click");
        check("aborted", asked[0].signal.aborted, true);
        await send("two");  // before the aborted one has come to its end
        await settled();
        check("turns", said(1), ["two"]);
        check("send", nodes.send.disabled, true);
        asked[1].say("2");
        asked[1].end();
        await settled();
        await send("three");
        check("turns", said(2), ["two", "2", "three"]);
    """)
