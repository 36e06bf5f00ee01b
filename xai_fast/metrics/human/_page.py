"""The page of a form: one HTML file that loads nothing and shows one question at a time."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["render"]

STYLE = """
:root { --ink: #1c2430; --soft: #5a6675; --line: #dfe4ea; --wash: #f5f7f9; --mark: #0b6e99; --warn: #a3261b;
        color-scheme: light; }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; color: var(--ink); background: #fff;
       font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.6rem 1.5rem 4rem; }
header { display: flex; justify-content: space-between; gap: 1.5rem; align-items: baseline;
         color: var(--soft); font-size: .9rem; }
header p { margin: 0; }
#place { white-space: nowrap; font-variant-numeric: tabular-nums; }
progress { display: block; width: 100%; height: 6px; margin: .6rem 0 2.2rem; border: 0; border-radius: 3px;
           overflow: hidden; background: var(--line); appearance: none; }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--mark); }
progress::-moz-progress-bar { background: var(--mark); }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -.01em; }
h2 { font-size: 1.4rem; line-height: 1.3; margin: 0 0 .3rem; letter-spacing: -.005em; }
progress[hidden] + #view h1 { margin-top: 1.6rem; }
h1:focus, h2:focus { outline: none; }
p { max-width: 42rem; margin: 0 0 .9rem; }
.note { color: var(--soft); }
.note strong { color: var(--ink); }
.error { color: var(--warn); font-weight: 600; margin: .7rem 0 0; min-height: 1.55em; }
.consent { padding: 1rem 1.1rem; margin: 1.6rem 0; background: var(--wash); border-radius: 8px; }
.consent p:last-of-type { margin-bottom: 1rem; }
.tick { display: flex; gap: .7rem; align-items: center; cursor: pointer; font-weight: 600; }
input[type=radio], input[type=checkbox] { width: 1.2rem; height: 1.2rem; margin: 0; flex: none; accent-color: var(--mark); }
.field { display: block; margin: 1.4rem 0; }
.field span { display: block; font-weight: 600; }
.field small { display: block; color: var(--soft); font-size: .85rem; }
input[type=text], textarea { width: 100%; font: inherit; color: inherit; padding: .6rem .7rem; margin-top: .4rem;
                             border: 1px solid #8893a0; border-radius: 6px; background: #fff; }
input[type=text] { max-width: 22rem; }
textarea { height: 11rem; font: .8rem/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre; }
.figures { display: grid; gap: 1.3rem; margin: 1.3rem 0 0; justify-content: start;
           grid-template-columns: repeat(var(--columns), minmax(0, 21rem)); }
.figures.texts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); justify-content: stretch; }
.figures.texts > :first-child:nth-last-child(odd) { grid-column: 1 / -1; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; max-height: 62vh; border-radius: 6px;
             object-fit: contain; object-position: left top; }
