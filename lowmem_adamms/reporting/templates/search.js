(function () {
  var box = document.getElementById("filter");
  if (!box) return;
  var rows = document.querySelectorAll("table.answers tbody tr");
  box.hidden = false;
  box.querySelector("input").addEventListener("input", function (event) {
    var wanted = event.target.value.toLowerCase();
    rows.forEach(function (row) {
      row.hidden = row.textContent.toLowerCase().indexOf(wanted) < 0;
    });
  });
})();
