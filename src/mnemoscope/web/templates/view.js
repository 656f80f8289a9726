// Keeps a page up to date and gives it keys. Every page can be read without it; it asks nobody but the server that it came from.
"use strict";
(() => {
  const main = document.querySelector("main");
  const keys = document.getElementById("keys");
  const state = document.getElementById("state");
  const find = (selector) => document.querySelector(selector);
  const lines = () => [...document.querySelectorAll("a.open")];

  // Staying up to date ----------------------------------------------------------------------------------------------------

  let asked = 0; // number of the last question: an answer to an older one comes too late
  let timer;

  async function refresh(always) {
    clearTimeout(timer);
    const mine = ++asked;
    const address = new URL(location.href);
    address.hash = "";
    if (!always) address.searchParams.set("seen", main.dataset.version);
    try {
      const answer = await fetch(address);
      const text = answer.status === 200 ? await answer.text() : "";
      if (mine !== asked) return;
      state.textContent = answer.ok ? "" : "This page is out of date: load it again.";
      if (text) replace(new DOMParser().parseFromString(text, "text/html"));
    } catch {
      if (mine === asked) state.textContent = "No answer: is mnemoscope view still running?";
    }
    if (mine === asked) wait();
  }

  // Exchanges the parts that may change; what is typed, marked, unfolded or uncovered elsewhere stays.
  function replace(page) {
    const focused = document.activeElement;
    const key = focused?.dataset?.key;
    const place = lines().indexOf(focused);
    const marked = new Set([...document.querySelectorAll("[data-live] input:checked")].map((box) => box.value));
    for (const part of document.querySelectorAll("[data-live]")) {
      const fresh = page.querySelector(`[data-live="${part.dataset.live}"]`);
      if (fresh) part.replaceWith(document.adoptNode(fresh));
    }
    for (const box of document.querySelectorAll("[data-live] input")) box.checked = marked.has(box.value);
    Object.assign(main.dataset, page.querySelector("main").dataset);
    if (key !== undefined && !focused.isConnected) {
      const same = [...document.querySelectorAll("[data-key]")].find((element) => element.dataset.key === key);
      (same ?? lines()[Math.min(place, lines().length - 1)])?.focus({ preventScroll: true });
    }
  }

  function wait() {
    clearTimeout(timer);
    const every = Number(main.dataset.every);
    if (every && find("[data-live]")) timer = setTimeout(look, every);
  }

  function look() {
    const reading = !getSelection().isCollapsed; // do not pull away what is being copied
    if (document.hidden || reading) wait();
    else refresh(false);
  }

  document.addEventListener("visibilitychange", () => document.hidden || look());

  // Filtering as one types ------------------------------------------------------------------------------------------------

  const form = find("form[role=search]");
  let typing;

  function filter() {
    const given = new URLSearchParams(new FormData(form));
    if (!given.get("q")) given.delete("q");
    for (const select of form.querySelectorAll("select")) if (select.selectedIndex === 0) given.delete(select.name); // the usual
    history.replaceState(null, "", `${location.pathname}?${given}`);
    refresh(true);
  }

  if (form) {
    form.querySelector("button").hidden = true;
    // Somebody may have typed before this script was there.
    if (form.elements.q.value !== (new URLSearchParams(location.search).get("q") ?? "")) filter();
  }
  form?.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(filter, 120);
  });
  form?.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typing);
    filter();
    lines()[0]?.focus();
  });

  // Keys ------------------------------------------------------------------------------------------------------------------

  function go(relation) {
    find(`a[rel=${relation}]`)?.click();
  }

  function move(by) {
    const all = lines();
    if (!all.length) return go(by > 0 ? "next" : "prev");
    const at = all.indexOf(document.activeElement);
    focus(all[at < 0 ? (by > 0 ? 0 : all.length - 1) : Math.min(Math.max(at + by, 0), all.length - 1)]);
  }

  function focus(line) {
    line?.focus({ preventScroll: true });
    line?.scrollIntoView({ block: "nearest" });
  }

  function uncover() {
    const boxes = [...document.querySelectorAll(".shade .reveal")];
    const show = boxes.some((box) => !box.checked);
    for (const box of boxes) box.checked = show;
  }

  function mark() {
    const box = document.activeElement?.closest("tr")?.querySelector("input[type=checkbox]");
    if (box) box.checked = !box.checked;
  }

  const does = {
    j: () => move(1),
    k: () => move(-1),
    g: () => focus(lines()[0]),
    G: () => focus(lines().at(-1)),
    n: () => go("next"),
    p: () => go("prev"),
    b: uncover,
    x: mark,
    c: () => find("#compare")?.requestSubmit(),
    "/": () => find("input[type=search]")?.focus(),
    "?": () => keys.showModal(),
    Escape: () => go("up"),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
    if (event.target.matches("input:not([type=checkbox]), select, textarea")) {
      if (event.key !== "Escape") return;
      event.preventDefault(); // a search field would be emptied
      event.target.blur();
      return;
    }
    if (!Object.hasOwn(does, event.key)) return;
    event.preventDefault();
    does[event.key]();
  });

  const help = document.getElementById("help");
  help.hidden = false;
  help.addEventListener("click", does["?"]);

  // Coming back from a sample, its line is where one goes on.
  const back = decodeURIComponent(location.hash.slice(1));
  if (back) focus(lines().find((line) => line.dataset.key === back));
  wait();
})();