figure img.small { image-rendering: pixelated; }
figure .text { padding: .9rem 1.1rem; line-height: 1.85; border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .4rem; }
.colored-text { white-space: pre-wrap; overflow-wrap: anywhere; }
.colored-text > span[title] { padding: .18em 0; border-radius: 2px; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
legend { padding: 0; }
.options { display: grid; gap: .6rem; margin-top: 1.5rem; }
.options.choice { grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); max-width: 43.3rem; }
.options.scale { grid-template-columns: repeat(5, minmax(0, 1fr)); }
.option { display: flex; gap: .7rem; align-items: center; min-height: 3.4rem; padding: .7rem .9rem;
          cursor: pointer; min-width: 0; border: 1px solid #b9c2cc; border-radius: 8px; line-height: 1.35; }
.option span { min-width: 0; overflow-wrap: break-word; }
.option:hover { background: var(--wash); }
.option:has(:checked) { border-color: var(--mark); background: #eaf4f8; box-shadow: inset 0 0 0 1px var(--mark); }
.option:has(:focus-visible), .tick:has(:focus-visible) { outline: 3px solid #7fb8d1; outline-offset: 2px; }
.option input:focus-visible, .tick input:focus-visible { outline: none; }
.scale .option { flex-direction: column; justify-content: flex-start; text-align: center; font-size: .95rem; }
button { font: inherit; font-weight: 600; padding: .75rem 1.7rem; border-radius: 8px; border: 1px solid var(--mark);
         background: var(--mark); color: #fff; cursor: pointer; min-height: 3rem; }
button:hover { background: #095a7d; }
button.second { background: #fff; color: var(--mark); }
button.second:hover { background: var(--wash); }
button:disabled { opacity: .45; cursor: not-allowed; }
button:focus-visible, input[type=text]:focus-visible, textarea:focus-visible {
  outline: 3px solid #7fb8d1; outline-offset: 2px; }
.actions { display: flex; flex-wrap: wrap; gap: .8rem; margin: .7rem 0 1.6rem; }
@media (max-width: 40rem) {
  body { font-size: 16px; }
  main { padding: 1rem 1rem 3rem; }
  progress { margin-bottom: 1.4rem; }
  h1 { font-size: 1.65rem; }
  h2 { font-size: 1.2rem; }
  .figures { gap: .8rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .figures.texts { grid-template-columns: minmax(0, 1fr); }
  .figures > :first-child:nth-last-child(odd) { grid-column: 1 / -1; }
  .figures:not(.texts) > :first-child:nth-last-child(odd):not(:last-child) { max-width: 14rem; }
  .options.scale { grid-template-columns: minmax(0, 1fr); }
  .scale .option { flex-direction: row; align-items: center; text-align: left; min-height: 3rem; padding: .5rem .9rem; }
  .actions button { width: 100%; }
}
@media (prefers-reduced-motion: no-preference) { .option { transition: background .12s, border-color .12s; } }
"""

SCRIPT = r"""
(function () {
  "use strict";
  var study = JSON.parse(document.getElementById("study").textContent);
  var query = new URLSearchParams(location.search);
  var total = study.questions.length;
  var view = document.getElementById("view");
  var place = document.getElementById("place");
  var bar = document.getElementById("bar");
  var shownAt = performance.now();

  // An element with properties and children; text is always set as text, never as markup.
  function make(tag, properties, children) {
    var element = document.createElement(tag);
    Object.keys(properties || {}).forEach(function (name) {
      if (name.indexOf("aria-") === 0 || name === "role") { element.setAttribute(name, properties[name]); }
      else { element[name] = properties[name]; }
    });
    (children || []).forEach(function (child) { element.append(child); });
    return element;
  }

  function button(type, text, look) { return make("button", { type: type, textContent: text, className: look || "" }); }

  function actions(buttons) { return make("div", { className: "actions" }, buttons); }

  function paragraphs(lines) {
    return lines.map(function (line) { return make("p", { textContent: line }); });
  }

  // Characters of a spreadsheet formula never reach the table.
  function tidy(code) {
    return String(code || "").replace(/[^A-Za-z0-9_.@-]/g, "").replace(/^[^A-Za-z0-9]+/, "").slice(0, 128);
  }

  function named() {
    return tidy(query.get("participant")) || tidy(query.get("workerId")) || tidy(query.get("PROLIFIC_PID"));
  }

  function anonymous() {
    var words = new Uint32Array(2);
    crypto.getRandomValues(words);
    return "anonymous-" + words[0].toString(36) + words[1].toString(36);
  }

  // What was answered survives a reload where the browser allows it; elsewhere the form works without.
  var slot = "xai_fast.human/" + study.study + "/" + study.version + "/" + named();

  function fresh() { return { participant: named(), started: false, spent: 0, answers: [] }; }

  function restore() {
    try {
      var kept = JSON.parse(localStorage.getItem(slot));
      if (kept && Array.isArray(kept.answers) && kept.answers.length <= total && kept.spent >= 0) { return kept; }
    } catch (error) { /* No storage: begin anew. */ }
    return fresh();
  }

  function save() {
    try { localStorage.setItem(slot, JSON.stringify(state)); } catch (error) { /* No storage: nothing to keep. */ }
  }

  var state = restore();

  function answering() { return state.started && state.answers.length < total; }

  // Adds the time since the question was shown. Only time in which the page is visible counts.
  function clock() {
    var now = performance.now();
    if (answering() && !document.hidden) { state.spent += now - shownAt; }
    shownAt = now;
  }

  document.addEventListener("visibilitychange", function () {
    if (document.hidden && answering()) { state.spent += performance.now() - shownAt; save(); }
    shownAt = performance.now();
  });
  // Not every browser reports a page that it leaves as hidden.
  addEventListener("pagehide", function () { clock(); save(); });

  function cell(value) {
    var text = String(value);
    return /[",\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
  }

  function table() {
    var rows = [study.columns];
    state.answers.forEach(function (given, index) {
      var asked = study.questions[index];
      rows.push([study.study, state.participant, study.version, asked.key, asked.kind, given.answer, given.ms, index + 1]);
    });
    return rows.map(function (row) { return row.map(cell).join(",") + "\r\n"; }).join("");
  }

  function show(children, moveFocus) {
    view.replaceChildren.apply(view, children);
    place.textContent = answering() ? "Question " + (state.answers.length + 1) + " of " + total : "";
    bar.hidden = !state.started;
    bar.value = state.answers.length;
    bar.setAttribute("aria-valuetext", state.answers.length + " of " + total + " answered");
    document.getElementById("title").hidden = !state.started;
    scrollTo(0, 0);
    if (moveFocus) { view.querySelector("h1, h2").focus({ preventScroll: true }); }
  }

  function figure(item) {
    var picture = study.pictures[item.picture];
    var body;
    if (picture.html === undefined) {
      body = make("img", { alt: item.alt });
      body.onload = function () { body.classList.toggle("small", body.naturalWidth < 100); };
      body.src = picture.src;
    } else {
      body = make("div", { className: "text" });
      body.innerHTML = picture.html; // Escaped text in spans, written by the form builder.
    }
    return make("figure", {}, item.caption ? [make("figcaption", { textContent: item.caption }), body] : [body]);
  }

  function figures(items) {
    var texts = items.some(function (item) { return study.pictures[item.picture].html !== undefined; });
    var grid = make("div", { className: texts ? "figures texts" : "figures" }, items.map(figure));
    grid.style.setProperty("--columns", items.length);
    return grid;
  }

  function options(question) {
    return make("div", { className: "options " + question.kind }, question.options.map(function (option) {
      var input = make("input", { type: "radio", name: "answer", value: option.value, autocomplete: "off" });
      return make("label", { className: "option" }, [input, make("span", { textContent: option.label })]);
    }));
  }

  function ask(moveFocus) {
    var question = study.questions[state.answers.length];
    var error = make("p", { className: "error", role: "alert" });
    var heading = make("h2", { textContent: question.prompt, tabIndex: -1 });
    var parts = [make("legend", {}, [heading])];
    if (question.note) {
      var emphasis = make("strong", { textContent: question.emphasis });
      parts.push(make("p", { className: "note" }, [question.note + " ", emphasis]));
    }
    if (question.figures.length) { parts.push(figures(question.figures)); }
    parts.push(options(question), error);
    var next = button("submit", state.answers.length + 1 === total ? "Finish" : "Next");
    var form = make("form", { noValidate: true }, [make("fieldset", {}, parts), actions([next])]);
    form.addEventListener("change", function () { error.textContent = ""; });
    form.addEventListener("submit", function (event) {
      event.preventDefault();
      var chosen = form.querySelector("input:checked");
      if (!chosen) { error.textContent = "Please choose an answer to go on."; return; }
      take(chosen.value);
    });
    show([form], moveFocus);
    shownAt = performance.now();
  }

  function take(value) {
    clock();
    state.answers.push({ answer: value, ms: Math.round(state.spent) });
    state.spent = 0;
    save();
    proceed(true);
  }

  function begin() {
    var preview = query.get("assignmentId") === "ASSIGNMENT_ID_NOT_AVAILABLE";
    var error = make("p", { className: "error", role: "alert" });
    var code = make("input", { type: "text", autocomplete: "off", spellcheck: false });
    var agreed = make("input", { type: "checkbox", autocomplete: "off" });
    var parts = [make("h1", { textContent: study.title, tabIndex: -1 })].concat(paragraphs(study.introduction));
    if (study.consent.length) {
      var text = make("span", { textContent: "I have read this and agree to take part." });
      var tick = make("label", { className: "tick" }, [agreed, text]);
      parts.push(make("div", { className: "consent" }, paragraphs(study.consent).concat([tick])));
    }
    if (!named()) {
      parts.push(make("label", { className: "field" }, [
        make("span", { textContent: "Participant code" }),
        make("small", { textContent: "If you were given one; otherwise leave this empty." }), code]));
    }
    if (preview) { error.textContent = "This is a preview. Accept the task to begin."; }
    var start = button("submit", "Start");
    start.disabled = preview;
    var form = make("form", { noValidate: true }, parts.concat([error, actions([start])]));
    form.addEventListener("submit", function (event) {
      event.preventDefault();
      if (preview) { return; }
      if (study.consent.length && !agreed.checked) { error.textContent = "Please tick the box above to take part."; return; }
      state.participant = named() || tidy(code.value) || anonymous();
      state.started = true;
      save();
      proceed(true);
    });
    show([form], false);
  }

  function download(text) {
    var link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" })) });
    link.download = "answers-" + String(study.version).padStart(2, "0") + "-" + state.participant + ".csv";
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 60000);
  }

  function copy(area, status) {
    area.focus();
    area.select();
    var done = false;
    try { done = document.execCommand("copy"); } catch (error) { /* Not allowed here: the text stays selected. */ }
    status.textContent = done ? "Copied." : "The text is selected: press Ctrl+C (on a Mac, Command+C).";
  }

  // The platform finds the answers in a hidden field, beside those it handed over in the address.
  function submission(text) {
    var form = make("form", { method: "post", action: study.submit.url });
    var fields = [[study.submit.field, text], ["participant", state.participant]];
    ["assignmentId", "hitId", "workerId", "PROLIFIC_PID", "STUDY_ID", "SESSION_ID"].forEach(function (name) {
      if (query.has(name)) { fields.push([name, query.get(name)]); }
    });
    fields.forEach(function (pair) { form.append(make("input", { type: "hidden", name: pair[0], value: pair[1] })); });
    form.append(actions([button("submit", "Submit answers")]));
    return form;
  }

  function finish(moveFocus) {
    var text = table();
    var status = make("p", { className: "note", role: "status" });
    var area = make("textarea", { readOnly: true, id: "results", value: text, spellcheck: false });
    var keep = button("button", "Download answers", study.submit ? "second" : "");
    var copies = button("button", "Copy answers", "second");
    var again = button("button", "Next participant", "second");
    again.disabled = true;
    keep.onclick = function () {
      download(text);
      status.textContent = "The file is on its way to your downloads.";
      again.disabled = false;
    };
    copies.onclick = function () { copy(area, status); again.disabled = false; };
    again.onclick = function () { state = fresh(); save(); begin(); };
    var parts = [make("h1", { textContent: "Thank you", tabIndex: -1 })];
    var task = study.submit ? "Please submit your answers." : "Please download your answers and hand in the file.";
    parts.push(make("p", { textContent: "All questions are answered. " + task }));
    if (study.submit) { parts.push(submission(text)); }
    // One device for many people: not on a platform, where one participant must not answer twice.
    parts.push(actions(study.submit || named() ? [keep, copies] : [keep, copies, again]), status);
    parts.push(make("label", { className: "field" }, [make("span", { textContent: "Your answers" }), area]));
    show(parts, moveFocus);
  }

  function proceed(moveFocus) {
    if (!state.started) { begin(); }
    else if (answering()) { ask(moveFocus); }
    else { finish(moveFocus); }
  }

  bar.max = total;
  proceed(false);
})();
"""


def render(data: Mapping[str, Any]) -> str:
    """The page of one version.

    Parameters
    ----------
    data : mapping
        What the script shows: see `forms._page_data`. Everything in it can be read by the participant.

    Returns
    -------
    str
        HTML. Its content security policy forbids the browser to load anything.
    """
    title = html.escape(data["title"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(posts=bool(data["submit"]))}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="robots" content="noindex">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p id="title" hidden>{title}</p><p id="place" aria-live="polite"></p></header>\n'
        '<progress id="bar" value="0" max="1" aria-label="Progress" hidden></progress>\n<div id="view"></div>\n'
        "<noscript><p>This form needs JavaScript. Please switch it on and load the page again.</p></noscript>\n</main>\n"
        f'<script type="application/json" id="study">{_embedded(data)}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: no text in it can close the element or open a comment."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(*, posts: bool) -> str:
    """Only this page's own script may run, and nothing may be fetched.

    A page that posts leaves `form-action` open: platforms answer with redirects to addresses of their own.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return policy if posts else policy + "; form-action 'none'"
