// Adds to htmx: when a page is refreshed, and what happens if that fails.
//
// A part with data-refresh is requested again after that many seconds, while the page is visible;
// a part with data-events when its stream sends an event. The server renders everything.
"use strict";
(() => {
  const minimumPause = 1000; // at most one refresh a second
  let timer, stream, refreshedAt = 0, failures = 0;

  const live = () => document.getElementById("live");
  const isBusy = () => {
    // A refresh must not discard form input or selected text.
    const chosen = document.getSelection();
    const part = live();
    return part !== null && (
      (chosen !== null && !chosen.isCollapsed && part.contains(chosen.anchorNode)) ||
      // Nor move a row under the pointer before a click.
      part.matches(":has(input:focus, select:focus, tbody a:hover)"));
  };

  function refresh() {
    clearTimeout(timer);
    const part = live();
    if (part === null || document.hidden) return;
    if (isBusy()) return plan(1);
    refreshedAt = Date.now();
    part.dispatchEvent(new Event("refresh"));
    plan();
  }

  function plan(seconds) {
    clearTimeout(timer);
    const wanted = seconds ?? Number(live()?.dataset.refresh ?? 0) * Math.min(2 ** failures, 12);
    if (wanted > 0) timer = setTimeout(refresh, wanted * 1000);
  }

  function soon() {
    clearTimeout(timer);
    timer = setTimeout(refresh, Math.max(0, refreshedAt + minimumPause - Date.now()));
  }

  function follow() {
    const url = live()?.dataset.events;
    // A browser does not reopen a stream that the server has refused.
    if (stream && (!url || document.hidden || stream.readyState === EventSource.CLOSED)) {
      stream.close();
      stream = undefined;
    }
    if (!url || document.hidden || stream) return;
    stream = new EventSource(url);
    stream.addEventListener("refresh", soon);
    stream.addEventListener("end", () => {
      stream?.close();
      stream = undefined;
      delete live()?.dataset.events;
      soon();
    });
  }

  function tell(text) {
    let note = document.querySelector(".offline");
    if (!text) return note?.remove();
    if (!note) {
      note = document.createElement("p");
      note.className = "offline";
      note.setAttribute("role", "status");
      document.body.append(note);
    }
    note.textContent = text;
  }

  // Adds the local time to the tooltips of times in UTC.
  function localize(root) {
    for (const time of root.querySelectorAll("time[datetime]")) {
      const local = new Date(time.dateTime).toLocaleString(undefined, {
        dateStyle: "medium", timeStyle: "medium",
      });
      if (!time.title.includes(local)) time.title = `${time.title}\n${local} (your time)`;
    }
  }

  function keep(event, text) {
    event.preventDefault(); // keeps the shown content
    failures += 1;
    tell(text);
    plan();
  }

  const loggedOut = "You are no longer logged in. Reload the page.";
  document.addEventListener("htmx:before:response", (event) => {
    const { raw, status } = event.detail.ctx.response;
    if (status >= 400) {
      const texts = { 401: loggedOut, 403: loggedOut, 404: "This task no longer exists." };
      keep(event, texts[status] ?? "The server does not answer. Trying again…");
    } else if (raw.redirected) {
      keep(event, loggedOut);
    }
  });
  document.addEventListener("htmx:after:request", (event) => {
    // For example a login form.
    if (!event.detail.ctx.text.includes('id="live"')) keep(event, loggedOut);
  });
  document.addEventListener("htmx:error", () => {
    failures += 1;
    tell("The server is unreachable. Trying again…");
    plan();
  });
  document.addEventListener("htmx:after:swap", () => {
    failures = 0;
    tell("");
    localize(document);
    follow();
    plan();
  });
  document.addEventListener("visibilitychange", () => {
    follow();
    if (document.hidden) clearTimeout(timer);
    else soon();
  });
  // Without the empty fields of a filter, URLs are shorter.
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.method !== "get") {
      // A second click must not repeat the change.
      if ("sent" in form.dataset) event.preventDefault();
      form.dataset.sent = "";
      return;
    }
    for (const field of form.elements) if (field.value === "") field.disabled = true;
  });
  addEventListener("pageshow", () => {
    for (const field of document.querySelectorAll("form [disabled]")) field.disabled = false;
    for (const form of document.querySelectorAll("form[data-sent]")) delete form.dataset.sent;
    localize(document);
    follow();
    plan();
  });
})();
