// The page of a search: mark an alpha, filter the prompts, enlarge images, copy the command. The
// searches of several donors do so each for itself.
document.querySelectorAll("article").forEach((article) => {
  "use strict";

  const all = (selector) => Array.from(article.querySelectorAll(selector));
  const picks = all("[data-position]");
  const rows = all("table.answers tbody tr");
  const filters = all(".filter .chip");
  const search = article.querySelector(".filter input");

  // As PromptAnswers.list_chips
  function chipsOf(row, position) {
    const texts = row.dataset.texts.split(" ");
    const degenerate = row.dataset.degenerate.split(" ");
    const neighbours = texts.slice(Math.max(position - 1, 0), position + 2);
    return {
      changed: new Set(neighbours).size > 1,
      differs: texts[position] !== texts[0],
      degenerate: degenerate.includes(String(position)),
    };
  }

  function isPressed(button) {
    return button.getAttribute("aria-pressed") === "true";
  }

  function chipIn(row, name) {
    return row.querySelector("th .chip." + name);
  }

  function mark(position) {
    picks.forEach((pick) => pick.setAttribute("aria-pressed", +pick.dataset.position === position));
    const alpha = article.querySelector(`[data-position="${position}"][data-alpha]`).dataset.alpha;
    all("[data-marked]").forEach((place) => (place.textContent = alpha));
    all("td[data-first]").forEach((cell) => {
      const covers = +cell.dataset.first <= position && position <= +cell.dataset.last;
      cell.classList.toggle("marked", covers);
    });
    rows.forEach((row) => {
      const chips = chipsOf(row, position);
      for (const name in chips) chipIn(row, name).hidden = !chips[name];
    });
    if (search) show();
  }

  function show() {
    const wanted = filters.filter((chip) => isPressed(chip));
    const text = search.value.toLowerCase();
    rows.forEach((row) => {
      const fits = wanted.every((chip) => !chipIn(row, chip.dataset.chip).hidden);
      row.hidden = !fits || !row.textContent.toLowerCase().includes(text);
    });
    filters.forEach((chip) => {
      const count = rows.filter((row) => !chipIn(row, chip.dataset.chip).hidden).length;
      chip.querySelector("span").textContent = count;
    });
  }

  function enlarge(button) {
    const small = button.querySelector("img");
    const dialog = document.createElement("dialog");
    const image = small.cloneNode();
    const close = document.createElement("button");
    dialog.setAttribute("aria-label", small.alt);
    close.type = "button";
    close.textContent = "Close";
    dialog.append(image, small.alt, close);
    dialog.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal(); // Escape closes it, and the focus goes back
  }

  function copy(button) {
    const code = button.parentElement.querySelector("code");
    const done = (word) => {
      button.textContent = word;
      setTimeout(() => (button.textContent = "Copy"), 2000);
    };
    const select = () => {
      getSelection().selectAllChildren(code);
      done("Selected");
    };
    if (!navigator.clipboard) return select();
    navigator.clipboard.writeText(code.textContent).then(() => done("Copied"), select);
  }

  picks.forEach((pick) => {
    const act = () => mark(+pick.dataset.position);
    pick.addEventListener("click", act);
    if (pick.tagName === "BUTTON") return;
    pick.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      act();
    });
  });
  all(".enlarge").forEach((button) => button.addEventListener("click", () => enlarge(button)));
  all(".copy").forEach((button) => button.addEventListener("click", () => copy(button)));
  filters.forEach((chip) =>
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", !isPressed(chip));
      show();
    })
  );
  all(".copy, .filter, .pick-help").forEach((part) => (part.hidden = false));
  if (search) {
    search.addEventListener("input", show);
    show();
  }
});
