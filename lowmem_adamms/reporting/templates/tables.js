// Tables of the class "sortable": a click on a heading sorts by it, another one the other way round.
(function () {
  "use strict";

  function valueOf(row, column) {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  }

  function numberOf(text) {
    return parseFloat(text.replace(/,/g, ""));
  }

  // Numbers by size, then texts, such as a dash, by the alphabet
  function compare(first, second, sign) {
    const numbers = [numberOf(first), numberOf(second)];
    const missing = numbers.map(Number.isNaN);
    if (missing[0] !== missing[1]) return missing[0] ? 1 : -1;
    return sign * (missing[0] ? first.localeCompare(second) : numbers[0] - numbers[1]);
  }

  function sort(table, heading, column) {
    const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order);
    const body = table.tBodies[0];
    const rows = Array.from(body.rows).sort((a, b) =>
      compare(valueOf(a, column), valueOf(b, column), sign)
    );
    body.append(...rows);
  }

  document.querySelectorAll("table.sortable").forEach((table) => {
    Array.from(table.tHead.rows[0].cells).forEach((heading, column) => {
      if (heading.querySelector("button") || heading.title || !heading.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sort(table, heading, column));
      heading.append(button);
    });
  });
})();
