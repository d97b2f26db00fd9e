// What htmx does not do by itself: when a page is refreshed, and what happens if that fails.
//
// A part with data-refresh is asked for again after so many seconds, while the page is looked at;
// one with data-events at once when its stream says so. The server draws everything.
"use strict";
(() => {
  const minimumPause = 1000; // at most one refresh a second
  let timer, stream, refreshedAt = 0, failures = 0;

  const live = () => document.getElementById("live");
  const isBusy = () => {
    // Whoever fills in a form, or has chosen some text, must not lose it.
    const chosen = document.getSelection();
    const part = live();
    return part !== null && (
      (chosen !== null && !chosen.isCollapsed && part.contains(chosen.anchorNode)) ||
      // Nor must a row move away from under the pointer of whoever is about to click.
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
    // A stream that was refused, as by a server that could not answer, is not opened again by itself.
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

  // Times in the reader's own zone, beside UTC, when they are pointed at.
  function localize(root) {
    for (const time of root.querySelectorAll("time[datetime]")) {
      const local = new Date(time.dateTime).toLocaleString(undefined, {
        dateStyle: "medium", timeStyle: "medium",
      });
      if (!time.title.includes(local)) time.title = `${time.title}\n${local} (your time)`;
    }
  }

  function keep(event, text) {
    event.preventDefault(); // what is shown stays
    failures += 1;
    tell(text);
    plan();
  }

  const loggedOut = "You are not logged in any more: reload the page.";
  document.addEventListener("htmx:before:response", (event) => {
    const { raw, status } = event.detail.ctx.response;
    if (status >= 400) {
      const texts = { 401: loggedOut, 403: loggedOut, 404: "There is no such task any more." };
      keep(event, texts[status] ?? "The server cannot answer. Trying again…");
    } else if (raw.redirected) {
      keep(event, loggedOut);
    }
  });
  document.addEventListener("htmx:after:request", (event) => {
    // Such as a login form.
    if (!event.detail.ctx.text.includes('id="live"')) keep(event, loggedOut);
  });
  document.addEventListener("htmx:error", () => {
    failures += 1;
    tell("The server cannot be reached. Trying again…");
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
  // Empty fields of a filter make long URLs.
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.method !== "get") {
      // A second click must not do it twice.
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
